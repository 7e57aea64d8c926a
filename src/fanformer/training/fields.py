"""The fields of a training run, in frozen groups of what is read together, each explained and checked.

This module imports neither torch nor transformers, so that `--help` stays fast.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin

from fanformer.errors import ConfigError, did_you_mean

LENGTHS = ("max_steps", "tokens", "epochs", "max_time")
"""Fields that say how long a run is; the last may stand beside one of the others, as a limit."""
_MOST = 10**15  # of anything that is counted: what is above is a slip of the finger, and too much for float64 below
_ABOVE_0 = ("above 0", lambda value: value > 0)
_FROM_1 = ("at least 1", lambda value: value >= 1)
_FROM_0 = ("at least 0", lambda value: value >= 0)
_SHARE = ("in [0, 1]", lambda value: 0 <= value <= 1)
_BELOW_1 = ("in [0, 1)", lambda value: 0 <= value < 1)


def _setting(default: Any, help_text: str, allowed: tuple[str, Callable[[Any], bool]] | None = None) -> Any:
    """Declare a field; `allowed` says in words and as a test which values it may have, None and its type aside."""
    return field(default=default, metadata={"help": help_text, "allowed": allowed})


@dataclass(frozen=True)
class _Fields:
    """Fields that are read together; making them checks the type and the range of each."""

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            _check_type(item.name, value, item.type)
            if isinstance(value, int | float):
                _check_number(item, value)


def _check_type(name: str, value: Any, hint: Any) -> None:
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise ConfigError(f"`{name}` must be one of {', '.join(get_args(hint))}, got {value!r}.")
        return
    allowed = tuple(get_origin(part) or part for part in (get_args(hint) if isinstance(hint, UnionType) else [hint]))
    if float in allowed:
        allowed += (int,)
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        expected = " or ".join("null" if kind is type(None) else kind.__name__ for kind in allowed)
        raise ConfigError(f"`{name}` must be {expected}, got {value!r}.")


def _check_number(item: Any, value: float) -> None:
    if not math.isfinite(value):
        raise ConfigError(f"`{item.name}` must be a finite number, got {value}.")
    if value > _MOST and not item.name.endswith(("_rate", "_norm", "_scale")):
        raise ConfigError(f"`{item.name}` must be a number of at most {_MOST:g}, got {value}.")
    words, holds = item.metadata["allowed"] or ("", bool)
    if words and not holds(value):
        raise ConfigError(f"`{item.name}` must be {words}, got {value}.")


@dataclass(frozen=True)
class CorpusConfig(_Fields):
    """What is trained and measured on, and in which tokens."""

    objective: Literal["text", "answers", "preferences", "multimodal"] = _setting(
        "text",
        "what is learnt: text as it stands, the assistant's part of conversations, which answer is better, or the "
        "assistant's part of conversations with pictures and recordings",
    )
    data: str = _setting("stdlib", "stdlib, file or glob of .txt/.jsonl/.parquet, hf:NAME[:CONFIG], or prepared folder")
    eval_data: str | None = _setting(None, "data to measure the held-out loss on; default: a held-out part of the data")
    held_out_fraction: float = _setting(
        0.05, "share of the documents that is held out", ("between 0 and 1", lambda value: 0 < value < 1)
    )
    max_data_bytes: int | None = _setting(None, "read documents only until they hold this many bytes", _ABOVE_0)
    tokenizer: str | None = _setting(None, "folder or hub name of a tokenizer; default: train one on the data")
    vocab_size: int | None = _setting(None, "size of the tokenizer to train; default: the preset's", _ABOVE_0)


@dataclass(frozen=True)
class TowersConfig(_Fields):
    """What sees and hears, and which of it learns; of objective multimodal only."""

    stage: Literal["auto", "align", "tune"] = _setting(
        "auto",
        "align: projectors learn, and towers that began fresh; tune: projectors and adapters; auto: tune where there "
        "are towers for all that is shown, else align",
    )
    vision_tower: str | None = _setting(None, "pretrained SigLIP, a folder or hub name; default: a fresh one")
    audio_tower: str | None = _setting(None, "pretrained Whisper, a folder or hub name; default: a fresh conformer")
    image_size: int = _setting(32, "pixels of a picture's side, for a fresh vision tower", _FROM_1)
    patch_size: int = _setting(4, "pixels of a patch's side, for a fresh vision tower", _FROM_1)
    tower_width: int = _setting(128, "channels of a fresh tower, a multiple of 4 heads", _FROM_1)
    tower_layers: int = _setting(4, "layers of a fresh tower", _FROM_1)
    audio_token_ms: int = _setting(
        80,
        "milliseconds of sound in a token, 20, 40, 80 or 160",
        ("20, 40, 80 or 160", lambda ms: ms in (20, 40, 80, 160)),
    )
    adapter_rank: int = _setting(16, "rank of the adapters of each modality, in stage tune", _FROM_1)
    blind: bool = _setting(False, "train a twin whose towers are given ones in place of pictures and recordings")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tower_width % 8:
            raise ConfigError(
                f"`tower_width` must be a multiple of 8, got {self.tower_width}: it is split among 4 heads."
            )
        if self.image_size % (2 * self.patch_size):
            raise ConfigError(
                f"`image_size` must be a multiple of twice `patch_size`, got {self.image_size} and {self.patch_size}: "
                "a token is 2 x 2 patches."
            )


@dataclass(frozen=True)
class OutputConfig(_Fields):
    """The folder of the run, what is to become of a run that it holds, and where its model is sent."""

    output_dir: str | None = _setting(None, "folder of the run; default runs/PRESET")
    resume: bool = _setting(False, "go on from the last good checkpoint of the output folder")
    overwrite: bool = _setting(False, "delete the run that the output folder holds")
    allow_changed_data: bool = _setting(False, "resume on other data or another tokenizer than the run began with")
    push_to_hub: str | None = _setting(None, "hub repository that receives the finished folder")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.resume and self.overwrite:
            raise ConfigError("`resume` and `overwrite` exclude each other: one goes on with the run, one deletes it.")


@dataclass(frozen=True)
class SavingConfig(_Fields):
    """When checkpoints are written, and which of them are kept."""

    save_steps: int | None = _setting(None, "steps between checkpoints; default: a fifth of the run", _ABOVE_0)
    keep_last: int = _setting(2, "checkpoints to keep", _FROM_1)
    keep_best: bool = _setting(True, "also keep the checkpoint with the lowest held-out loss")
    background_save: bool = _setting(True, "write checkpoints while training goes on")


@dataclass(frozen=True)
class LengthConfig(_Fields):
    """When the run ends; one epoch where nothing is set."""

    max_steps: int | None = _setting(None, "optimizer steps to train", _ABOVE_0)
    tokens: int | None = _setting(None, "tokens to train on, as 500000, 3M or 2B", _ABOVE_0)
    epochs: float | None = _setting(None, "passes over the data to train", _ABOVE_0)
    max_time: float | None = _setting(
        None,
        "wall-clock limit, as 90s, 5m or 2h30m: of this command where another field sets the length of the run, else "
        "it is the length of the run",
        _ABOVE_0,
    )
    grace_seconds: float = _setting(60.0, "longest time from a signal to stop to the end of the process", _ABOVE_0)

    def __post_init__(self) -> None:
        super().__post_init__()
        lengths = [name for name in LENGTHS[:3] if getattr(self, name) is not None]
        if len(lengths) > 1:
            raise ConfigError(f"the length of a run is set once, got {' and '.join(lengths)}: keep one of them.")


@dataclass(frozen=True)
class BatchConfig(_Fields):
    """The rows of an optimizer step."""

    sequence_length: int = _setting(1024, "tokens per row", _FROM_1)
    batch_size: int = _setting(16, "rows per optimizer step, over all processes", _FROM_1)
    micro_batch_size: int | None = _setting(None, "rows per pass and process; default: the whole batch", _ABOVE_0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ConfigError(
                "`batch_size` must be a multiple of `micro_batch_size`, got "
                f"{self.batch_size} and {self.micro_batch_size}."
            )

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step, over all processes."""
        return self.batch_size * self.sequence_length

    def rows_per_pass(self, processes: int) -> int:
        """Return the rows of a forward pass in each of so many processes."""
        return self.micro_batch_size or self.batch_size // processes


