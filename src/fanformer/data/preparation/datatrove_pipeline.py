"""`fanformer data prepare` as stages of a `datatrove` pipeline, for more than one machine.

Every task takes files of the source by its rank. Where texts are to be there once, a first stage notes the hash of
every text and a second finds the repetitions, each task for its share of the hashes. The next stage encodes file by
file, and the last, a single task, joins everything. The folder has the fingerprint that one machine would give it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fanformer.data.preparation.deduplication import text_digest
from fanformer.data.preparation.journal import Journal
from fanformer.data.preparation.outputs import Attribution, Outputs
from fanformer.data.preparation.places import lock_place, output_place, partial_place
from fanformer.data.preparation.prepare import (
    SHARD_TOKENS,
    batch_encoder,
    closing,
    description,
    identity,
    versions,
    write_description,
)
from fanformer.data.preparation.selection import BATCH_CHARACTERS, DUPLICATE, Selection, count_dropped
from fanformer.data.preparation.splitting import Split, choose_split
from fanformer.data.prepared import hash_tokenizer_files
from fanformer.data.sources.documents import Document, open_source
from fanformer.data.tokenizer import load_tokenizer
from fanformer.errors import ConfigError, DataError, DependencyError
from fanformer.files.locking import hold

try:
    from datatrove.pipeline.base import PipelineStep
except ImportError as error:
    raise DependencyError(
        "preparing data on several machines needs the package `datatrove`, which is not installed: "
        "pip install 'fanformer[cluster]'"
    ) from error

_DIGEST = np.dtype("V16")
_NO_TEXT = bytes(16)
"""Stands where a document is empty or was dropped by a filter."""
_ONE_SHARD = 1 << 62


@dataclass(frozen=True)
class Job:
    """What to prepare; every task reads it anew.

    Attributes:
        spec: the source, as for `open_source`, readable on every machine.
        output_dir: folder to create, on a file system that every machine has.
        tokenizer: folder or hub name; on several machines none is trained.
        text_field: field or column that holds the text.
        source_field: field or column for attribution, None for none.
        licence_field: field or column for attribution, None for none.
        licence: of documents that name none.
        held_out_fraction: share that is held out.
        filters: names of filters, in order.
        deduplicate: whether to drop texts that were there before.
        shard_tokens: tokens of a shard.
    """

    spec: str
    output_dir: str
    tokenizer: str
    text_field: str = "text"
    source_field: str | None = None
    licence_field: str | None = None
    licence: str | None = None
    held_out_fraction: float = 0.05
    filters: tuple[str, ...] = ()
    deduplicate: bool = False
    shard_tokens: int = SHARD_TOKENS

    @property
    def work(self) -> Path:
        """The folder for what the stages hand to each other."""
        return partial_place(output_place(Path(self.output_dir))) / "work"

    def selection(self) -> Selection:
        """Open the source."""
        source = open_source(
            self.spec, self.text_field, source_field=self.source_field, licence_field=self.licence_field
        )
        return Selection(source, None, self.filters, deduplicate=self.deduplicate)

    def split(self, selection: Selection) -> Split:
        """Return the rule that splits the documents.

        Raises:
            ConfigError: if there are so few that the end of the text would be held out.
        """
        split = choose_split(selection, self.held_out_fraction)
        if split.kind == "by position":
            raise ConfigError(
                f"data `{self.spec}` has too few documents to hold out {self.held_out_fraction:g} of them by their "
                "names: prepare it on one machine"
            )
        return split


def stages(job: Job, tasks: int) -> list[tuple[list[PipelineStep], int]]:
    """Return the pipelines to run one after the other, each with its number of tasks.

    Args:
        job: what to prepare.
        tasks: of the stages that run in parallel; more than the source has files are idle.

    Raises:
        ConfigError, DataError: if the job cannot be done.
    """
    if tasks < 1:
        raise ConfigError(f"`tasks` must be at least 1, got {tasks}")
    if Path(job.output_dir).exists():
        raise DataError(f"{job.output_dir} exists already: choose another `output_dir`, or delete it first")
    selection = job.selection()
    job.split(selection)
    _begin(job, selection)
    first: list[tuple[list[PipelineStep], int]] = []
    if job.deduplicate:
        first = [([HashTexts(job)], tasks), ([FindRepetitions(job)], tasks)]
    return [*first, ([EncodeParts(job)], tasks), ([JoinParts(job)], 1)]


def _begin(job: Job, selection: Selection) -> None:
    """Note in the folder for work what it is for, or raise DataError where it holds work of another kind."""
    arguments = asdict(job) | {
        "output_dir": None,  # a folder that was moved is the same
        "source": selection.description,
        "tokenizer": identity(load_tokenizer(job.tokenizer)),
        "versions": versions(),
    }
    journal = Journal(job.work / "job.json", arguments)
    if journal.load() is None:
        if job.work.parent.exists() and any(job.work.parent.iterdir()):
            raise DataError(
                f"{job.work.parent} is in the way and holds what no pipeline has left: choose another `output_dir`, or "
                "delete it"
            )
        job.work.mkdir(parents=True, exist_ok=True)
        journal.save({})


def _state_of_part(work: Path, part: int, folder: str = "{:05d}") -> Journal:
    """Return what says what an encoded file's streams hold, in the folder of its number, or one named after it."""
    complete = work / "encoded" / f"{part:05d}"
    remedy = f"delete {complete} and run the stage that encodes again"
    return Journal(complete.with_name(folder.format(part)) / "state.json", {"part": part}, remedy)


