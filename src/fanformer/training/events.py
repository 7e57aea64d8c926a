"""What a run tells while it works: one kind of event, heard by one function."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["note", "data", "step", "record", "sample"]


@dataclass(frozen=True)
class Event:
    """Something that happened.

    Attributes:
        kind: "note" is one line for people; "data" how much of the data is read; "step" the end of an optimizer step;
            "record" the figures of a step, as in metrics.jsonl; "sample" what the model writes now.
        text: of a note; of a sample the prompt and what follows it.
        share: of the run that is over, or of the data that is read, in [0, 1].
        figures: of "data" `bytes` and `total_bytes`; of "step" `step`, `tokens` and `elapsed_seconds`; of "record" all.
    """

    kind: Kind
    text: str = ""
    share: float = 0.0
    figures: Mapping[str, Any] = field(default_factory=dict)


Listener = Callable[[Event], None]
"""Hears what a run tells: the command line draws it, tests collect it."""


def silent(event: Event) -> None:
    """Hear an event and do nothing."""


def note_to(listener: Listener) -> Callable[[str], None]:
    """Return what tells a listener one line."""
    return lambda text: listener(Event("note", text))


def data_to(listener: Listener) -> Callable[[int, int | None], None]:
    """Return what tells a listener how many bytes of the data are read, and of how many; None is not known."""

    def tell(done: int, total: int | None) -> None:
        share = done / total if total else 0.0
        listener(Event("data", share=share, figures={"bytes": done, "total_bytes": total}))

    return tell
