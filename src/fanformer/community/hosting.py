"""A host's side of a run on the package's own recipe: the weights to begin with, their loss, and folders of rounds."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from fanformer.community.outer import outer_begin
from fanformer.community.plan import Plan
from fanformer.community.records import RoundRecord
from fanformer.community.rounds import HostState, Measure, Publish
from fanformer.training.checkpoint import Fill, newest_intact, prune, write_checkpoint
from fanformer.training.run import Run
from fanformer.training.state import model_tensors


def first_state(run: Run) -> HostState:
    """Return the state before the first round: the weights that the run's model has."""
    return HostState(0, outer_begin(model_tensors(run.model)))


def measure_of(run: Run, max_tokens: int | None = None) -> Measure:
    """Return what measures the held-out loss of weights, by the model of a run, whose own weights go.

    Args:
        run: opened.
        max_tokens: held-out tokens to measure on; None is all.
    """

    def measure(weights: Mapping[str, Tensor]) -> float:
        with torch.no_grad():
            for name, tensor in model_tensors(run.model).items():
                tensor.copy_(weights[name])
        model = run.model.to(run.environment.device)
        figures = run.corpus.measure(model, run.config.batch.rows_per_pass(1), max_tokens=max_tokens)
        return float(figures.loss)

    return measure


def publisher(
    run: Run, folder: Path, plan: Plan, keep_last: int, also: Callable[[Path], None] = lambda folder: None
) -> Publish:
    """Return what makes an accepted round a `transformers` folder that is there whole or not at all.

    Round N is `checkpoint-N`, with the host's state in it and a manifest of checksums, as a run's checkpoints are.

    Args:
        run: opened; its model and tokenizer are the folder's.
        folder: of the host.
        plan: of the run in rounds.
        keep_last: folders to keep.
        also: writes more into each before its manifest is made.
    """

    def publish(state: HostState, record: RoundRecord) -> None:
        weights = state.weights(plan.base_dtype)
        steps = state.number * plan.round_steps
        fill_model: Fill = run.save_model(weights, steps)

        def fill(place: Path) -> None:
            fill_model(place)
            state.save(place)
            also(place)

        needed = 3 * sum(4 * tensor.numel() for tensor in weights.values())
        write_checkpoint(folder, state.number, fill, needed)
        prune(folder, keep_last, None)

    return publish


def last_state(folder: Path, note: Callable[[str], None]) -> HostState | None:
    """Return the state of the newest intact round that `publisher` wrote, or None.

    Args:
        folder: of the host.
        note: is told of damaged ones, which are put aside.
    """
    newest = newest_intact(folder, note)
    return None if newest is None else HostState.load(newest)
