"""One training run from its configuration to a finished model folder."""

import contextlib
import dataclasses
import importlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import set_seed

from fanformer.errors import CheckpointError, ConfigError
from fanformer.evaluation.loss import HeldOutLoss, Share
from fanformer.files.durable import replace_text
from fanformer.generation.settings import GenerationSettings
from fanformer.generation.torch_model import TorchModel
from fanformer.machine.compiling import compile_options, keep_compiled_code
from fanformer.machine.devices import resolve_device
from fanformer.machine.launch import launcher
from fanformer.machine.versions import versions
from fanformer.model import FANformerConfig
from fanformer.model.configuration_fanformer import translated
from fanformer.training.attention import choose_attention
from fanformer.training.checkpoint import ADAPTER_FOLDER, WEIGHTS_FILE, Fill, checkpoints, publish, step_of
from fanformer.training.corpus import Corpus, Opening, refuse_own_sources
from fanformer.training.environment import Environment, decide, use_deterministic_operations, what_sums_depend_on
from fanformer.training.events import Event, Listener, Record, Start, data_to, note_to, silent
from fanformer.training.fields import RunConfig
from fanformer.training.folder import (
    MACHINE_FIELDS,
    RecordFile,
    changed_fields,
    check_model,
    claimed,
    is_own_restart,
    read_records,
    read_run_file,
    refuse_rounds,
    write_run_file,
)
from fanformer.training.other_models import blocks, why_uncompiled
from fanformer.training.parallel import Processes
from fanformer.training.publishing import CARD_FILE, check_push_possible, model_card, plot_loss, push
from fanformer.training.run_model import (
    ModelBuilder,
    begun_with,
    build_fanformer,
    check_model_fields,
    folder_without_weights,
    law_of_depth,
    make_model,
)
from fanformer.training.schedule import RunLength, few_steps, run_length
from fanformer.training.trainer import Outcome, Trainer, agreed_checkpoint

if TYPE_CHECKING:
    from fanformer.evaluation.preferences import PreferenceFigures

AnyTrainer = TypeVar("AnyTrainer", bound=Trainer)
_SAMPLE_LENGTH = 40
_CORPORA = {
    "text": ("fanformer.training.corpus", "text_corpus"),
    "answers": ("fanformer.training.conversation_corpus", "answer_corpus"),
    "preferences": ("fanformer.training.preference_corpus", "preference_corpus"),
    "multimodal": ("fanformer.training.multimodal_corpus", "multimodal_corpus"),
}
"""What opens the corpus of each `objective`, imported where it is wanted."""


def open_corpus(opening: Opening) -> Corpus:
    """Open what a run trains on, by its `objective`; raises as what opens it does."""
    module, maker = _CORPORA[opening.config.corpus.objective]
    opened: Corpus = getattr(importlib.import_module(module), maker)(opening)
    return opened


@dataclass(frozen=True)
class _Evaluated:
    """What was measured, and what the model wrote then."""

    loss: float
    tokens: int
    figures: Record

    def record(self) -> Record:
        """Return what metrics.jsonl holds of it."""
        return self.figures


@dataclass(frozen=True)
class RunResult:
    """A run that ended.

    Attributes:
        folder: the run's folder, now also a complete `transformers` folder.
        step: optimizer steps done.
        held_out: the last held-out loss, that of pairs where preferences were learnt; on all held-out data where the
            run reached its end.
        gzip_bits_per_byte, xz_bits_per_byte: what `-9` of both makes of all held-out bytes, where measured.
        reached_end: False where a time limit or a signal ended the run before its steps were done.
        stopped_by: name of that signal, such as "SIGTERM", or None.
    """

    folder: Path
    step: int
    held_out: "HeldOutLoss | PreferenceFigures | None"
    gzip_bits_per_byte: float | None
    xz_bits_per_byte: float | None
    reached_end: bool
    stopped_by: str | None = None


