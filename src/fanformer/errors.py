"""The errors this package raises on bad input; each message says name, got, expected and remedy in one line.

`model/` raises plain ValueError, since a saved folder carries its code without this file.
"""

import difflib
import importlib
import os
from collections.abc import Iterable
from types import ModuleType


class FANformerError(Exception):
    """Base of all errors that a user can cause and mend; the command line prints them as one line and exits with 2."""


class ConfigError(FANformerError, ValueError):
    """A setting that does not exist, has the wrong type or value, or contradicts another."""


class DataError(FANformerError, ValueError):
    """Data that is missing, empty, unreadable, of the wrong kind or too short."""


class CheckpointError(FANformerError, RuntimeError):
    """A model or run folder that is missing, incomplete, damaged or of another kind."""


class NotANumberError(CheckpointError):
    """A model that computes values that are no numbers, which would otherwise come out as arbitrary text or figures."""

    def __init__(self) -> None:
        super().__init__(
            "the model computes values that are no numbers: its weights are damaged, or its dtype is too narrow: try "
            "float32 or bfloat16."
        )


class DivergenceError(FANformerError, ArithmeticError):
    """A training run whose loss or gradients do not stay finite, or jump again and again.

    Attributes:
        reason: what happened, without what to do about it.
    """

    def __init__(self, reason: str, remedy: str):
        super().__init__(f"{reason}: {remedy}")
        self.reason = reason


class ProcessLostError(FANformerError, RuntimeError):
    """Another process of the same job ended, so that this one cannot go on."""


class DependencyError(FANformerError, ImportError):
    """An optional package that is needed here and not installed; the message names the extra that brings it."""


def did_you_mean(got: str, valid: Iterable[str]) -> str:
    """Return the nearest valid name as a sentence to append to a message, or all of them where none is near."""
    names = sorted(valid)
    near = difflib.get_close_matches(got, names, n=1, cutoff=0.6)
    return f"did you mean `{near[0]}`?" if near else f"expected one of: {', '.join(names)}."


def refuse_unknown(given: Iterable[str], valid: Iterable[str], what: str, where: str = "") -> None:
    """Raise ConfigError for the first of `given` that is none of `valid`; the nearest is offered.

    Args:
        given: names.
        valid: those that there are.
        what: what they should be, such as "a field of a queue".
        where: beginning of the message.
    """
    names = list(valid)
    for name in given:
        if name not in names:
            raise ConfigError(f"{where}`{name}` is not {what}: {did_you_mean(str(name), names)}")


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


def refuse_single(name: str, given: object) -> None:
    """Raise ConfigError if a text, bytes or a path is given where a list is meant."""
    if isinstance(given, str | bytes | os.PathLike):
        raise ConfigError(f"`{name}` must be a list, got {type(given).__name__}: write [...] around it.")
