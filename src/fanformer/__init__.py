"""FANformer: train, measure, run and ship a compact language model. Importing this imports nothing heavy."""

__version__ = "0.1.0"
