"""Text from a model folder, on torch, and what every way of writing text has in common."""
