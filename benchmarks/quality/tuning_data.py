"""What tuning.py trains and measures on: text without the stories of the test, and the sets of answer_data.py, cut."""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import answer_data
from answer_data import Row

from fanformer.data.conversations.instructions import Instruction
from fanformer.evaluation.answers import exact_match, normalized, token_f1
from fanformer.evaluation.loss import every_nth

SETS = ("fairytale", "arc", "openbookqa", "arxiv", "instructions")
SHARED_WORDS = 13
"""A document that has so many words in a row in common with a story is taken for a copy of it."""
_HELD_OUT_OPENBOOK = 500
_WORD = re.compile(r"[a-z0-9]+")


def words(text: str) -> list[str]:
    """Return the words of a text, in lower case and without signs."""
    return _WORD.findall(text.lower())


class Stories:
    """The stories that the test asks about, as far as a text can be told to be one of them."""

    def __init__(self, rows: Iterable[Row]) -> None:
        """Take rows of FairytaleQA."""
        self.titles: dict[str, str] = {}
        self._runs: dict[int, set[str]] = defaultdict(set)
        for row in rows:
            name = row["story"]
            self.titles[name] = " ".join(words(name.replace("-", " ")))
            for run in _runs(words(row["text"])):
                self._runs[run].add(name)

    def in_text(self, text: str) -> set[str]:
        """Return the stories that a text names by their title, or has SHARED_WORDS words in a row of."""
        found = words(text)
        joined = f" {' '.join(found)} "
        named = {name for name, title in self.titles.items() if f" {title} " in joined}
        return named.union(*(self._runs[run] for run in _runs(found) if run in self._runs))


def _runs(found: Sequence[str]) -> Iterator[int]:
    """Yield a number for each run of SHARED_WORDS words."""
    for start in range(len(found) - SHARED_WORDS + 1):
        yield hash(tuple(found[start : start + SHARED_WORDS]))


def write_text(source: Iterable[Row], stories: Stories, most_bytes: int, path: Path) -> dict[str, Any]:
    """Write documents without the stories, up to so many bytes, and return what was left out.

    Args:
        source: records with `text` and `id`.
        stories: what may not be in them.
        most_bytes: of text.
        path: a .jsonl file.
    """
    left_out: dict[str, list[str]] = defaultdict(list)
    size = documents = 0
    with path.open("w", encoding="utf-8") as file:
        for record in source:
            found = stories.in_text(record["text"])
            for name in found:
                left_out[name].append(str(record["id"]))
            if found:
                continue
            file.write(json.dumps({"text": record["text"]}, ensure_ascii=False) + "\n")
            documents, size = documents + 1, size + len(record["text"].encode())
            if size >= most_bytes:
                break
    return {"documents": documents, "bytes": size, "left_out": dict(sorted(left_out.items()))}


