"""The name of the cache of keys and values: `past_key_values` in `transformers` before 5.24, `cache` from then on."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
"""What the installed version calls it, in calls and in what models return."""


def takes_cache(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Let a method that takes `past_key_values` take it as `cache` as well; it raises ValueError where given both."""

    @functools.wraps(forward)
    def by_either_name(self: nn.Module, *args: Any, cache: Cache | None = None, **kwargs: Any) -> Any:
        if cache is not None:
            if kwargs.get("past_key_values") is not None:
                raise ValueError("one of `cache` and `past_key_values` must be given, got both: they are the same.")
            kwargs["past_key_values"] = cache
        return forward(self, *args, **kwargs)

    takes = inspect.signature(forward)
    *named, others = takes.parameters.values()
    assert others.kind is inspect.Parameter.VAR_KEYWORD, "what goes down to the attention backend comes last"
    either = inspect.Parameter("cache", inspect.Parameter.KEYWORD_ONLY, default=None)
    # `generate` refuses keywords that it does not find there
    by_either_name.__signature__ = takes.replace(parameters=[*named, either, others])  # type: ignore[attr-defined]
    return by_either_name
