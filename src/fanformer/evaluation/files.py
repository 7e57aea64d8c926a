"""A model's loss on files, each and together, and by where their texts come from; itself torch-free."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fanformer.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from fanformer.evaluation.loss import DocumentSums

_DEFAULT_FIELD = "src"


def check_sizes(sequence_length: int | None, batch_size: int) -> None:
    """Raise ConfigError if a number of `MeasuredFiles` is below 1."""
    for name, value in (("batch_size", batch_size), ("sequence_length", sequence_length)):
        if value is not None and value < 1:
            raise ConfigError(f"`{name}` must be at least 1, got {value}.")


def check_files(paths: Sequence[str], by: str | None) -> str | None:
    """Refuse, before torch is imported, files that cannot be read or hold no text.

    Args:
        paths: text, jsonl and parquet files.
        by: the field of records that says where a text comes from, "none" for no field; None takes `src` where all
            have it.

    Returns:
        That field, or None.

    Raises:
        ConfigError: if a file is named twice, or `by` is asked for where no file has fields.
        DataError, OSError: if a file cannot be read.
    """
    from fanformer.data.sources.documents import open_source

    for number, path in enumerate(paths):
        if path in paths[:number]:
            raise ConfigError(f"`--text` must name every file once, got {path} twice.")
        Path(path).open("rb").close()
    field = _source_field(paths, by)
    for path in paths:
        next(iter(open_source(path)))
    return field


def _source_field(paths: Sequence[str], by: str | None) -> str | None:
    """Return the field that says where a text comes from, or None.

    Raises:
        ConfigError: if `by` is asked for where no file has fields.
    """
    from fanformer.data.sources.readers import field_names, file_kind

    names = {path: set(field_names(Path(path))) for path in paths if file_kind(Path(path)) != "text"}
    if by == "none":
        return None
    if by is not None and not names:
        raise ConfigError(f"`--by {by}` applies to jsonl and parquet files, got {', '.join(paths)}: leave it out.")
    if by is None and names and all(_DEFAULT_FIELD in found for found in names.values()):
        return _DEFAULT_FIELD
    return by


class MeasuredFiles:
    """What a model makes of files, one after the other."""

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerFast",
        field: str | None,
        sequence_length: int | None,
        batch_size: int,
    ) -> None:
        """Say what measures.

        Args:
            model: a causal language model.
            tokenizer: its own.
            field: what `check_files` returned.
            sequence_length: longest context in tokens; None is the model's longest, at most 2,048.
            batch_size: rows of text computed together.

        Raises:
            ConfigError: if the context is longer than the model's positions.
        """
        longest = getattr(model.config, "max_position_embeddings", None)
        if sequence_length is not None and longest is not None and sequence_length > longest:
            raise ConfigError(
                f"`sequence_length` must be at most the model's {longest} positions, got {sequence_length}."
            )
        from fanformer.evaluation.loss import default_sequence_length

        self._model, self._tokenizer, self._field, self._batch_size = model, tokenizer, field, batch_size
        self._length = sequence_length or default_sequence_length(model)
        self._sources: list[str | None] = []
        self.by_file: dict[str, DocumentSums] = {}

    def measure(self, path: str) -> None:
        """Measure a file."""
        from fanformer.data.sources.documents import open_source
        from fanformer.data.sources.readers import file_kind
        from fanformer.evaluation.loss import evaluate_documents

        has_fields = file_kind(Path(path)) != "text"
        field = self._field if has_fields else None
        try:
            documents = list(open_source(path, source_field=field))
        except DataError as error:
            if field is None or f"field `{field}`" not in str(error):
                raise
            raise DataError(f"{str(error).rstrip('.')}, or take --by none") from error
        texts = [document.text for document in documents]
        self.by_file[path] = evaluate_documents(self._model, self._tokenizer, texts, self._length, self._batch_size)
        self._sources += [document.source for document in documents]

    def result(self) -> dict[str, Any]:
        """Return the figures of all files together, with those of each as `files` and of each source as `sources`."""
        import numpy as np

        from fanformer.evaluation.loss import DocumentSums

        everything = DocumentSums.join(self.by_file.values())
        result: dict[str, Any] = everything.figures().to_dict()
        result |= {"sequence_length": self._length}
        result |= {"files": {path: sums.figures().to_dict() for path, sums in self.by_file.items()}}
        if self._field is not None:
            labels = np.array(self._sources, dtype=object)  # None is no name, "" is one
            names = sorted({source for source in self._sources if source is not None})
            sources = {name: everything.select(labels == name).figures().to_dict() for name in names}
            result |= {"by": self._field, "sources": sources}
        return result
