"""English to train the base on: records of the real data, without the stories that questions are asked about later."""

import json
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks/quality"))

from answer_data import Row, read
from tuning_data import Stories

from fanformer.errors import ConfigError


def story_of(record: Row) -> str | None:
    """Return the name of the story that a record holds whole, as FairytaleQA has it; None for other texts."""
    return Path(record["id"]).stem.removesuffix("-story") if record["src"] == "fairytaleqa" else None


def without_stories(data: Path, left_out: dict[str, list[str]] | None = None) -> Callable[[Row], bool]:
    """Return what tells whether a record neither names nor holds a story of FairytaleQA's held-out questions.

    Args:
        data: the folder of real data.
        left_out: gets the records that do, by the story.
    """
    stories = Stories(read(data / "questions/fairytaleqa-valid.jsonl.xz"))

    def allowed(record: Row) -> bool:
        found = stories.in_text(record["text"])
        if left_out is not None:
            for name in found:
                left_out.setdefault(name, []).append(f"{record['src']}: {record['id']}")
        return not found

    return allowed


def base_records(
    data: Path,
    left_out: dict[str, list[str]],
    *,
    shards: int,
    repeats: int,
    sources: Mapping[str, float] | None = None,
    share: float = 1.0,
) -> Iterator[Row]:
    """Yield what the base is trained on.

    Args:
        data: the folder of real data.
        left_out: gets the records that are skipped, by the story of the held-out questions that they hold or name.
        shards: of text-large, from the first.
        repeats: how often text-small's training part is read, its sources being those of the held-out text.
        sources: of text-large that are read, and the share of each, in (0, 1]; None for all of them whole.
        share: of all records that is taken, evenly, in (0, 1].

    Raises:
        ConfigError: if text-large has no such source.
    """
    allowed, draw = without_stories(data, left_out), random.Random(0)
    found: set[str] = set()

    def taken(records: Iterable[Row], of: Mapping[str, float] | None = None) -> Iterator[Row]:
        for record in records:
            found.add(record["src"])
            wanted = share * (1 if of is None else of.get(record["src"], 0))
            if wanted >= 1 or draw.random() < wanted:
                yield record

    small = [record for record in read(data / "text-small/train.jsonl.xz") if allowed(record)]
    for _ in range(repeats):
        yield from taken(small)
    for shard in range(shards):
        yield from filter(allowed, taken(read(data / f"text-large/train-{shard:02d}.jsonl.xz"), sources))
    if missing := sorted(set(sources or ()) - found):
        raise ConfigError(f"`text.sources` must name sources of the text, got {missing[0]}: expected {sorted(found)}.")


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> tuple[int, int]:
    """Write rows as jsonl and return how many they were, and their bytes; the file is there when it is whole."""
    partial, count = path.with_suffix(".partial"), 0
    with partial.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    size = partial.stat().st_size
    partial.replace(path)
    return count, size
