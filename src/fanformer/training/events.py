"""What runs tell while they work, one kind of event heard by one function; and what the loop asks of its run."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

    from fanformer.evaluation.loss import Share
    from fanformer.training.checkpoint import Fill

Record = dict[str, Any]
"""One step's figures, as in metrics.jsonl."""

Kind = Literal["note", "data", "wait", "step", "record", "sample", "entry", "begin", "progress", "end"]


@dataclass(frozen=True)
class Event:
    """Something that happened.

    Attributes:
        kind: "note" is one line for people; "data" how much of the data is read; "wait" what the next step waits for
            (compiling, evaluating, saving); "step" the end of an optimizer step; "record" the figures of a step, as in
            metrics.jsonl; "sample" what the model writes now. Where several runs make a comparison, and several
            comparisons a queue, "entry" is the beginning of a comparison; "begin", "progress" and "end" tell of one run
            among those of its comparison.
        text: of a note or a wait; of a sample the prompt and what follows it; how far or how well a run of several is.
        share: of the run that is over, or of the data that is read, in [0, 1].
        figures: of "data" `bytes` and `total_bytes`; of "step" `step`, `tokens` and `elapsed_seconds`; of "record" all;
            of "entry" its `number` and their `total`; of "begin" and "end" how many runs are `done`, of `total`.
        name: of the comparison, or of the run among several.
    """

    kind: Kind
    text: str = ""
    share: float = 0.0
    figures: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""


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


class Rows(Protocol):
    """What is trained on, in an order of its own."""

    @property
    def digested(self) -> Sequence[str]:
        """Names of the tensors of a batch that tell rows apart, for the records."""

    def __len__(self) -> int:
        """Return how many there are."""

    def batch(self, indices: list[int]) -> "dict[str, Tensor]":
        """Return `input_ids`, `labels` (shifted already) and `position_ids` of rows, each (B, T)."""


class Loss(Protocol):
    """What a step learns from its rows: a mean over things that they hold, such as tokens or pairs of answers."""

    @property
    def figures(self) -> "Sequence[str]":
        """Names of the means that a batch's output has beside its loss, in `figures`, as long; mostly none."""

    def install(self, model: "PreTrainedModel", compile_options: Mapping[str, Any] | None) -> None:
        """Let `model` compute it for batches of the rows, in place.

        Args:
            model: a causal language model.
            compile_options: arguments of torch.compile where the run compiles.
        """

    def count(self, batch: "Mapping[str, Tensor]") -> int:
        """Return of how many things a batch is; the loss of a step is the sum over them, over the step's count."""


@dataclass(frozen=True)
class Start:
    """How a run begins or goes on, as far as its corpus has to know.

    Attributes:
        device: where it is computed.
        autocast_dtype: of its matrix products; None is that of the weights.
        batch_size: rows of a forward pass.
        share: which part of a measurement is this process's.
        going_on: whether it has a checkpoint.
        wait: returns once every process has called it.
        note: is told one line.
    """

    device: str
    autocast_dtype: "torch.dtype | None"
    batch_size: int
    share: "Share"
    going_on: bool
    wait: Callable[[], None]
    note: Callable[[str], None]


class Measured(Protocol):
    """What the loop reads of an evaluation."""

    @property
    def loss(self) -> float:
        """Held-out loss in nats per token; the lowest is the best."""

    @property
    def tokens(self) -> int:
        """Held-out tokens that were predicted."""

    def record(self) -> Record:
        """Return what metrics.jsonl holds of it."""


Evaluate = Callable[[bool, Callable[[], None], int | None], Measured]
"""Measures on what is held out, all of it or a sample; called in every process, with what it calls between batches, and
the most tokens that there is time for, None for all."""

SaveModel = Callable[[dict[str, "Tensor"], int], "Fill"]
"""Returns what writes the model's part of a checkpoint after a step, from tensors that nobody changes until then."""