@dataclass(frozen=True)
class OptimizerConfig(_Fields):
    """The optimizer and its rates at their peak."""

    optimizer: Literal["adamw", "muon"] = _setting(
        "adamw", "muon orthogonalises the updates of the blocks' matrices; adamw does the rest"
    )
    learning_rate: float = _setting(3e-3, "peak learning rate of AdamW", _ABOVE_0)
    muon_scaling: Literal["adamw", "spectral"] = _setting(
        "adamw",
        "size of Muon's updates of a matrix, m outputs by n inputs: AdamW's, 0.2 sqrt(max(m, n)), or spectral, "
        "sqrt(m / n)",
    )
    muon_learning_rate_scale: float = _setting(1.0, "Muon's learning rate over AdamW's", _ABOVE_0)
    muon_factor_scale: float = _setting(
        1.0, "the rate of a low-rank layer's two factors over Muon's; their product moves by both", _ABOVE_0
    )
    embedding_learning_rate_scale: float = _setting(
        1.0, "the embedding's learning rate over the head's; 1 where they are tied", _ABOVE_0
    )
    core_learning_rate_scale: float | None = _setting(
        None, "the rate of a recurrent depth's core over the other blocks'; default: 1", _ABOVE_0
    )
    weight_decay: float = _setting(0.1, "decoupled weight decay of matrices", _FROM_0)
    beta1: float = _setting(0.9, "AdamW's decay of the gradient average", _BELOW_1)
    beta2: float = _setting(0.95, "AdamW's decay of the squared-gradient average", _BELOW_1)
    muon_momentum: float = _setting(0.95, "Muon's momentum", _BELOW_1)
    max_grad_norm: float = _setting(1.0, "gradient norm above which gradients are scaled down; 0 is off", _FROM_0)