def train(config: RunConfig, listener: Listener = silent, build_model: ModelBuilder = build_fanformer) -> RunResult:
    """Train as `config` says and leave a complete folder behind.

    In every process that a launcher starts; the first one writes files and reports.

    Args:
        config: the run.
        listener: hears what the run does.
        build_model: makes the model; another architecture trains on the same rows in the same order.

    Raises:
        ConfigError, DataError, CheckpointError: on bad input, before anything is written that would stay.
        DivergenceError: if the loss or the gradients do not stay finite.
    """
    refuse_rounds(config)
    with opened(config, listener, build_model) as run:
        return run.train()


@contextlib.contextmanager
def opened(
    config: RunConfig, listener: Listener = silent, build_model: ModelBuilder = build_fanformer
) -> Iterator["Run"]:
    """Open a run, a new one or the one that its folder holds, and hold the folder while the block runs.

    Args and errors are those of `train`.
    """
    started = time.monotonic()
    processes = Processes(config.machine.parallel, resolve_device(config.machine.device).type)
    _check_batch(config, processes.count)
    if processes.count > 1 and (config.lora_rank is not None or config.corpus.objective == "multimodal"):
        what = "`--multimodal`" if config.lora_rank is None else "`lora_rank`"
        raise ConfigError(f"{what} needs a single process, got {processes.count}: start one, or leave it out.")
    try:
        with contextlib.ExitStack() as stack:
            going_on = False
            if processes.is_main:
                if config.output.push_to_hub is not None:
                    check_push_possible(config.output.push_to_hub)
                if config.output.overwrite:
                    refuse_own_sources(config)
                going_on_here = config.output.resume or is_own_restart(config.folder)
                claim = claimed(config.folder, going_on_here, config.output.overwrite, note_to(listener))
                going_on = stack.enter_context(claim)
            going_on = bool(processes.exchange([float(going_on)])[0][0])
            yield Run(config, listener, build_model, processes, going_on, started)
    finally:
        processes.leave()


def _in_todays_words(model: dict[str, Any]) -> dict[str, Any]:
    """Return `model` of a run.yaml as it would be written now."""
    return model if translated(model) == model else FANformerConfig(**model).to_diff_dict()


def _check_batch(config: RunConfig, count: int) -> None:
    batch_size, together = config.batch.batch_size, (config.batch.micro_batch_size or 1) * count
    if batch_size % together:
        raise ConfigError(
            f"`batch_size` must be a multiple of the processes times `micro_batch_size`, got {batch_size} for "
            f"{count} processes of {config.batch.micro_batch_size or 1}: change one of them."
        )