def write_all(data: Path, folder: Path, sizes: Mapping[str, int], base_bytes: int, held_out_bytes: int) -> None:
    """Write everything that the cells read, and `data.json`, what it is; nothing where that is there.

    Args:
        data: the folder of real data.
        folder: gets base.jsonl and held-out.jsonl, text; train.jsonl and train-blind.jsonl, all sets and some of the
            base's text, against forgetting; valid.jsonl, the sets held out; valid-SET.jsonl of each; and
            pairs-train.jsonl and pairs-valid.jsonl.
        sizes: rows by set, of pairs as `pairs`, of plain text as `texts`, and of each held-out set as `held_out`.
        base_bytes: of text for the base.
        held_out_bytes: of text that it is measured on.
    """
    if (folder / "data.json").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    stories = Stories(answer_data.read(data / "questions/fairytaleqa-valid.jsonl.xz"))
    shards = sorted((data / "text-large").glob("train-*.jsonl.xz"))
    text = (record for shard in shards for record in answer_data.read(shard))
    content: dict[str, Any] = {
        "stories": sorted(stories.titles),
        "base": write_text(text, stories, base_bytes, folder / "base.jsonl"),
    }
    held_out = answer_data.read(data / "text-large/valid-00.jsonl.xz")
    content["held_out"] = write_text(held_out, stories, held_out_bytes, folder / "held-out.jsonl")
    train, valid = rows_of_sets(data, sizes)
    read = list(answer_data.read(folder / "base.jsonl"))
    texts = [read[index] for index in every_nth(len(read), sizes["texts"])]
    content["rows"] = {
        name: answer_data.write(folder / f"{name}.jsonl", iter(rows))
        for name, rows in {
            "train": [*(row for name in SETS for row in train[name]), *texts],
            "train-blind": [*(row for name in ("fairytale-blind", *SETS[1:]) for row in train[name]), *texts],
            "pairs-train": train["arc-pairs"],
            "pairs-valid": valid["arc-pairs"],
            "valid": [row for name in SETS for row in valid[name]],
            **{f"valid-{name}": valid[name] for name in ("fairytale-blind", *SETS)},
        }.items()
    }
    content["baselines"] = {name: baselines(name, train[name], valid[name]) for name in SETS}
    (folder / "data.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def rows_of_sets(data: Path, sizes: Mapping[str, int]) -> tuple[dict[str, list[Row]], dict[str, list[Row]]]:
    """Return the rows of each set to train on and held out, as many as `sizes` says, evenly spread."""
    most = sizes["held_out"]
    found = answer_data.files(data, sizes["instructions"], sizes["arxiv"], frozenset())
    parts = {"fairytale": "valid", "fairytale-blind": "valid", "arc": "test", "arc-pairs": "test", "arxiv": "valid"}
    train, valid = {}, {}
    for name, part in {**parts, "instructions": "valid"}.items():
        train[name], valid[name] = list(found[f"{name}-train"]), list(found[f"{name}-{part}"])
    openbook = list(found["openbookqa-train"])
    train["openbookqa"], valid["openbookqa"] = openbook[:-_HELD_OUT_OPENBOOK], openbook[-_HELD_OUT_OPENBOOK:]
    wanted = {**sizes, "fairytale-blind": sizes["fairytale"], "arc-pairs": sizes["pairs"]}
    return (
        {name: _some(rows, wanted[name]) for name, rows in train.items()},
        {name: _some(rows, most) for name, rows in valid.items()},
    )


def _some(rows: Sequence[Row], count: int) -> list[Row]:
    return [rows[index] for index in every_nth(len(rows), count)]


def question(row: Row) -> str:
    """Return what is asked."""
    return str(row["messages"][0]["content"])


def answer(row: Row) -> str:
    """Return what is to be answered."""
    return str(row["messages"][-1]["content"])


def follows(row: Row, reply: str) -> bool:
    """Return whether a reply does what a row of `instructions` asks."""
    return Instruction(row["kind"], row["values"], question(row)).is_followed_by(reply)


def score(name: str, rows: Sequence[Row], replies: Sequence[str]) -> dict[str, float]:
    """Return how right replies to a set's questions are, each figure a share or a mean in [0, 1].

    Args:
        name: of the set.
        rows: its questions.
        replies: one for each.
    """
    pairs = list(zip(rows, replies, strict=True))
    if name == "instructions":
        found = {"followed": fmean(follows(row, reply) for row, reply in pairs)}
        for kind in sorted({row["kind"] for row in rows}):
            found[f"followed_{kind}"] = fmean(follows(row, reply) for row, reply in pairs if row["kind"] == kind)
        return found
    found = _right(pairs)
    explicit = [(row, reply) for row, reply in pairs if row.get("explicit")]
    if explicit:
        found |= {f"explicit_{key}": value for key, value in _right(explicit).items()}
    return found


def _right(pairs: Sequence[tuple[Row, str]]) -> dict[str, float]:
    return {
        "f1": fmean(token_f1(reply, row["references"]) for row, reply in pairs),
        "exact_match": fmean(exact_match(reply, row["references"]) for row, reply in pairs),
    }


def baselines(name: str, train: Sequence[Row], valid: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Return what rules without a model reach on the held-out rows of a set.

    The constant is the most frequent answer of the rows to train on; sentences are those of the passage, without the
    question, where there is one.
    """
    constant = Counter(map(answer, train)).most_common(1)[0][0]
    rules: dict[str, Callable[[Row], str]] = {"constant": lambda row: constant}
    if name in ("fairytale", "arxiv"):
        rules["first sentence"] = lambda row: _sentences(name, row)[0]
        rules["best overlap"] = lambda row: _best_overlap(name, row)
    return {rule: score(name, valid, [write(row) for row in valid]) for rule, write in rules.items()}


def _asked(name: str, row: Row) -> tuple[str, str]:
    """Return passage and question: of a story the question stands last, of an abstract first."""
    if name == "fairytale":
        passage, _, asked = question(row).rpartition("\n\n")
    else:
        asked, _, passage = question(row).partition("\n\n")
    return passage, asked


def _sentences(name: str, row: Row) -> list[str]:
    return answer_data.sentences({"text": _asked(name, row)[0]})


def _best_overlap(name: str, row: Row) -> str:
    asked = {*normalized(_asked(name, row)[1]).split()}
    return max(_sentences(name, row), key=lambda sentence: len(asked & {*normalized(sentence).split()}))
