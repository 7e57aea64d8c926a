"""Fixtures of this folder."""

import pytest

from fanformer.data.tokenizer import train_tokenizer
from tests.data.texts import MANY


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(MANY[:50], 300)


@pytest.fixture
def two_token_tokenizer():
    """Start and end are different tokens, as in Llama."""
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer()
    tokenizer.bos_token = "<pad>"
    return tokenizer
