"""What a run trains on: what it asks of any corpus, and text, prepared in its folder or elsewhere.

A run goes on with the very data it began with, or with a refusal. Whatever the data, the tokenizer is that of the
weights: those of the model that `init_from` names, or of the run's own checkpoints. Another one is taken only where
`tokenizer` asks for it.
"""

import glob
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from transformers import AutoConfig, AutoModelForCausalLM

from fanformer.data.packing import PackedRows
from fanformer.data.preparation.journal import OtherArgumentsError, partial_place
from fanformer.data.preparation.prepare import PreparedData, TokenStream, open_prepared, prepare, saved_tokenizer_files
from fanformer.data.sources.documents import DocumentSource, is_prepared_folder, open_source
from fanformer.data.tokenizer import load_tokenizer
from fanformer.errors import CheckpointError, ConfigError, DataError
from fanformer.evaluation.loss import HeldOutLoss, held_out_loss
from fanformer.generation.torch_model import encode_prompt
from fanformer.model import FANformerConfig
from fanformer.training.checkpoint import checkpoints
from fanformer.training.chunked_loss import TokenLoss
from fanformer.training.events import Loss, Rows, Start
from fanformer.training.fields import CorpusConfig, RunConfig
from fanformer.training.folder import DATA_FIELDS, DATA_FOLDER, HELD_OUT_FOLDER, check_data, fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fanformer.evaluation.preferences import PreferenceFigures
    from fanformer.generation.settings import GenerationSettings
    from fanformer.generation.torch_model import TorchModel

Row = TypeVar("Row")


def empty_causal_model(fields: Mapping[str, Any]) -> "PreTrainedModel":
    """Return a causal language model of a configuration's fields, `model_type` among them."""
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields))


@dataclass(frozen=True)
class Opening:
    """What a corpus is opened with.

    Attributes:
        config: the run.
        before: run.yaml of the run that goes on, None for a new one.
        changed: fields that differ from those it began with, each with its old and new value.
        note: is told one line.
        progress: is told bytes done and in all; None hears nothing.
    """

    config: RunConfig
    before: Mapping[str, Any] | None
    changed: Mapping[str, tuple[Any, Any]]
    note: Callable[[str], None]
    progress: Callable[[int, int | None], None] | None


@dataclass(frozen=True)
class Corpus:
    """What a run trains on and is measured on, whatever it is made of.

    Attributes:
        tokenizer: that the model is saved with.
        rows: what is learnt.
        description: `data` of run.yaml, a `fingerprint` among it.
        used: how much of the data the rows hold, in words.
        measure: the held-out loss; its arguments are those of `held_out_loss` but for stream and sequence length.
        held_out_tokens: tokens that it can be measured on.
        held_out_sizes: bytes of the held-out text, plain and compressed, where known.
        load_base: returns the model of `init_from` on the CPU in float32, ready for these rows.
        sample_prompt: what is shown in front of the text that the model writes now and then.
        sample_tokens: of the prompt.
        continue_sample: returns that text.
        loss: what a step learns.
        new_ids: tokens that the base does not know.
        prepare: is called once before the first step of the run or of what follows a checkpoint.
        processor: what is saved in the tokenizer's place, for a model with towers.
        empty_model: returns a model of the fields that run.yaml holds, whose weights come from a checkpoint.
    """

    tokenizer: "PreTrainedTokenizerBase"
    rows: Rows
    description: Mapping[str, Any]
    used: str
    measure: "Callable[..., HeldOutLoss | PreferenceFigures]"
    held_out_tokens: int
    held_out_sizes: Mapping[str, int]
    load_base: "Callable[[], PreTrainedModel]"
    sample_prompt: str
    sample_tokens: int
    continue_sample: "Callable[[TorchModel, GenerationSettings], str]"
    loss: Loss
    new_ids: tuple[int, ...] = ()
    prepare: Callable[[Start], None] = lambda start: None
    processor: Any = None
    empty_model: "Callable[[Mapping[str, Any]], PreTrainedModel]" = empty_causal_model

    @property
    def fingerprint(self) -> str:
        """A digest of the data: equal where they are."""
        return str(self.description["fingerprint"])


