"""One training run from its configuration to a finished model folder."""

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import GenerationConfig, PreTrainedModel, TrainerCallback, set_seed

from fanformer.data.documents import is_prepared_folder, open_source
from fanformer.data.packing import PackedRows
from fanformer.data.shards import PreparedData, open_prepared, prepare
from fanformer.data.tokenizer import load_tokenizer
from fanformer.errors import ConfigError
from fanformer.evaluation.loss import HeldOutLoss, held_out_loss
from fanformer.inference.devices import resolve_device
from fanformer.inference.generation import encode_prompt, generate
from fanformer.inference.loading import load_config, load_model
from fanformer.inference.settings import GenerationSettings
from fanformer.model import FANformerConfig, FANformerForCausalLM
from fanformer.training import artifacts
from fanformer.training.configuration import RunConfig
from fanformer.training.environment import Environment, decide
from fanformer.training.folder import checkpoints, claim
from fanformer.training.schedule import RunLength, run_length
from fanformer.training.trainer import FANformerTrainer

_VOCABULARY_MULTIPLE = 64
_SAMPLE_LENGTH = 40


class Reporter(Protocol):
    """Where a run tells what it does; the command line draws it, tests collect it."""

    def note(self, text: str) -> None:
        """Tell one line."""

    def data_progress(self, done: int, total: int | None) -> None:
        """Tell how many bytes of the data are read."""

    def record(self, record: Mapping[str, float], progress: float) -> None:
        """Tell one step's figures."""

    def step(self, step: int, tokens: int, elapsed_seconds: float, progress: float) -> None:
        """Tell that a step ended."""

    def sample(self, prompt: str, text: str) -> None:
        """Tell what the model writes at this point."""


@dataclass(frozen=True)
class RunResult:
    """A finished run.

    Attributes:
        folder: the run's folder, now also a complete `transformers` folder.
        held_out: the loss on all held-out data.
        gzip_bits_per_byte: what gzip -9 makes of the same bytes, where measured.
        xz_bits_per_byte: what xz -9 makes of the same bytes, where measured.
        reached_end: False where a time limit ended the run before its steps were done.
    """

    folder: Path
    held_out: HeldOutLoss
    gzip_bits_per_byte: float | None
    xz_bits_per_byte: float | None
    reached_end: bool


ModelBuilder = Callable[[dict[str, Any]], PreTrainedModel]
"""Makes a model from the fields of `RunConfig.model`, its vocabulary and special tokens filled in."""


def build_fanformer(fields: dict[str, Any]) -> PreTrainedModel:
    """Return a FANformer with fresh weights."""
    return FANformerForCausalLM(FANformerConfig(**fields))


def train(config: RunConfig, reporter: Reporter, build_model: ModelBuilder = build_fanformer) -> RunResult:
    """Train as `config` says and leave a complete folder behind.

    Args:
        config: the run.
        reporter: where the run tells what it does.
        build_model: makes the model; another architecture trains on the same rows in the same order.

    Raises:
        ConfigError, DataError, CheckpointError: on bad input, before anything is written that would stay.
    """
    made = claim(config)
    try:
        run = Run(config, reporter, build_model)
    except BaseException:
        if not config.resume and not checkpoints(config.folder):
            _clean(config.folder, made)
        raise
    return run.train()


def _clean(folder: Path, made: bool) -> None:
    """Leave the folder as it was found: gone, or empty."""
    if made:
        shutil.rmtree(folder, ignore_errors=True)
        return
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