@dataclass(frozen=True)
class ScheduleConfig(_Fields):
    """The learning rate over the run, as a share of its peak."""

    schedule: Literal["wsd", "cosine"] = _setting(
        "wsd", "learning rate over the run: warm-up, stable, decay, or a cosine"
    )
    warmup_fraction: float = _setting(0.05, "share of the run over which the learning rate rises from 0", _SHARE)
    decay_fraction: float = _setting(0.4, "share of the run over which wsd falls", _SHARE)
    min_learning_rate_ratio: float = _setting(0.0, "final learning rate over the peak", _SHARE)
    one_step_fraction: float | None = _setting(
        None,
        "share of the run in which a recurrent depth runs its core once; then the number of each optimizer step is "
        "drawn; default: 0.45, and 0 where the model to start from has such a depth already",
        _SHARE,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup_fraction + self.decay_fraction > 1:
            raise ConfigError(
                "`warmup_fraction` and `decay_fraction` must add up to at most 1, got "
                f"{self.warmup_fraction} and {self.decay_fraction}."
            )


@dataclass(frozen=True)
class DivergenceConfig(_Fields):
    """What a run does where its loss or its gradient breaks away."""

    max_skipped_steps: int = _setting(10, "steps in a row without a finite gradient after which the run ends", _FROM_1)
    spike_rollback: float | None = _setting(
        None,
        "standard deviations of the loss above its recent mean from which the run goes back to its last checkpoint",
        _ABOVE_0,
    )
    max_rollbacks: int = _setting(3, "how often a run goes back after a spike", _FROM_0)


@dataclass(frozen=True)
class EvaluationConfig(_Fields):
    """What is measured on the way, and how often."""

    eval_steps: int | None = _setting(None, "steps between held-out evaluations; default: a fifth of the run", _ABOVE_0)
    eval_tokens: int = _setting(65536, "held-out tokens per evaluation during training", _FROM_1)
    final_eval_tokens: int | None = _setting(None, "held-out tokens of the last evaluation; default: all", _ABOVE_0)
    log_steps: int | None = _setting(
        None, "steps between lines of metrics.jsonl; default: a hundredth of the run, at most 50", _ABOVE_0
    )
    sample_prompt: str | None = _setting(None, "prompt continued after each evaluation; default: an empty one")


@dataclass(frozen=True)
class MachineConfig(_Fields):
    """Where and how the run is computed."""

    device: Literal["auto", "cpu", "cuda", "mps"] = _setting("auto", "where to train")
    precision: Literal["auto", "float32", "bfloat16"] = _setting(
        "auto", "auto measures whether bfloat16 products are faster here"
    )
    compile: Literal["auto", "on", "off"] = _setting(
        "auto", "auto compiles where the planned run is long enough to pay for it"
    )
    attention: Literal["auto", "sdpa", "varlen", "flash_attention_2", "flash_attention_3", "flex_attention"] = _setting(
        "auto",
        "how packed rows are attended to; auto takes blocks of queries in compiled code on a CPU, flex_attention in "
        "compiled code on CUDA in bfloat16, else torch's SDPA; "
        "the others need CUDA and never multiply what belongs to two documents",
    )
    threads: int | None = _setting(None, "CPU threads; default: one a physical core", _ABOVE_0)
    recompute: Literal["none", "low-rank", "block"] = _setting(
        "none",
        "what the backward pass computes again instead of keeping it: nothing, all but the low-rank activations "
        "(CoLA-M), or whole blocks; the same bits for less memory and more time",
    )
    deterministic: bool = _setting(
        True, "on CUDA, take the operations that give the same bits again, which resuming bit for bit needs"
    )
    parallel: Literal["auto", "ddp", "fsdp2"] = _setting(
        "auto", "how several processes share a model; auto does what the launcher says, else ddp"
    )


@dataclass(frozen=True)
class RunConfig(_Fields):
    """Everything that decides a training run, in groups that are read together.

    People know the fields by flat names, which no two groups share: in `--set`, in YAML, and in run.yaml, which holds
    the resolved copy. `from_fields` and `to_dict` go between the two.
    """

    preset: str = _setting("nano", "model and recipe to start from, such as nano or 92m")
    model: Mapping[str, Any] = field(default_factory=dict, metadata={"help": "fields of the model configuration"})
    init_from: str | None = _setting(None, "folder of a saved model whose weights to start from")
    lora_rank: int | None = _setting(
        None, "rank of adapters that learn in place of the weights of `init_from`; default: the weights learn", _ABOVE_0
    )
    dpo_beta: float | None = _setting(
        None, "how strongly leaving the base counts where preferences are learnt; default: 0.1", _ABOVE_0
    )
    seed: int = _setting(
        0, "seed of initialisation, data order and dropout", ("in [0, 2**32)", lambda value: 0 <= value < 1 << 32)
    )
    corpus: CorpusConfig = CorpusConfig()
    towers: TowersConfig = TowersConfig()
    batch: BatchConfig = BatchConfig()
    length: LengthConfig = LengthConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    divergence: DivergenceConfig = DivergenceConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    saving: SavingConfig = SavingConfig()
    output: OutputConfig = OutputConfig()
    machine: MachineConfig = MachineConfig()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dpo_beta is not None and self.corpus.objective != "preferences":
            raise ConfigError(
                f"`dpo_beta` has no effect where the objective is {self.corpus.objective}, got {self.dpo_beta}: leave "
                "it out, or learn preferences."
            )

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> "RunConfig":
        """Return the run that these fields, by their flat names, say; others have their defaults.

        Raises:
            ConfigError: if a field is unknown (the nearest is offered), or has the wrong type or range.
        """
        for name in fields:
            run_field(name)
        own = {name: fields[name] for name in _OWN if name in fields}
        for group, kind in _GROUPS.items():
            own[group] = kind(**{name: fields[name] for name in kind.__dataclass_fields__ if name in fields})
        return cls(**own)

    def to_dict(self) -> dict[str, Any]:
        """Return all fields by their flat names, `model` as a plain dictionary."""
        own = {name: getattr(self, name) for name in _OWN} | {"model": dict(self.model)}
        return own | {name: value for group in _GROUPS for name, value in vars(getattr(self, group)).items()}

    def replace(self, **fields: Any) -> "RunConfig":
        """Return this run with some fields changed, by their flat names."""
        return self.from_fields(self.to_dict() | fields)

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return Path(self.output.output_dir or f"runs/{self.preset}")


_GROUPS: Mapping[str, Any] = {
    name: type(value) for name, value in vars(RunConfig()).items() if isinstance(value, _Fields)
}
_OWN = [name for name in RunConfig.__dataclass_fields__ if name not in _GROUPS]
FIELDS: Mapping[str, Any] = {name: RunConfig.__dataclass_fields__[name] for name in _OWN} | {
    name: item for kind in _GROUPS.values() for name, item in kind.__dataclass_fields__.items()
}
"""Every field of a run, a `dataclasses.Field`, by its flat name."""


def run_field(name: str) -> Any:
    """Return the field of a run that has this flat name, as FIELDS has it.

    Raises:
        ConfigError: if there is none; the message offers the nearest.
    """
    if name not in FIELDS:
        raise ConfigError(f"`{name}` is not a field of the run configuration: {did_you_mean(name, FIELDS)}")
    return FIELDS[name]
