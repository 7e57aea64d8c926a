"""How deep a loaded model thinks: the steps of every call that names none, and how many its tokens took."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from fanformer.data.packing import PLACES_OF_TEXT, STEPS_TAKEN, StepCount
from fanformer.errors import ConfigError
from fanformer.generation.text_model import depth_note


def set_depth(
    model: PreTrainedModel,
    num_steps: int | None = None,
    exit_threshold: float | None = None,
    last_step_cache: bool | None = None,
) -> None:
    """Let every call of `model` that names no depth think so deep from now on.

    Args:
        model: of `transformers`.
        num_steps: steps of a recurrent depth; None leaves them as they are, at first the mean of training.
        exit_threshold: relative change of its state from which on a token takes no further step; None as before.
        last_step_cache: whether keys and values of the last step only are kept, which changes what follows a prompt.

    Raises:
        ConfigError: if the model has no recurrent depth, or a value is out of range.
    """
    if num_steps is None and exit_threshold is None and last_step_cache is None:
        return
    decoder: Any = model.get_decoder()
    if not hasattr(decoder, "depth"):
        raise ConfigError(
            f"`num_steps` and `exit_threshold` need a model with recurrent depth, got a {model.config.model_type}: "
            "leave them out."
        )
    try:
        decoder.depth = decoder.depth.changed(model.config, num_steps, exit_threshold, last_step_cache)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def note_of(model: PreTrainedModel) -> str | None:
    """Return what `depth_note` says of a model, None for one without recurrent depth."""
    recurrence = getattr(model.config, "recurrence", None)
    return None if recurrence is None else depth_note(recurrence.mean_steps, recurrence.largest_steps)


def cache_layers(model: PreTrainedModel, num_steps: int | None = None) -> int:
    """Return how many layers of keys and values a model keeps: one for every block that it runs.

    Args:
        model: of `transformers`; a plain one keeps as many at every depth.
        num_steps: of a recurrent depth; None is the model's own. Layers of fewer steps come first among those of more.
    """
    config = model.config.get_text_config()
    recurrence = getattr(config, "recurrence", None)
    if recurrence is None:
        return int(config.num_hidden_layers)
    return int(recurrence.cache_layers(num_steps or model.get_decoder().depth.largest))


def parse_steps(words: str | None) -> list[int | None]:
    """Return the numbers of steps in a list with commas; None, the mean of training, where there is no list.

    Raises:
        ConfigError: if one is no number, or named twice.
    """
    if words is None:
        return [None]
    parts = [part.strip() for part in words.split(",")]
    if not all(part.isdecimal() for part in parts) or len(set(parts)) < len(parts):
        raise ConfigError(f"`--num-steps` must name each number once, got `{words}`: expected such as 1,2,4,8.")
    return [int(part) for part in parts]


def check_steps(model: PreTrainedModel, chosen: Sequence[int | None], exit_threshold: float | None) -> None:
    """Raise ConfigError if a model cannot think as deep as one of `chosen`, before anything is measured."""
    for num_steps in chosen:
        with chosen_depth(model, num_steps, exit_threshold):
            pass


@contextmanager
def chosen_depth(
    model: PreTrainedModel, num_steps: int | None = None, exit_threshold: float | None = None
) -> Iterator[dict[str, Any]]:
    """Let `model` think so deep within the `with` block, and say how deep: nothing for a plain model.

    Yields:
        `num_steps`, and with a threshold, once the block has ended, `exit_threshold` and `mean_steps`, those that
        tokens took on average.

    Raises:
        ConfigError: as `set_depth`.
    """
    decoder: Any = model.get_decoder()
    before, told = getattr(decoder, "depth", None), {}
    set_depth(model, num_steps, exit_threshold)
    try:
        with nullcontext(StepCount()) if exit_threshold is None else counted_steps(model) as count:
            if getattr(model.config, "recurrence", None) is not None:
                told["num_steps"] = decoder.depth.largest
            yield told
        if exit_threshold is not None:
            told |= {"exit_threshold": exit_threshold, "mean_steps": count.mean}
    finally:
        if before is not None:
            decoder.depth = before


@contextmanager
def counted_steps(model: PreTrainedModel) -> Iterator[StepCount]:
    """Count the steps that tokens take within the `with` block.

    Padding is counted with one; where only some places are `places_of_text`, the others are not counted.
    """
    count = StepCount()

    def see(module: nn.Module, inputs: Any, output: Any) -> None:
        steps: Tensor | None = getattr(output, "steps", None)
        if steps is not None:
            places = PLACES_OF_TEXT.get()
            steps = steps if places is None else steps[places]
            count.add(steps.numel(), int(steps.sum()))

    handle, before = model.get_decoder().register_forward_hook(see), STEPS_TAKEN.set(count)
    try:
        yield count
    finally:
        handle.remove()
        STEPS_TAKEN.reset(before)
