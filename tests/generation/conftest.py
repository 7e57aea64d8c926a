"""Fixtures of this folder."""

from tests.saved_models import asking, loaded, model_copy, saved_model, tiny_tokenizer  # noqa: F401
