"""FANformer: train, measure, run and ship a compact language model. Importing this imports nothing heavy."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fanformer.model import FANformerConfig, FANformerForCausalLM, FANformerModel

__version__ = "0.1.0"

__all__ = ["FANformerConfig", "FANformerForCausalLM", "FANformerModel", "__version__"]


def __getattr__(name: str) -> Any:
    """Import the model when one of its classes is asked for (PEP 562).

    Raises:
        AttributeError: if there is no such public name.
    """
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("fanformer.model"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
