"""English to train the base on: records of the real data, without the stories that questions are asked about later."""

import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks/quality"))

from answer_data import Row, read
from tuning_data import Stories


def story_of(record: Row) -> str | None:
    """Return the name of the story that a record holds whole, as FairytaleQA has it; None for other texts."""
    return Path(record["id"]).stem.removesuffix("-story") if record["src"] == "fairytaleqa" else None


def base_records(data: Path, shards: int, repeats: int, left_out: dict[str, list[str]]) -> Iterator[Row]:
    """Yield what the base is trained on.

    Args:
        data: the folder of real data.
        shards: of text-large, from the first.
        repeats: how often text-small's training part is read, its sources being those of the held-out text.
        left_out: gets the records that are skipped, by the story of the held-out questions that they hold or name.
    """
    stories = Stories(read(data / "questions/fairytaleqa-valid.jsonl.xz"))

    def allowed(record: Row) -> bool:
        found = stories.in_text(record["text"])
        for name in found:
            left_out.setdefault(name, []).append(f"{record['src']}: {record['id']}")
        return not found

    small = [record for record in read(data / "text-small/train.jsonl.xz") if allowed(record)]
    for _ in range(repeats):
        yield from small
    for shard in range(shards):
        yield from filter(allowed, read(data / f"text-large/train-{shard:02d}.jsonl.xz"))
