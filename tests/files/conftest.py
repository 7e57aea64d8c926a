"""Fixtures of this folder."""

from tests.saved_models import saved_model, tiny_tokenizer  # noqa: F401