def text_corpus(opening: Opening) -> Corpus:
    """Open text: what `data` names, prepared where it is not yet.

    Raises:
        ConfigError, DataError, CheckpointError: as `begin_data`, `resume_data` and `held_out_stream`.
    """
    config, before = opening.config, opening.before
    if before is None:
        data = begin_data(config, opening.progress)
    else:
        data = resume_data(config, before["data"], opening.changed, opening.progress)
    tokenizer = data.tokenizer()
    held_out = held_out_stream(config, data, tokenizer, before, opening.progress)
    length, prompt = config.batch.sequence_length, config.evaluation.sample_prompt or ""
    rows = PackedRows(data.split("train"), length)
    inside = data.folder.is_relative_to(config.folder.absolute())

    def measure(model: "PreTrainedModel", batch_size: int, **options: Any) -> HeldOutLoss:
        return held_out_loss(model, held_out, length, batch_size, **options)

    def continue_sample(writer: "TorchModel", settings: "GenerationSettings") -> str:
        return next(writer.complete([prompt], settings)).text

    return Corpus(
        tokenizer=tokenizer,
        rows=rows,
        description={
            "fingerprint": data.fingerprint,
            "folder": str(data.folder.relative_to(config.folder.absolute()) if inside else data.folder),
            "rows": len(rows),
            "fraction_used": rows.fraction_used,
            "metadata": data.metadata,
        },
        used=f"{rows.fraction_used:.2%} of all tokens used",
        measure=measure,
        held_out_tokens=len(held_out.tokens),
        held_out_sizes=data.metadata["splits"]["heldout"] if config.corpus.eval_data is None else {},
        load_base=lambda: load_base(config),
        sample_prompt=prompt,
        sample_tokens=len(encode_prompt(tokenizer, prompt)),
        continue_sample=continue_sample,
        loss=TokenLoss(),
    )


def hold_out(rows: Sequence[Row], keys: Sequence[str], config: RunConfig, least: str) -> tuple[list[Row], list[Row]]:
    """Return the rows of `data` that are learnt and those that are measured, `held_out_fraction` of the different keys.

    Args:
        rows: all of them.
        keys: of each row, as random as hashes are; rows that share one are held out together or not at all.
        config: the run.
        least: what they must have for one to be held out, in words.

    Raises:
        DataError: if all share one key.
    """
    different = sorted(set(keys))
    if len(different) < 2:
        raise DataError(
            f"`data` {config.corpus.data} must have {least}, one to measure on, got {len(different)}: give more, or "
            "other rows with `--eval-data`."
        )
    count = min(len(different) - 1, max(1, round(config.corpus.held_out_fraction * len(different))))
    chosen, pairs = set(different[:count]), list(zip(keys, rows, strict=True))
    return [row for key, row in pairs if key not in chosen], [row for key, row in pairs if key in chosen]


def load_base(config: RunConfig) -> "PreTrainedModel":
    """Load the model of `init_from` in float32, on the CPU."""
    from fanformer.loading import load_model

    return load_model(str(config.init_from), device="cpu", dtype="float32")


def refuse_own_sources(config: RunConfig) -> None:
    """Refuse to replace a run by one that is made from it: it would be deleted while it is still needed.

    Raises:
        ConfigError: naming the field.
    """
    folder, fields = config.folder.resolve(), config.to_dict()
    for name in ("data", "eval_data", "init_from", "tokenizer"):
        spec = fields[name]
        if spec is None:
            continue
        pattern = str(Path(spec).expanduser())
        for path in [pattern, *glob.glob(pattern, recursive=True)]:
            if Path(path).resolve().is_relative_to(folder):
                raise ConfigError(
                    f"`{name}` must lie outside the run that --overwrite is to replace, got {spec} in "
                    f"{config.folder.absolute()}: choose another --output-dir."
                )


def refuse_two_vocabularies(corpus: CorpusConfig) -> None:
    """Raise ConfigError where a tokenizer is named and one is to be trained."""
    if corpus.vocab_size is not None and corpus.tokenizer is not None:
        raise ConfigError(f"`vocab_size` does not apply beside `tokenizer`, got {corpus.vocab_size}: leave one out.")


