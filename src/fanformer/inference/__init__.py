"""Text out of a trained model: generation, streaming, chat."""
