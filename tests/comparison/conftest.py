"""Fixtures of this folder."""

from tests.training.conftest import corpus  # noqa: F401  # a fixture
