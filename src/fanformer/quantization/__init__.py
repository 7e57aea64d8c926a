"""Smaller files of a trained model: what is written, in which format, and what it costs."""