def begin_data(config: RunConfig, progress: Any) -> PreparedData:
    """Prepare a new run's data inside its folder, or open those that are prepared elsewhere.

    Args:
        config: the run.
        progress: called with bytes done and in all.

    Raises:
        ConfigError, DataError: on bad input.
        CheckpointError: if the model of `init_from` has no tokenizer, and none is named.
    """
    known = None
    refuse_two_vocabularies(config.corpus)
    if config.init_from is not None and config.corpus.tokenizer is None:
        if config.corpus.vocab_size is not None:
            raise ConfigError(
                f"`vocab_size` does not apply beside `init_from`, got {config.corpus.vocab_size}: the model "
                "brings its tokenizer; another one, which its weights do not know, is taken with `tokenizer` only."
            )
        from fanformer.loading import load_config
        from fanformer.loading import load_tokenizer as load_tokenizer_of_model

        known = load_tokenizer_of_model(config.init_from, load_config(config.init_from).vocab_size)
    return _open(config, DATA_FOLDER, config.corpus.tokenizer, known, progress)


def resume_data(
    config: RunConfig, before: Mapping[str, Any], changed: Mapping[str, tuple[Any, Any]], progress: Any
) -> PreparedData:
    """Open the data of a run that goes on.

    Args:
        config: the run as asked for now.
        before: `data` of its run.yaml.
        changed: the fields that differ from those the run began with.
        progress: called with bytes done and in all.

    Raises:
        CheckpointError: if they are not those the run began with, and other ones are not allowed.
    """
    folder = Path(before["folder"])
    folder = folder if folder.is_absolute() else config.folder / folder
    asked = {name: pair for name, pair in changed.items() if name in DATA_FIELDS and name != "eval_data"}
    if asked:
        what = ", ".join(f"`{name}` was {old}, is {new}" for name, (old, new) in asked.items())
        then, now = _fingerprints(config, before, asked)
        check_data(then, now, what, config)
        if then != now:
            tokenizer = config.corpus.tokenizer if "tokenizer" in asked else None
            if "vocab_size" in asked and tokenizer is None:
                raise CheckpointError(
                    "`vocab_size` of a run cannot change on resume: its weights know the tokens of the tokenizer it "
                    f"began with, got {config.corpus.vocab_size}: leave it out, or name another tokenizer with "
                    "--tokenizer."
                )
            known = _tokenizer_so_far(config.folder, folder) if tokenizer is None else None
            return _open(config, f"{DATA_FOLDER}-{now[:8]}", tokenizer, known, progress)
        if is_prepared_folder(config.corpus.data):  # the same, at another place
            folder = Path(config.corpus.data)
    data = open_prepared(folder)
    check_data(before["fingerprint"], data.fingerprint, f"{data.folder} was written anew", config)
    if data.fingerprint != before["fingerprint"] and config.corpus.tokenizer is None:
        _check_tokenizer(data, _tokenizer_so_far(config.folder, folder))
    return data


def _check_tokenizer(data: PreparedData, known: "PreTrainedTokenizerBase") -> None:
    """Refuse prepared data of another tokenizer than that of the weights."""
    if saved_tokenizer_files(data.tokenizer()) != saved_tokenizer_files(known):
        raise ConfigError(
            f"the tokenizer of the prepared data {data.folder} is not the one that the weights were trained with: "
            "prepare the text with theirs (`fanformer data prepare --tokenizer`), or ask for this one with --tokenizer "
            f"{data.folder}."
        )


def _tokenizer_so_far(run: Path, data: Path) -> "PreTrainedTokenizerBase":
    """Return the tokenizer of the weights of a run: that of its last checkpoint, else of its data."""
    whole = checkpoints(run)
    return load_tokenizer(str(whole[-1] if whole else data))


