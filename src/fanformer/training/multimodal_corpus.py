"""Conversations with pictures and recordings as what a run trains on; the language model rests."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from fanformer.data.multimodal import PLACEHOLDERS, known_ids
from fanformer.data.multimodal.media_rows import MediaRows, MediaStore
from fanformer.data.multimodal.messages import Media, MediaExample, read_media_examples
from fanformer.data.multimodal.placeholders import add_placeholders
from fanformer.data.multimodal.wording import wording_of
from fanformer.errors import ConfigError, DataError
from fanformer.evaluation.loss import HeldOutLoss, answer_loss
from fanformer.generation.loading import load_config, load_tokenizer
from fanformer.generation.media_model import MediaModel, load_processor
from fanformer.generation.settings import GenerationSettings
from fanformer.generation.torch_model import TorchModel
from fanformer.model.multimodal import (
    FANformerForConditionalGeneration,
    FANformerMultimodalConfig,
    FANformerProcessor,
)
from fanformer.training.checkpoint import checkpoints, problem
from fanformer.training.chunked_loss import TokenLoss
from fanformer.training.corpus import Corpus, Opening, hold_out
from fanformer.training.fields import RunConfig
from fanformer.training.folder import check_data, fingerprint
from fanformer.training.towers import (
    choose_learning,
    chosen_stage,
    has_tower,
    join_towers,
    joined_config,
    make_processor,
)

_WITHOUT_EFFECT = ("tokenizer", "vocab_size", "max_data_bytes", "lora_rank", "sample_prompt")
_OFF = {"compile": "off", "recompute": "none"}


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What a run makes of its base.

    Attributes:
        config: of the model.
        processor: prepares its media.
        stage: "align" or "tune".
        kinds: of media that are shown.
        new: the kinds among these that the base has no tower for.
        known: tokens of the base; None where `config` has the norm of their embeddings already.
    """

    config: FANformerMultimodalConfig
    processor: FANformerProcessor
    stage: str
    kinds: tuple[str, ...]
    new: tuple[str, ...]
    known: int | None


def multimodal_corpus(opening: Opening) -> Corpus:
    """Open conversations with media: every row of `data`, and `eval_data` or a part of `data` to measure on.

    Files and media are read anew on resume; the tokens of all rows and the content of all media tell whether they are
    the same.

    Raises:
        ConfigError: if there is no base, or a field of the run has no effect here.
        DataError: if a row, a picture or a recording is wrong, or there is nothing to measure on.
        CheckpointError: if a run that goes on finds other rows than it began with, or its base is missing.
    """
    config = opening.config
    _check(config)
    train, held_out = _split(config)
    plan = _plan(opening, train + held_out)
    store = MediaStore(plan.processor, plan.config.most_audio_tokens)
    wording = wording_of(plan.processor.tokenizer, _ids(plan.config))
    length = config.batch.sequence_length
    rows, measured = (MediaRows(examples, wording, store, length) for examples in (train, held_out))
    digest = fingerprint([rows.fingerprint, measured.fingerprint])
    if opening.before is not None:
        check_data(opening.before["data"]["fingerprint"], digest, f"the rows of {config.corpus.data}", config)
    asked = min(held_out, key=lambda example: len(str(example.messages)))
    question = wording.encode(asked.messages[:-1], [store.tokens(one) for one in asked.media], prompt=True).ids

    def measure(model: PreTrainedModel, batch_size: int, **options: Any) -> HeldOutLoss:
        return answer_loss(model, measured, batch_size, **options)

    def continue_sample(writer: TorchModel, settings: GenerationSettings) -> str:
        model = MediaModel(writer.model, plan.processor, join=False, store=store)
        return model.complete_ids(list(question), _shown(asked), settings, media=asked.media).text

    def learning(model: PreTrainedModel) -> PreTrainedModel:
        choose_learning(model, plan.stage, plan.kinds, config.towers, plan.new)
        return model

    base = str(config.init_from)
    return Corpus(
        tokenizer=plan.processor.tokenizer,
        rows=rows,
        description=_description(digest, plan, rows, measured, train, held_out),
        used=f"{len(train):,} conversations with {sum(len(one.media) for one in train):,} pictures and recordings, "
        f"{rows.fraction_filled:.2%} of the places filled; stage {plan.stage}",
        measure=measure,
        held_out_tokens=len(measured) * length,
        held_out_sizes={},
        load_base=lambda: learning(join_towers(base, plan.config, config.towers, plan.known)),
        sample_prompt=f"{_shown(asked)} -> ",
        sample_tokens=len(question),
        continue_sample=continue_sample,
        loss=TokenLoss(),
        processor=plan.processor,
        empty_model=lambda fields: learning(
            FANformerForConditionalGeneration(FANformerMultimodalConfig(**_without_type(fields)))
        ),
    )


def _without_type(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name != "model_type"}


def _check(config: RunConfig) -> None:
    if config.init_from is None:
        raise ConfigError("`init_from` is needed beside `--multimodal`, got none: name the folder of a language model.")
    values = config.to_dict()
    for name in _WITHOUT_EFFECT:
        if values[name] is not None:
            raise ConfigError(f"`{name}` has no effect beside `--multimodal`, got {values[name]!r}: leave it out.")
    for name, only in _OFF.items():
        if values[name] != only:
            raise ConfigError(f"`{name}` must be {only} beside `--multimodal`, got {values[name]}: leave it out.")