class HashTexts(PipelineStep):
    """Notes the hash of every text, file by file."""

    name = "hash texts"
    type = "FANformer"

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.job = job

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Write the hashes of the files of this rank."""
        selection, folder = self.job.selection(), self.job.work / "hashes"
        folder.mkdir(parents=True, exist_ok=True)
        for part in range(rank, len(selection.source.parts), world_size):
            unfinished = folder / f"{part:05d}.unfinished"
            with unfinished.open("wb") as file:
                for document in selection.source.read_part(part):
                    kept = selection.filtered(document, {})
                    file.write(text_digest(kept.text) if kept is not None else _NO_TEXT)
            os.replace(unfinished, folder / f"{part:05d}.bin")
        yield from data or ()


class FindRepetitions(PipelineStep):
    """Finds the documents whose text an earlier document has, among the hashes that are this rank's share."""

    name = "find repetitions"
    type = "FANformer"

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.job = job

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Write the numbers of repeated documents of every file, as far as they are in this share."""
        folder = self.job.work / "repetitions"
        folder.mkdir(parents=True, exist_ok=True)
        digests, places = [np.empty(0, _DIGEST)], [np.empty((0, 2), np.int64)]
        for part, path in enumerate(sorted((self.job.work / "hashes").glob("*.bin"))):
            content = np.fromfile(path, dtype=np.uint8).reshape(-1, 16)
            mine = np.flatnonzero(content.any(axis=1) & (content[:, 0] % world_size == rank))
            digests.append(content[mine].view(_DIGEST).ravel())
            places.append(np.stack([np.full(len(mine), part), mine], axis=1))
        _, first = np.unique(np.concatenate(digests).view("S16"), return_index=True)
        repeated = np.ones(sum(map(len, digests)), dtype=bool)
        repeated[first] = False
        unfinished = folder / f"{rank:05d}.unfinished.npy"
        np.save(unfinished, np.concatenate(places)[repeated])
        os.replace(unfinished, folder / f"{rank:05d}.npy")
        yield from data or ()


class EncodeParts(PipelineStep):
    """Encodes the files of this rank, each into a folder of its own."""

    name = "encode"
    type = "FANformer"

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.job = job

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Write streams, counts and attribution of the files of this rank that are not there yet."""
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # other tasks have the other cores
        selection = self.job.selection()
        split, encoder = self.job.split(selection), batch_encoder(load_tokenizer(self.job.tokenizer))
        for part in range(rank, len(selection.source.parts), world_size):
            folder = self.job.work / "encoded" / f"{part:05d}"
            if folder.exists():
                continue
            journal = _state_of_part(self.job.work, part, "{:05d}.unfinished")
            unfinished = journal.path.parent
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            attribution = Attribution(self.job.spec, self.job.licence)
            outputs = Outputs(unfinished, unfinished, np.dtype(encoder.dtype), _ONE_SHARD, attribution)
            dropped: dict[str, int] = {}
            for batch in _batches(self._documents(selection, part, dropped), split):
                encoded = encoder.encode([(held_out, document.name, document.text) for held_out, document in batch])
                outputs.add(batch, (encoded.train, encoded.held_out), encoded.num_bytes, encoded.num_tokens)
            outputs.sync()
            journal.save(outputs.state() | {"dropped": dropped})
            outputs.close()
            os.replace(unfinished, folder)
        yield from data or ()

    def _documents(self, selection: Selection, part: int, dropped: dict[str, int]) -> Iterator[Document]:
        places = [np.load(path) for path in sorted((self.job.work / "repetitions").glob("*.npy"))]
        repeated = {int(number) for rows in places for number in rows[rows[:, 0] == part, 1]}
        for number, document in enumerate(selection.source.read_part(part)):
            kept = selection.filtered(document, dropped)
            if kept is None:
                continue
            if number in repeated:
                count_dropped(dropped, DUPLICATE)
            else:
                yield kept


def _batches(documents: Iterator[Document], split: Split) -> Iterator[list[tuple[bool, Document]]]:
    batch: list[tuple[bool, Document]] = []
    characters = 0
    for document in documents:
        batch += split.place(document, 0)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


class JoinParts(PipelineStep):
    """Joins what the tasks have encoded into the prepared folder."""

    name = "join"
    type = "FANformer"

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.job = job

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        """Write the folder; one task does it."""
        output_dir = output_place(Path(self.job.output_dir))
        if rank == 0:
            with hold(lock_place(output_dir), str(output_dir)):
                self._join(output_dir)
        yield from data or ()

    def _join(self, output_dir: Path) -> None:
        partial, selection = self.job.work.parent, self.job.selection()
        tokenizer = load_tokenizer(self.job.tokenizer)
        encoder, split = batch_encoder(tokenizer), self.job.split(selection)
        attribution = Attribution(self.job.spec, self.job.licence)
        (self.job.work / "heldout.txt").unlink(missing_ok=True)
        outputs = Outputs(partial, self.job.work, np.dtype(encoder.dtype), self.job.shard_tokens, attribution)
        dropped: dict[str, int] = {}
        for part in range(len(selection.source.parts)):
            journal = _state_of_part(self.job.work, part)
            state = journal.load()
            if state is None:
                raise DataError(f"{journal.path} is missing: run the stage that encodes again")
            outputs.append(journal.path.parent, state)
            for reason, count in state["dropped"].items():
                dropped[reason] = dropped.get(reason, 0) + count
        files = hash_tokenizer_files([Path(path) for path in tokenizer.save_pretrained(partial)])
        fraction, origin = self.job.held_out_fraction, tokenizer.name_or_path
        metadata = description(selection, split.kind, fraction, origin, encoder) | {
            "tokenizer_files": files,
            "asked_vocab_size": None,  # no tokenizer is trained here
            "dropped": dropped,
            "splits": outputs.finish(closing(encoder)),
        }
        write_description(partial, metadata, attribution)
        os.replace(partial, output_dir)
        shutil.rmtree(output_dir / "work")