def _open(
    config: RunConfig, folder: str, asked: str | None, known: "PreTrainedTokenizerBase | None", progress: Any
) -> PreparedData:
    """Prepare data inside the run's folder, or open prepared ones.

    Args:
        config: the run.
        folder: name, inside the run's folder, to prepare in.
        asked: folder or hub name of a tokenizer that the user names.
        known: the tokenizer of the weights, None where they are fresh or another one is asked for.
        progress: called with bytes done and in all.
    """
    wanted = config.corpus
    if is_prepared_folder(wanted.data):
        data = open_prepared(Path(wanted.data))
        if known is not None:
            _check_tokenizer(data, known)
        if asked is not None and Path(asked).resolve() != Path(wanted.data).resolve():
            raise ConfigError(f"`tokenizer` does not apply to the prepared data {wanted.data}: it has its own.")
        return data
    source = open_source(wanted.data)
    tokenizer = load_tokenizer(asked) if asked is not None else known
    if tokenizer is not None:
        vocab_size = len(tokenizer)  # the preset's model may be another than that of `init_from`
    else:
        vocab_size = wanted.vocab_size or FANformerConfig(**config.model).vocab_size
    return _prepared(
        config.folder / folder,
        source,
        tokenizer,
        progress,
        config.output.overwrite,
        vocab_size=vocab_size,
        held_out_fraction=wanted.held_out_fraction,
        max_bytes=wanted.max_data_bytes,
    )


def _prepared(
    place: Path,
    source: DocumentSource,
    tokenizer: "PreTrainedTokenizerBase | None",
    progress: Any,
    overwrite: bool,
    **options: Any,
) -> PreparedData:
    """Prepare a source in `place`, unless a killed run prepared just that there.

    Args:
        place: folder to prepare.
        source: what to prepare.
        tokenizer: encodes it; None trains one.
        progress: called with bytes done and in all.
        overwrite: whether work that a killed run began for something else goes, rather than being refused.
        **options: as `prepare` takes them.
    """
    if is_prepared_folder(str(place)):
        data = open_prepared(place)
        tokens = {"asked_vocab_size": options["vocab_size"]}
        if tokenizer is not None:
            tokens = {"tokenizer_files": saved_tokenizer_files(tokenizer)}
        wanted = {**options, **tokens, "source": source.describe()}
        if all(data.metadata.get(name) == value for name, value in wanted.items() if name != "vocab_size"):
            return data
        shutil.rmtree(place)
    try:
        return prepare(source, place, tokenizer=tokenizer, progress=progress, **options)
    except OtherArgumentsError:
        if not overwrite:
            raise
    shutil.rmtree(partial_place(place))
    return prepare(source, place, tokenizer=tokenizer, progress=progress, **options)


def _fingerprints(
    config: RunConfig, before: Mapping[str, Any], asked: Mapping[str, tuple[Any, Any]]
) -> tuple[str, str]:
    """Return the fingerprints of the data then and now; of sources that are not prepared, those of what they are."""
    if is_prepared_folder(config.corpus.data):
        return before["fingerprint"], open_prepared(Path(config.corpus.data)).fingerprint
    sources = [before["metadata"]["source"], open_source(config.corpus.data).describe()]
    settings = {name: pair for name, pair in asked.items() if name != "data"}
    then, now = (
        fingerprint([identity(source), {name: pair[index] for name, pair in settings.items()}])
        for index, source in enumerate(sources)
    )
    return then, now


def identity(description: Mapping[str, Any]) -> dict[str, Any]:
    """Return a source's description without how it was named."""
    return {key: value for key, value in description.items() if key != "spec"}


def held_out_stream(
    config: RunConfig, data: PreparedData, tokenizer: Any, before: Mapping[str, Any] | None, progress: Any
) -> TokenStream:
    """Open what the held-out loss is measured on: another source's text where the run names one, else a split.

    Raises:
        CheckpointError: if a run that goes on names another source than it began with.
        DataError: if there is none.
    """
    spec = config.corpus.eval_data
    if spec is None:
        return data.split("heldout")
    if before is not None and before["configuration"].get("eval_data") != spec:
        raise CheckpointError(
            f"`eval_data` of a run cannot change on resume: it was {before['configuration'].get('eval_data')}, got "
            f"{spec}: leave it out, and measure other text with `fanformer eval`."
        )
    here = config.folder / HELD_OUT_FOLDER
    if before is not None and is_prepared_folder(str(here)):
        prepared = open_prepared(here)
        if prepared.metadata["tokenizer_files"] == saved_tokenizer_files(tokenizer):
            return prepared.split("train")
        here = here.with_name(f"{HELD_OUT_FOLDER}-{data.fingerprint[:8]}")  # another tokenizer was asked for
    options = {"vocab_size": len(tokenizer), "held_out_fraction": 0.0, "max_bytes": None}
    prepared = _prepared(here, open_source(spec), tokenizer, progress, config.output.overwrite, **options)
    return prepared.split("train")