def _ids(config: FANformerMultimodalConfig) -> dict[str, int]:
    named = {kind: getattr(config, f"{kind}_token_id") for kind in PLACEHOLDERS}
    return {kind: number for kind, number in named.items() if number is not None}


def _plan(opening: Opening, examples: Sequence[MediaExample]) -> _Plan:
    """Say what becomes of the base; a run with checkpoints goes on with what it made of it, should the base be gone."""
    config, before = opening.config, opening.before
    shown = {media.kind for example in examples for media in example.media}
    kinds = tuple(kind for kind in PLACEHOLDERS if kind in shown)
    if not kinds:
        raise DataError(f"data `{config.corpus.data}` shows no picture and no recording: use `fanformer finetune`.")
    saved = reversed(checkpoints(config.folder)) if before is not None else ()
    intact = next((checkpoint for checkpoint in saved if problem(checkpoint) is None), None)
    if intact is not None and before is not None:
        data = before["data"]
        model = FANformerMultimodalConfig(**_without_type(before["model"]))
        return _Plan(model, load_processor(intact), data["stage"], kinds, tuple(data["new_towers"]), None)
    base = load_config(str(config.init_from))
    tokenizer = load_tokenizer(str(config.init_from), known_ids(base))
    known = min(base.vocab_size, max(tokenizer.get_vocab().values()) + 1)
    wanted = [kind for kind in PLACEHOLDERS if kind in kinds or has_tower(base, kind)]
    placeholders = add_placeholders(tokenizer, base.vocab_size, wanted)
    for line in placeholders.notes:
        opening.note(line)
    model = joined_config(config.towers, base, kinds, placeholders.ids)
    placeholders.tokenizer.chat_template = wording_of(placeholders.tokenizer, dict(placeholders.ids)).template
    processor = make_processor(config.towers, model, placeholders.tokenizer)
    new = tuple(kind for kind in kinds if not has_tower(base, kind))
    return _Plan(model, processor, chosen_stage(config.towers, base, kinds), kinds, new, known)


def _split(config: RunConfig) -> tuple[list[MediaExample], list[MediaExample]]:
    """Read what is learnt and what is measured.

    Raises:
        DataError: if a row is wrong, or `data` has too few different questions to hold one out.
    """
    examples = read_media_examples(Path(config.corpus.data))
    if config.corpus.eval_data is not None:
        return examples, read_media_examples(Path(config.corpus.eval_data))
    folder = Path(config.corpus.data).expanduser().absolute().parent.resolve()
    keys = _joined([_shown_keys(example, folder) for example in examples])
    return hold_out(examples, keys, config, "two different things to show")


def _shown_keys(example: MediaExample, folder: Path) -> list[str]:
    """Return a hash of each thing that a row shows, or of its question where that is nothing.

    Args:
        example: a row.
        folder: of the rows' file; a row is held out or not wherever the folder lies.
    """
    asked = next(message for message in example.messages if message.role == "user")
    keys = []
    for part in example.media or asked.parts:
        source = part.source if isinstance(part, Media) else part
        named = source.relative_to(folder).as_posix() if isinstance(source, Path) else source
        keys.append(hashlib.blake2b(named if isinstance(named, bytes) else named.encode(), digest_size=8).hexdigest())
    return keys


def _joined(keys_of_rows: Sequence[Sequence[str]]) -> list[str]:
    """Return one key for each row, the same for rows that share one of theirs, directly or by way of others.

    They are held out together or not at all: what is learnt is not measured by another question, or beside another.
    """
    first: dict[str, str] = {}

    def found(key: str) -> str:
        while (further := first.setdefault(key, key)) != key:
            first[key] = first[further]
            key = further
        return key

    for keys in keys_of_rows:
        roots = sorted({found(key) for key in keys})
        first.update(dict.fromkeys(roots, roots[0]))
    return [found(keys[0]) for keys in keys_of_rows]


def _shown(example: MediaExample) -> str:
    """Return the question of an example's end, media by their placeholders."""
    parts = example.messages[-2].parts if len(example.messages) > 1 else example.messages[-1].parts
    return " ".join(part if isinstance(part, str) else PLACEHOLDERS[part.kind] for part in parts)


def _description(
    digest: str,
    plan: _Plan,
    rows: MediaRows,
    measured: MediaRows,
    train: Sequence[MediaExample],
    held_out: Sequence[MediaExample],
) -> dict[str, Any]:
    """Return `data` of run.yaml."""
    return {
        "fingerprint": digest,
        "stage": plan.stage,
        "kinds": list(plan.kinds),
        "new_towers": list(plan.new),
        "rows": len(rows),
        "fraction_filled": rows.fraction_filled,
        "examples": len(train),
        "media": sum(len(example.media) for example in train),
        "answer_tokens": rows.num_labels,
        "held_out_examples": len(held_out),
        "held_out_answer_tokens": measured.num_labels,
    }
