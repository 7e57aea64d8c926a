"""A member's side of a round: train a share from the base, by the package's own trainer, and code what came of it.

Between two rounds a member keeps the state of its inner optimizer, what coding lost, and the tensors that the round
did not send, as its own training left them (streaming DiLoCo, arXiv:2501.18512). All of it is in its checkpoints, so
that a member which was killed goes on from its last one, in whatever round the host is then.
"""

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from signal import Signals

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fanformer.community.plan import Plan, Task
from fanformer.community.updates import ErrorFeedback, Source, Update, fragments, shapes_of, weights_checksum
from fanformer.errors import CheckpointError, ConfigError, DataError, DivergenceError
from fanformer.files.durable import read_json, replace_json
from fanformer.training.checkpoint import checkpoint_name, checkpoints, delete_checkpoint, step_of
from fanformer.training.events import Event, Listener, note_to, silent
from fanformer.training.fields import RunConfig
from fanformer.training.run import Run, opened
from fanformer.training.run_model import ModelBuilder, build_fanformer
from fanformer.training.state import model_tensors
from fanformer.training.trainer import Trainer

KEPT_FILE, MEMBER_FILE = "community.safetensors", "community.json"
"""What a member's checkpoint holds besides a run's."""
_ANCHOR, _LOST = "anchor|", "lost|"


def member_config(config: RunConfig, plan: Plan, **fields: object) -> RunConfig:
    """Return the run of a member: the steps, rows and schedule of the plan, and whatever else is the member's own.

    Args:
        config: the recipe, the same for all members.
        plan: of the run.
        **fields: of the member's own, such as `output_dir`, `data`, `device`.

    Raises:
        ConfigError: if the recipe cannot be followed in rounds.
    """
    if config.lora_rank is not None:
        raise ConfigError(f"`lora_rank` has no place in a community run, got {config.lora_rank}: leave it out.")
    if config.divergence.spike_rollback is not None:
        raise ConfigError(
            f"`spike_rollback` goes back to a checkpoint, got {config.divergence.spike_rollback}: leave it out of a "
            "community run, whose host judges the loss."
        )
    length = {"max_steps": plan.max_steps, "tokens": None, "epochs": None, "max_time": None}
    rows = {"batch_size": plan.batch_size, "sequence_length": plan.sequence_length}
    going_on = {"resume": True, "overwrite": False, "keep_best": True}  # by which RoundTrainer keeps what it saved last
    return config.replace(**{**length, **rows, **going_on, **fields})


class RoundTrainer(Trainer):
    """The package's training loop, a round at a time; what a round begins with and comes to is the caller's."""

    def train_round(self, first_step: int, place: int, steps: int, stop: Callable[[int], bool]) -> tuple[int, float]:
        """Do inner steps.

        Args:
            first_step: of the whole run, which decides the learning rate.
            place: first row, in the order of the run's rows.
            steps: to do at most.
            stop: is told how many are done, and says whether to end there.

        Returns:
            Steps that moved the weights, and their mean loss, nan where there are none.
        """
        state = self.state
        state.step, state.place, state.skipped_in_row = first_step, place, 0
        state.window_loss, state.window_steps, state.window_rows, state.window_figures = 0.0, 0, 0, {}
        self.clock.begin(state)
        self.optimizer.zero_grad(set_to_none=True)  # what a round that diverged left
        with self.request:
            done = 0
            while done < steps and not self.request.signal and not stop(done):
                self._step(first=False)
                done += 1
        self.clock.store(state)
        good, loss = state.window_steps, state.window_loss
        state.window_loss, state.window_steps, state.window_rows, state.window_figures = 0.0, 0, 0, {}
        return good, loss / good if good else math.nan

    def tell(self, figures: Mapping[str, float]) -> None:
        """Write a round's figures into metrics.jsonl and tell them."""
        tokens = self.state.step * self.config.batch.tokens_per_step
        record = {"step": self.state.step, "tokens": tokens, "learning_rate": self.learning_rate, **figures}
        self.records.append(record)
        self.listener(Event("record", share=self.clock.progress(self.state.step), figures=record))

    def go_on_from(self, checkpoint: Path) -> None:
        """Take over weights, optimizer and numbers of a checkpoint."""
        self._restore(checkpoint)

    def save(self) -> Path:
        """Write a checkpoint, wait until it is on the disk, and delete those of later steps, which are older.

        There are such where a host did a round again, or went back.

        Raises:
            CheckpointError, OSError: if the disk has no room, or refuses.
        """
        folder, step = self.config.folder, self.state.step
        self.best = (math.nan, step)  # so that it is kept, whatever checkpoints of later steps there are
        self._save()
        self.writer.wait()
        self.save_error = None
        self._hear_of_saves()
        if self.save_error is not None:
            raise self.save_error
        for older in checkpoints(folder):
            if step_of(older) > step:
                delete_checkpoint(older)
        return folder / checkpoint_name(step)