class Run:
    """Everything one run is made of; building it reads the data, builds the model and decides about the machine."""

    def __init__(
        self,
        config: RunConfig,
        listener: Listener,
        build_model: ModelBuilder,
        processes: Processes,
        going_on: bool,
        started: float,
    ):
        """Set up.

        Args:
            config: the run.
            listener: hears what the run does.
            build_model: makes the model.
            processes: that train together.
            going_on: whether the folder holds a run that this one continues.
            started: when this process began its work, on the clock of `time.monotonic`.
        """
        self.config, self.folder = config, config.folder
        self.listener = listener if processes.is_main else silent
        self._note = note_to(self.listener)
        self.processes, self.started = processes, started
        self._compiling_since: float | None = None
        self.before = read_run_file(self.folder) if going_on else None
        if self.before is None or config.init_from is None:
            check_model_fields(config)
        self.changed = changed_fields(self.before["configuration"], config) if self.before is not None else {}
        with processes.main_first():
            self.corpus = self._open_corpus()
        self.length: RunLength = run_length(config, len(self.corpus.rows))
        if config.machine.deterministic and resolve_device(config.machine.device).type == "cuda":
            use_deterministic_operations()
        set_seed(config.seed)
        self.model = make_model(config, self.corpus, build_model, self.before, self._note)
        self.depth_law = law_of_depth(self.model, config, self.before)
        if self.before is not None:
            check_model(_in_todays_words(self.before["model"]), self.model.config.to_diff_dict(), self.folder)
        saved_with = self.corpus.processor or self.corpus.tokenizer
        self.skeleton = folder_without_weights(self.model, saved_with) if processes.is_main else {}
        self.environment = self._decide()
        self.environment.apply()
        self.checkpoint = self._last_checkpoint(going_on or config.output.resume)
        self.latest: dict[str, Any] = {"step": 0, "tokens": 0}
        self.measured: HeldOutLoss | PreferenceFigures | None = None
        self.content = self._describe()
        self.also_saved: list[Fill] = []
        """What else is written into every checkpoint."""
        if processes.is_main:
            write_run_file(self.folder, self.content)

    def _open_corpus(self) -> Corpus:
        progress = data_to(self.listener) if self.processes.is_main else None
        return open_corpus(Opening(self.config, self.before, self.changed, self._note, progress))

    def _last_checkpoint(self, resuming: bool) -> Path | None:
        """Return the checkpoint to go on from, the newest that is as it was written."""
        if not resuming:
            return None
        had_some = self.before is not None and bool(checkpoints(self.folder))
        self.processes.wait()  # the main process renames those that are damaged
        found = agreed_checkpoint(self.folder, self.processes, self._note)
        if self.processes.is_main:
            RecordFile(self.folder).forget_after(step_of(found) if found is not None else -1)
        self.processes.wait()  # the others read the records too
        if found is None:
            self._note(f"no complete checkpoint in {self.folder}: starting at step 0")
            if self.config.init_from is not None and had_some:  # which make_model left to be read, and are damaged
                set_seed(self.config.seed)  # what begins fresh is what it was
                self.model.load_state_dict(begun_with(self.config, self.corpus).state_dict())
        else:
            self._note(f"resuming from {found}")
        return found

    def _decide(self) -> Environment:
        """Decide about the machine, once for a run: a resumed one keeps what was decided unless told otherwise."""
        if self.before is not None and not any(name in MACHINE_FIELDS for name in self.changed):
            environment = Environment(**self.before["environment"])
            if self.before.get("processes", {}).get("count", 1) != self.processes.count:
                reasons = {**environment.reasons, "threads": f"torch's default in {self.processes.count} processes"}
                environment = dataclasses.replace(environment, threads=torch.get_num_threads(), reasons=reasons)
            self._check_device(environment.device)
            return environment
        parameters = self.model.num_parameters() - self.model.get_input_embeddings().weight.numel()
        steps = self.length.max_steps
        operations = None
        if steps is not None:
            operations = 6.0 * parameters * steps * self.config.batch.tokens_per_step
        with self.processes.main_first():
            environment = decide(self.config.machine, operations, self.length.max_seconds, why_uncompiled(self.model))
        if self.processes.count > 1:  # a measured rate may differ from process to process, a decision must not
            choices = [float(environment.precision == "bfloat16"), float(environment.compile)]
            first = self.processes.exchange(choices)[0]
            precision = "bfloat16" if first[0] else "float32"
            environment = dataclasses.replace(environment, precision=precision, compile=bool(first[1]))
        return environment

    def _check_device(self, device: str) -> None:
        """Refuse to go on where the device that the run was begun on is not there."""
        try:
            resolve_device(device)
        except ConfigError as error:
            raise CheckpointError(
                f"{self.folder} was begun on `{device}`, which is not there: go on where it is, or with --device cpu, "
                "which gives other bits."
            ) from error

    def _describe(self) -> dict[str, Any]:
        """Return the content of run.yaml."""
        content = {
            "configuration": self.config.to_dict(),
            "model": self.model.config.to_diff_dict(),
            "parameters": self.model.num_parameters(),
            "length": dataclasses.asdict(self.length),
            "data": dict(self.corpus.description),
            "environment": dataclasses.asdict(self.environment),
            "machine": what_sums_depend_on(),
            "processes": {"count": self.processes.count, "spread": self.processes.spread},
            "versions": versions(),
            "launcher": launcher(),
            "resumed": list(self.before.get("resumed", [])) if self.before is not None else [],
        }
        if self.depth_law is not None:
            content["recurrent_depth"] = self.depth_law.to_dict()
        if self.before is not None:
            changes = {name: f"{old} -> {new}" for name, (old, new) in self.changed.items()}
            for name in ("processes", "versions", "length", "machine"):
                if name in self.before and self.before[name] != content[name]:
                    changes[name] = f"{self.before.get(name)} -> {content[name]}"
            if self.before["data"]["fingerprint"] != self.corpus.fingerprint:
                changes["data.fingerprint"] = f"{self.before['data']['fingerprint']} -> {self.corpus.fingerprint}"
            if changes:
                self._note(f"changed since the run began: {', '.join(changes)}")
            content["resumed"].append(
                {
                    "at_step": step_of(self.checkpoint) if self.checkpoint is not None else 0,
                    "date": datetime.now(UTC).isoformat(timespec="seconds"),
                    "changes": changes,
                }
            )
        return content

    def train(self) -> RunResult:
        """Train to the end and write the finished folder."""
        return self._finish(self.trainer(Trainer).run(self.checkpoint))

    def trainer(self, kind: type[AnyTrainer]) -> AnyTrainer:
        """Make everything ready and return the loop, which is to be called once.

        Args:
            kind: Trainer, or what goes another way through the steps.
        """
        reasons = self.environment.reasons
        self._note(
            f"{self.model.num_parameters():,} parameters, {len(self.corpus.rows):,} rows of "
            f"{self.config.batch.sequence_length} tokens ({self.corpus.used}){few_steps(self.config, self.length)}"
        )
        shared = f", {self.processes.count} processes ({self.processes.spread})" if self.processes.count > 1 else ""
        self._note(
            f"{self.environment.device}{shared}, {self.environment.precision} ({reasons['precision']}), "
            f"compile {'on' if self.environment.compile else 'off'} ({reasons['compile']})"
        )
        if self.depth_law is not None:
            self._note(self.depth_law.in_words())
        machine, asked, measured = self.environment, self.config.machine, self.config.evaluation
        self.corpus.prepare(self._start())
        if self.config.lora_rank is not None:
            self._add_adapter(self.config.lora_rank)
        options = compile_options(machine.device, machine.threads)
        self.corpus.loss.install(self.model, {"options": options} if machine.compile else None)
        if asked.recompute != "none":
            from fanformer.training.recompute import set_recompute

            set_recompute(self.model, asked.recompute)
        why = choose_attention(self.model, asked.attention, machine.device, machine.precision, machine.compile)
        self._note(f"attention {asked.attention} ({why})")
        if machine.compile:
            kept = keep_compiled_code(machine.threads)
            where = "" if kept is None else f"; a next run finds the code in {kept}"
            self._note(f"compiling: the first step takes up to a minute or two{where}")
            for layer in blocks(self.model):
                layer.compile(fullgraph=True, options=options)
            self._compiling_since = time.monotonic()
            self.listener(Event("wait", "compiling"))
        return kind(
            self.model,
            self.corpus.rows,
            config=self.config,
            length=self.length,
            environment=self.environment,
            processes=self.processes,
            listener=self._hear,
            evaluate=self.evaluate,
            save_model=self.save_model,
            held_out_tokens=min(self.corpus.held_out_tokens, measured.final_eval_tokens or self.corpus.held_out_tokens),
            started=self.started,
            loss=self.corpus.loss,
            depth_law=self.depth_law,
        )

    def _add_adapter(self, rank: int) -> None:
        from fanformer.training.adapters import add_adapter

        add_adapter(self.model, rank, self.corpus.new_ids, self.config.seed)
        learning = sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)
        self._note(f"adapters of rank {rank}: {learning:,} parameters learn")

    def _start(self) -> Start:
        return Start(
            device=self.environment.device,
            autocast_dtype=self._autocast_dtype,
            batch_size=self.config.batch.rows_per_pass(self.processes.count),
            share=self._share,
            going_on=self.checkpoint is not None,
            wait=self.processes.wait,
            note=self._note,
        )

    @property
    def _autocast_dtype(self) -> torch.dtype | None:
        return torch.bfloat16 if self.environment.precision == "bfloat16" else None

    @property
    def _share(self) -> Share:
        return Share(self.processes.rank, self.processes.count, self.processes.sum)

    def evaluate(self, everything: bool, between_batches: Callable[[], None], most_tokens: int | None) -> _Evaluated:
        """Measure the held-out loss, on all that there is time for or a sample, and write a little if it is finite."""
        asked = self.config.evaluation
        tokens = asked.final_eval_tokens if everything else asked.eval_tokens
        figures = self.corpus.measure(
            self.model,
            self.config.batch.rows_per_pass(self.processes.count),
            max_tokens=min(filter(None, (tokens, most_tokens)), default=None),
            autocast_dtype=self._autocast_dtype,
            share=self._share,
            between_batches=between_batches,
        )
        self.measured = figures
        writes = self.processes.is_main or self.processes.spread == "fsdp2"  # a sharded model writes in all processes
        written = self.corpus.sample_prompt + self._sample() if writes and math.isfinite(figures.loss) else ""
        return _Evaluated(figures.loss, figures.tokens, {**figures.record(), "sample": written})

    def _sample(self) -> str:
        """Continue the sample prompt with the model as it is now."""
        writer = TorchModel(self.model, self.corpus.tokenizer, join=False)
        room = self.model.config.max_position_embeddings - self.corpus.sample_tokens
        settings = GenerationSettings(max_length=max(1, min(_SAMPLE_LENGTH, room)), seed=self.config.seed)
        self.model.eval()
        with torch.compiler.set_stance("force_eager"):
            text = self.corpus.continue_sample(writer, settings)
        self.model.train()
        return text

    def _hear(self, event: Event) -> None:
        """Pass on what the loop tells, beside it how long compiling took, and what the model writes."""
        if event.kind == "step" and self._compiling_since is not None:
            self._note(f"compiled: the first step took {time.monotonic() - self._compiling_since:.0f} s")
            self._compiling_since = None
        self.listener(event)
        if event.kind == "record":
            self.latest |= event.figures
            if "sample" in event.figures:
                self.listener(Event("sample", event.figures["sample"], event.share))

    def save_model(self, weights: dict[str, Tensor], step: int) -> Fill:
        """Return what writes the model's part of a checkpoint."""
        figures = {**self.latest, "step": step, "tokens": step * self.config.batch.tokens_per_step}

        def fill(folder: Path) -> None:
            for name, content in self.skeleton.items():
                (folder / name).write_bytes(content)
            save_file(self._plain(weights, folder), folder / WEIGHTS_FILE, metadata={"format": "pt"})
            self._write_card(folder, figures, finished=False)
            for write in self.also_saved:
                write(folder)

        return fill

    def _plain(self, weights: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
        """Return weights without adapters, which are written into a folder of their own where there are some."""
        if self.config.lora_rank is None:
            return weights
        from fanformer.training.adapters import merged, save_adapter

        save_adapter(self.model, weights, str(self.config.init_from), folder / ADAPTER_FOLDER)
        for name, content in self.skeleton.items():
            if name.startswith(("tokenizer", "chat_template")):
                (folder / ADAPTER_FOLDER / name).write_bytes(content)
        return merged(self.model, weights)

    def _write_card(self, folder: Path, figures: Mapping[str, Any], finished: bool) -> None:
        card = model_card(self.content, figures, self.corpus.held_out_sizes, finished)
        replace_text(folder / CARD_FILE, card)

    def _finish(self, outcome: Outcome) -> RunResult:
        """Put the last checkpoint's model into the run's folder, with the figures and the curve of the whole run."""
        if self.processes.is_main:
            publish(outcome.checkpoint, self.folder)
            for record in read_records(self.folder):
                self.latest |= record
            self.latest |= {"step": outcome.step, "tokens": outcome.step * self.config.batch.tokens_per_step}
            self._write_card(self.folder, self.latest, finished=outcome.reached_end)
            plot_loss(self.folder, self.content)
            if self.config.output.push_to_hub is not None and outcome.reached_end:
                push(self.folder, self.config.output.push_to_hub)
        self.processes.wait()
        sizes = self.corpus.held_out_sizes
        gzip_bits, xz_bits = (
            8 * sizes[name] / sizes["bytes"] if sizes.get(name) else None for name in ("gzip_bytes", "xz_bytes")
        )
        return RunResult(
            self.folder, outcome.step, self.measured, gzip_bits, xz_bits, outcome.reached_end, outcome.stopped_by
        )
