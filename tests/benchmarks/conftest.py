"""Fixtures of the benchmarks' tests."""

from tests.saved_models import tiny_tokenizer  # noqa: F401  # a fixture
