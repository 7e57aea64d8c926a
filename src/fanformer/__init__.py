"""FANformer: train, measure, run and ship a compact language model. Importing this imports nothing heavy."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fanformer.api import evaluate, finetune, train
    from fanformer.loading import load_text_model as load
    from fanformer.model import FANformerConfig, FANformerForCausalLM, FANformerModel

__version__ = "0.1.0"

__all__ = [
    "FANformerConfig",  # the three classes for `transformers`
    "FANformerForCausalLM",
    "FANformerModel",
    "__version__",
    "evaluate",  # what `fanformer eval` does
    "finetune",  # what `fanformer finetune` does
    "load",  # a folder or a GGUF file -> a TextModel with .generate(), .stream() and .score()
    "train",  # what `fanformer train` does
]
_WHERE = {
    "load": ("fanformer.loading", "load_text_model"),
    "train": ("fanformer.api", "train"),
    "evaluate": ("fanformer.api", "evaluate"),
    "finetune": ("fanformer.api", "finetune"),
}


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for (PEP 562).

    Raises:
        AttributeError: if there is no such public name.
    """
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _WHERE.get(name, ("fanformer.model", name))
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