class Run:
    """Everything one run is made of; building it reads the data, builds the model and decides about the machine."""

    def __init__(self, config: RunConfig, reporter: Reporter, build_model: ModelBuilder):
        self.config, self.reporter, self.folder = config, reporter, config.folder
        self.build_model = build_model
        self._check_before_reading()
        self.checkpoint = self._last_checkpoint()
        self.data = self._open_data()
        self.tokenizer = self.data.tokenizer()
        self.held_out = self._open_held_out()
        self.rows = PackedRows(self.data.split("train"), config.sequence_length)
        self.length: RunLength = run_length(config, len(self.rows))
        set_seed(config.seed)
        self.model = self._build_model()
        self.model.generation_config = self._generation_config()
        self.environment = self._decide()
        self.latest: dict[str, float] = {"step": 0, "tokens": 0}
        self.final: HeldOutLoss | None = None
        self.content = self._describe()
        if self.checkpoint is None:
            artifacts.write_run_file(self.folder, self.content)

    def _check_before_reading(self) -> None:
        """Refuse what is wrong whatever the data hold, before time is spent on them."""
        resolve_device(self.config.device)
        if self.config.init_from is not None:
            load_config(self.config.init_from)
        else:
            FANformerConfig(**self.config.model)

    def _last_checkpoint(self) -> Path | None:
        if not self.config.resume:
            return None
        complete = checkpoints(self.folder)
        if not complete:
            self.reporter.note(f"no complete checkpoint in {self.folder}: starting at step 0")
            artifacts.forget_records_after(self.folder, -1)
            return None
        step = int(complete[-1].name.removeprefix("checkpoint-"))
        artifacts.forget_records_after(self.folder, step)
        self.reporter.note(f"resuming from {complete[-1]}")
        return complete[-1]

    def _open_data(self) -> PreparedData:
        config, here = self.config, self.folder / "data"
        if is_prepared_folder(str(here)):
            return open_prepared(here)
        if is_prepared_folder(config.data):
            if config.tokenizer is not None:
                raise ConfigError(f"`tokenizer` does not apply to the prepared data {config.data}: it has its own.")
            return open_prepared(Path(config.data))
        source = open_source(config.data)
        tokenizer = load_tokenizer(config.tokenizer) if config.tokenizer is not None else None
        size = config.vocab_size or FANformerConfig(**config.model).vocab_size
        return prepare(
            source,
            here,
            tokenizer=tokenizer,
            vocab_size=size,
            held_out_fraction=config.held_out_fraction,
            max_bytes=config.max_data_bytes,
            progress=self.reporter.data_progress,
        )

    def _open_held_out(self) -> Any:
        config, here = self.config, self.folder / "held-out"
        if config.eval_data is None:
            return self.data.split("heldout")
        if not is_prepared_folder(str(here)):
            prepare(
                open_source(config.eval_data),
                here,
                tokenizer=self.tokenizer,
                vocab_size=len(self.tokenizer),
                held_out_fraction=0.0,
                progress=self.reporter.data_progress,
            )
        return open_prepared(here).split("train")

    def _build_model(self) -> PreTrainedModel:
        config, tokens = self.config, len(self.tokenizer)
        if config.init_from is not None:
            model = load_model(config.init_from, device="cpu", dtype="float32")
            if model.config.vocab_size < tokens:
                raise ConfigError(
                    f"the tokenizer has {tokens} tokens, but the weights of {config.init_from} only "
                    f"{model.config.vocab_size}: pass its own tokenizer with --tokenizer {config.init_from}."
                )
            return model
        planned, fields = FANformerConfig(**config.model), dict(config.model)
        fitting = -(-tokens // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE
        if fitting != planned.vocab_size:
            self.reporter.note(
                f"vocabulary: {tokens} tokens, so vocab_size is {fitting} instead of {planned.vocab_size}"
            )
        fields["vocab_size"] = fitting
        fields["max_position_embeddings"] = max(planned.max_position_embeddings, config.sequence_length)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            fields.setdefault(name, getattr(self.tokenizer, name))
        return self.build_model(fields)

    def _generation_config(self) -> GenerationConfig:
        """Return the defaults of `generate`; ids that pad the vocabulary are never drawn."""
        unknown = list(range(len(self.tokenizer), self.model.config.vocab_size))
        drawing = GenerationSettings()
        return GenerationConfig(
            bos_token_id=self.tokenizer.bos_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.eos_token_id,
            suppress_tokens=unknown or None,
            do_sample=True,
            max_new_tokens=drawing.max_length,
            temperature=drawing.temperature,
            top_k=drawing.top_k,
            top_p=drawing.top_p,
        )

    def _decide(self) -> Environment:
        if self.checkpoint is not None:
            kept = artifacts.read_run_file(self.folder)["environment"]
            environment = Environment(**kept)
            torch.set_num_threads(environment.threads)
            return environment
        parameters = self.model.num_parameters() - self.model.get_input_embeddings().weight.numel()
        steps = self.length.max_steps
        operations = None
        if steps is not None:
            operations = 6.0 * parameters * steps * self.config.batch_size * self.config.sequence_length
        return decide(self.config, operations, self.length.max_seconds)

    def _describe(self) -> dict[str, Any]:
        return {
            "configuration": self.config.to_dict(),
            "model": self.model.config.to_diff_dict(),
            "parameters": self.model.num_parameters(),
            "length": dataclasses.asdict(self.length),
            "data": {
                "fingerprint": self.data.fingerprint,
                "rows": len(self.rows),
                "fraction_used": self.rows.fraction_used,
                "metadata": self.data.metadata,
            },
            "environment": self.environment.to_dict(),
            "versions": artifacts.versions(),
        }

    def train(self) -> RunResult:
        """Train to the end and write the finished folder."""
        reasons = self.environment.reasons
        self.reporter.note(
            f"{self.model.num_parameters():,} parameters, {len(self.rows):,} rows of {self.config.sequence_length} "
            f"tokens ({self.rows.fraction_used:.2%} of all tokens used)"
        )
        self.reporter.note(
            f"{self.environment.device}, {self.environment.precision} ({reasons['precision']}), "
            f"compile {'on' if self.environment.compile else 'off'} ({reasons['compile']})"
        )
        if self.environment.compile:
            # The number of threads is fixed in the compiled code, but only part of its cache's key where it is given.
            options = {"cpp.threads": self.environment.threads} if self.environment.device == "cpu" else None
            for layer in self.model.model.layers:
                layer.compile(fullgraph=True, options=options)
        trainer = FANformerTrainer(
            self.model,
            self.tokenizer,
            self.rows,
            config=self.config,
            length=self.length,
            environment=self.environment,
            evaluate_held_out=self._evaluate,
            held_out_tokens=len(self.held_out.tokens),
            on_record=self._on_record,
            on_checkpoint=self._complete,
            callbacks=[RunReport(self)],
        )
        self.clock = trainer.clock
        trainer.run(self.checkpoint)
        return self._finish(trainer.state.global_step)

    def _evaluate(self, everything: bool) -> HeldOutLoss:
        figures = held_out_loss(
            self.model,
            self.held_out,
            self.config.sequence_length,
            self.config.micro_batch_size or self.config.batch_size,
            max_tokens=None if everything else self.config.eval_tokens,
            autocast_dtype=torch.bfloat16 if self.environment.precision == "bfloat16" else None,
        )
        if everything:
            self.final = figures
        return figures

    def _on_record(self, record: Mapping[str, float]) -> None:
        self.latest |= record
        artifacts.append_record(self.folder, record)
        self.reporter.record(record, self.clock.progress(record["step"]))
        if "val_loss" in record:
            self._write_sample()

    def _write_sample(self) -> None:
        """Continue the sample prompt with the model as it is now."""
        prompt = self.config.sample_prompt or ""
        room = self.model.config.max_position_embeddings - len(encode_prompt(self.tokenizer, prompt))
        settings = GenerationSettings(max_length=max(1, min(_SAMPLE_LENGTH, room)), seed=self.config.seed)
        self.model.eval()
        with torch.compiler.set_stance("force_eager"):
            completion = generate(self.model, self.tokenizer, [prompt], settings)[0]
        self.model.train()
        self.reporter.sample(prompt, completion.text)

    def _complete(self, folder: Path, finished: bool = False) -> None:
        """Add to saved weights and tokenizer what makes a model folder whole."""
        card = artifacts.model_card(self.content, self.latest, self.data.metadata["splits"]["heldout"], finished)
        artifacts.write_text(folder / "README.md", card)

    def _finish(self, steps: int) -> RunResult:
        reached_end = self.length.max_steps is None or steps >= self.length.max_steps
        if self.final is None:  # resumed after its last step: nothing was left to train
            self._evaluate(True)
        self.model.save_pretrained(self.folder)
        self.tokenizer.save_pretrained(self.folder)
        self._complete(self.folder, finished=reached_end)
        artifacts.plot_loss(self.folder, f"FANformer {self.config.preset}, {self.model.num_parameters():,} parameters")
        if self.config.push_to_hub is not None:
            artifacts.push(self.folder, self.config.push_to_hub)
        sizes = self.data.metadata["splits"]["heldout"] if self.config.eval_data is None else {}
        bits = {
            name: 8 * sizes[name] / sizes["bytes"] if sizes.get(name) else None for name in ("gzip_bytes", "xz_bytes")
        }
        assert self.final is not None
        return RunResult(self.folder, self.final, bits["gzip_bytes"], bits["xz_bytes"], reached_end)


class RunReport(TrainerCallback):
    """Passes steps on to the reporter."""

    def __init__(self, run: Run):
        self.run = run

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Tell the reporter that a step ended."""
        clock, config = self.run.clock, self.run.config
        tokens = state.global_step * config.batch_size * config.sequence_length
        self.run.reporter.step(state.global_step, tokens, clock.elapsed_seconds, clock.progress(state.global_step))
