"""The programs in release/ import each other by their plain names."""

import sys

import pytest

from tests.saved_models import saved_model, tiny_tokenizer  # noqa: F401  # fixtures


@pytest.fixture(autouse=True, scope="package")
def release_programs(request):
    """Let tests import the programs of release/."""
    folder = str(request.config.rootpath / "release")
    sys.path.insert(0, folder)
    yield
    sys.path.remove(folder)