class Member:
    """Trains its share of rounds; made by `joined`."""

    def __init__(self, run: Run, plan: Plan, name: str, licence: str) -> None:
        """Make the run's model and loop ready, and go on from its last checkpoint where there is one.

        Args:
            run: of a member's configuration, opened.
            plan: of the run in rounds.
            name: of the member, as the host knows it.
            licence: of its data.

        Raises:
            ConfigError: if several processes train together.
            CheckpointError: if the checkpoint is damaged.
        """
        if run.processes.count > 1:
            raise ConfigError(f"a member trains in a single process, got {run.processes.count}: start one.")
        self.run, self.plan, self.name, self.licence = run, plan, name, licence
        self.shares_rows = run.corpus.fingerprint == plan.data_fingerprint
        self._note = note_to(run.listener)
        if not self.shares_rows:
            self._note(f"these data are not those that the run shares out: {name} goes through them by itself")
        run.also_saved.append(self._write)
        self.trainer = run.trainer(RoundTrainer)
        self._tensors = model_tensors(self.trainer.model)
        self._fragments = fragments(shapes_of(self._tensors), plan.fragments)
        self.feedback = ErrorFeedback()
        self._anchor: dict[str, Tensor] = {}
        self._own_place, self._sent = _beginning(name, len(run.corpus.rows)), -1
        if run.checkpoint is not None:
            self.trainer.go_on_from(run.checkpoint)
            self._read(run.checkpoint)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors of a base, by name."""
        return shapes_of(self._tensors)

    @property
    def base(self) -> Mapping[str, Tensor]:
        """The weights that the last share began with, float32 of any shape by name.

        Empty before the first one, and after one that diverged.
        """
        return self._anchor

    @property
    def stopped_by(self) -> str | None:
        """Name of the signal that asked this process to stop, such as "SIGTERM", or None."""
        number = self.trainer.request.signal
        return None if number is None else Signals(number).name

    def take_part(
        self, task: Task, base: Mapping[str, Tensor], stop: Callable[[int], bool] = lambda steps: False
    ) -> bytes:
        """Train from the base as the task says and return the coded update.

        Ends after the task's steps, when the next one would not be done in its seconds, at a signal, or when `stop`
        says so. The caller takes what sending will need off the seconds.

        Args:
            task: the share.
            base: float32 tensors by name, of the model's shapes.
            stop: is told how many steps are done.

        Raises:
            DataError: if the base is another than the task's, or not a single step was done.
            DivergenceError: if the loss does not stay finite; the next share begins from its base again.
        """
        if shapes_of(base) != self.shapes:
            raise DataError("the base of a task must have the model's tensors, got others: is this the same preset?")
        if weights_checksum(base) != task.base:
            raise DataError(f"the base of round {task.round} must be {task.base[:16]}, got another: fetch it again.")
        began = time.monotonic()
        self._take_over(base)
        place = task.place if self.shares_rows else self._own_place
        try:
            steps, loss = self.trainer.train_round(task.first_step, place, task.steps, _until(task, began, stop))
        except DivergenceError as error:
            self._anchor = {}  # what was not sent has diverged too: the next base is taken over whole
            raise DivergenceError(error.reason, "this share is left out; the next one begins from its base.") from error
        if not self.shares_rows:
            self._own_place = self.trainer.state.place
        if not steps:
            raise DataError(f"a share of round {task.round} must have a step at least, got none: it is left out.")
        tokens = steps * self.plan.tokens_per_step
        self.trainer.tell({"loss": loss, "round": task.round, "round_steps": steps})
        payload = self.feedback.encode(self._update(task, tokens, loss), self.plan.bits)
        self._sent = task.fragment
        return payload

    def _update(self, task: Task, tokens: int, loss: float) -> Update:
        names = self._fragments[task.fragment]
        tensors = {name: self._anchor[name] - self._tensors[name].detach().to("cpu", torch.float32) for name in names}
        source = Source(_public_name(self.run.config.corpus.data), self.licence, tokens)
        return Update(tensors, task.round, task.base, self.name, tokens, loss, (source,))

    @torch.no_grad()
    def _take_over(self, base: Mapping[str, Tensor]) -> None:
        """Let the model be the base, but for tensors that the host has not moved since and that were not sent.

        With a single fragment that is everything. With several, the others stay as the own training left them, until
        their turn comes; where rounds were missed, the host has moved them, and they are the host's.
        """
        sent = set(self._fragments[self._sent]) if self._sent >= 0 else set(base)
        for name, tensor in base.items():
            known = self._anchor.get(name)
            if name in sent or known is None or not torch.equal(known, tensor):
                self._tensors[name].copy_(tensor)
                self._anchor[name] = tensor.clone()

    def save(self) -> Path:
        """Write a checkpoint of all that the next round needs and return its folder.

        Raises:
            CheckpointError, OSError: if the disk has no room, or refuses.
        """
        return self.trainer.save()

    def _write(self, folder: Path) -> None:
        anchor = {_ANCHOR + name: tensor for name, tensor in self._anchor.items()}
        lost = {_LOST + name: tensor for name, tensor in self.feedback.state().items()}
        save_file(anchor | lost, folder / KEPT_FILE)
        replace_json(folder / MEMBER_FILE, {"own_place": self._own_place, "sent": self._sent})

    def _read(self, checkpoint: Path) -> None:
        try:
            content = read_json(checkpoint / MEMBER_FILE)
            self._own_place, self._sent = int(content["own_place"]), int(content["sent"])
            tensors = load_file(checkpoint / KEPT_FILE)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise CheckpointError(
                f"{checkpoint.absolute()} is no checkpoint of a member ({type(error).__name__}): join in another "
                "folder."
            ) from error
        self._sent = self._sent if self._sent < len(self._fragments) else -1
        parts: dict[str, dict[str, Tensor]] = {_ANCHOR: {}, _LOST: {}}
        for key, tensor in tensors.items():
            kind, separator, name = key.partition("|")
            parts[kind + separator][name] = tensor
        self._anchor = parts[_ANCHOR]
        self.feedback.restore(parts[_LOST])


def _until(task: Task, began: float, stop: Callable[[int], bool]) -> Callable[[int], bool]:
    """Return what ends a share: when the next step, as long as the longest so far, would not be done in time."""
    last, longest = began, 0.0

    def is_over(steps: int) -> bool:
        nonlocal last, longest
        now = time.monotonic()
        longest, last = max(longest, now - last if steps else 0.0), now
        return stop(steps) or (task.seconds is not None and now - began + longest >= task.seconds)

    return is_over


def _beginning(name: str, rows: int) -> int:
    """Return where a member begins in data of its own: two with the same data are not to send the same update."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % rows


def _public_name(spec: str) -> str:
    """Return how data are called to others: in which folder of this machine they are is nobody's business."""
    name = spec if spec.startswith("hf:") else Path(spec).name
    return "".join(letter if letter.isprintable() else "?" for letter in name)[-200:] or "data"


@contextmanager
def joined(
    config: RunConfig,
    plan: Plan,
    name: str,
    listener: Listener = silent,
    build_model: ModelBuilder = build_fanformer,
    licence: str = "unknown",
) -> Iterator[Member]:
    """Open a member's run in its folder, a new one or the one that is there, and hold the folder meanwhile.

    Args:
        config: of the member, as `member_config` returns it.
        plan: of the run in rounds.
        name: of the member.
        listener: hears what happens.
        build_model: makes the model.
        licence: of the data.

    Raises:
        ConfigError, DataError, CheckpointError: as `fanformer.training.run.train`, and as Member.
    """
    with opened(config, listener, build_model) as run:
        yield Member(run, plan, name, licence)
