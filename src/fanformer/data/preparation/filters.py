"""Named filters: each a pure function that changes a document's text, or drops the document by returning None."""

import re
from collections.abc import Callable, Mapping, Sequence

from fanformer.errors import ConfigError, did_you_mean

Filter = Callable[[str], str | None]
FEWEST_WORDS = 10
"""Documents of this many words or fewer are dropped by `min-words`."""
_URL = re.compile(r"(?:https?://|www\.)[^\s<>\"')\]}]+")


def min_words(text: str) -> str | None:
    """Drop a text of FEWEST_WORDS words or fewer, a word being what stands between spaces."""
    return text if len(text.split(maxsplit=FEWEST_WORDS)) > FEWEST_WORDS else None


def clean_urls(text: str) -> str | None:
    """Delete web addresses, those that begin with `http://`, `https://` or `www.`; drop a text that holds no more."""
    cleaned = _URL.sub("", text)
    return cleaned if cleaned.strip() or cleaned == text else None


FILTERS: Mapping[str, Filter] = {"min-words": min_words, "clean-urls": clean_urls}
"""All filters by name; the name stands in data.json, so that a filter that changes must take another one."""


def require_filters(names: Sequence[str]) -> None:
    """Raise ConfigError where one of `names` is no filter; the message names the nearest."""
    for name in names:
        if name not in FILTERS:
            raise ConfigError(f"no filter `{name}`: {did_you_mean(name, FILTERS)}")


def first_to_drop(text: str, names: Sequence[str]) -> tuple[str, str | None]:
    """Apply filters in order; return the text and the name of the filter that dropped it, None if none did."""
    for name in names:
        result = FILTERS[name](text)
        if result is None:
            return text, name
        text = result
    return text, None
