"""Packages that are needed for some data only."""

import importlib
from types import ModuleType

from fanformer.errors import DependencyError


def import_extra(module: str, purpose: str, extra: str = "data") -> ModuleType:
    """Import an optional package of an extra.

    Raises:
        DependencyError: if it is not installed; the message names the extra that brings it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DependencyError(
            f"{purpose} needs the package `{module.partition('.')[0]}`, which is not installed: "
            f"pip install 'fanformer[{extra}]'"
        ) from error
