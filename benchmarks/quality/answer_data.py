"""Real questions as files that a model can be tuned on, and what simple rules reach on them.

    python benchmarks/quality/answer_data.py --data FOLDER --output-dir DIR [--instructions 6000]
        [--abstracts 6000] [--leave-out STORY,...]

FOLDER has `questions` (FairytaleQA, OpenBookQA), `eval/arc` and `text-large`. DIR gets, to train on and held out, jsonl
of `messages`: fairytale (and fairytale-blind, without the passage), arc, openbookqa, arxiv, instructions; and of
`prompt`, `chosen` and `rejected`: arc-pairs, one pair for each wrong choice. Rows that are measured by F1 have
`references` besides, those of instructions `kind` and `values`. Baselines are printed as JSON.
"""

import argparse
import itertools
import json
import lzma
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from fanformer.data.conversations.instructions import make_instructions
from fanformer.evaluation.answers import exact_match, normalized, token_f1

Row = dict[str, Any]

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_LETTERS = "ABCDE"


def main() -> None:
    """Write the files and print the baselines."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--instructions", type=int, default=6000)
    parser.add_argument("--abstracts", type=int, default=6000)
    parser.add_argument("--leave-out", default="", help="names of stories, with commas")
    asked = parser.parse_args()
    asked.output_dir.mkdir(parents=True, exist_ok=True)
    left_out = frozenset(filter(None, asked.leave_out.split(",")))
    counts = {
        name: write(asked.output_dir / f"{name}.jsonl", rows)
        for name, rows in files(asked.data, asked.instructions, asked.abstracts, left_out).items()
    }
    valid = list(read(asked.data / "questions/fairytaleqa-valid.jsonl.xz"))
    explicit = [row for row in valid if row["explicit"]]
    json.dump(
        {"rows": counts, "baselines": {"explicit": baselines(explicit), "all": baselines(valid)}}, sys.stdout, indent=2
    )
    sys.stdout.write("\n")


def files(data: Path, instructions: int, abstracts: int, left_out: frozenset[str]) -> dict[str, Iterator[Row]]:
    """Return the rows of every file by its name.

    Args:
        data: the folder of real data.
        instructions: how many self-made ones to train on; a fifth as many are held out.
        abstracts: how many to train on, at most.
        left_out: stories that are left out of FairytaleQA.
    """
    questions, arc, texts = data / "questions", data / "eval/arc", data / "text-large"
    found: dict[str, Iterator[Row]] = {}
    for part in ("train", "valid"):
        path = questions / f"fairytaleqa-{part}.jsonl.xz"
        found[f"fairytale-{part}"] = fairytales(path, left_out, blind=False)
        found[f"fairytale-blind-{part}"] = fairytales(path, left_out, blind=True)
    for part in ("Train", "Test"):
        paths = [arc / f"ARC-{level}-{part}.jsonl" for level in ("Easy", "Challenge")]
        rows = [arc_row(row) for path in paths for row in read(path)]
        found[f"arc-{part.lower()}"] = itertools.starmap(choice, rows)
        found[f"arc-pairs-{part.lower()}"] = itertools.chain.from_iterable(itertools.starmap(pairs, rows))
    openbook = read(questions / "openbookqa-train.jsonl.xz")
    found["openbookqa-train"] = (choice(row["question"], row["choices"], row["answer"]) for row in openbook)
    found["arxiv-train"] = titles(texts / "train-00.jsonl.xz", abstracts)
    found["arxiv-valid"] = titles(texts / "valid-00.jsonl.xz", 1000)
    found["instructions-train"] = instruction_rows(instructions, held_out=False)
    found["instructions-valid"] = instruction_rows(instructions // 5, held_out=True)
    return found


def read(path: Path) -> Iterator[Row]:
    """Yield the rows of a jsonl file, plain or xz."""
    with lzma.open(path, "rt", encoding="utf-8") if path.suffix == ".xz" else path.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def write(path: Path, rows: Iterator[Row]) -> int:
    """Write rows as jsonl and return how many they were."""
    count = 0
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count += 1
    return count


def conversation(question: str, answer: str, **more: Any) -> Row:
    """Return a question and its answer as a row of messages."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **more}


def fairytales(path: Path, left_out: frozenset[str], *, blind: bool) -> Iterator[Row]:
    """Yield questions on stories, each behind its passage or, where `blind`, without it."""
    for row in read(path):
        if row["story"] in left_out:
            continue
        passage = " ".join(row["text"].split())
        question = row["question"] if blind else f"{passage}\n\n{row['question']}"
        more = {key: row[key] for key in ("story", "explicit", "attribute")}
        yield conversation(question, row["answers"][0], references=row["answers"], **more)


def arc_row(row: Row) -> tuple[str, list[str], int]:
    """Return question, choices and the index of the right one; labels are letters or numbers."""
    asked = row["question"]
    labels = [choice["label"] for choice in asked["choices"]]
    return asked["stem"], [choice["text"] for choice in asked["choices"]], labels.index(row["answerKey"])


def choice(question: str, choices: Sequence[str], right: int) -> Row:
    """Return a question whose answer is the letter of one of its choices; the letter is a token's beginning there."""
    lines = "\n".join(f"- {text}={letter}" for text, letter in zip(choices, _LETTERS, strict=False))
    answer = _LETTERS[right]
    return conversation(f"{question}\n{lines}\nAnswer with the letter.", answer, references=[answer])


def pairs(question: str, choices: Sequence[str], right: int) -> Iterator[Row]:
    """Yield the right choice in words before each of the wrong ones."""
    for index, wrong in enumerate(choices):
        if index != right and wrong != choices[right]:
            yield {"prompt": question, "chosen": choices[right], "rejected": wrong}


def titles(path: Path, most: int) -> Iterator[Row]:
    """Yield arXiv abstracts with their titles as answers; a record is the title, a blank line and the abstract."""
    found = (record["text"] for record in read(path) if record["src"].startswith("arxiv"))
    for _, text in zip(range(most), found, strict=False):
        title, _, abstract = text.partition("\n\n")
        if title.strip() and abstract.strip():
            yield conversation(
                f"Give this abstract a title.\n\n{abstract.strip()}", title.strip(), references=[title.strip()]
            )


def instruction_rows(
    count: int,
    *,
    held_out: bool,
    seed: int = 0,
    kinds: Sequence[str] | None = None,
    words: Sequence[str] | None = None,
) -> Iterator[Row]:
    """Yield self-made instructions with what checks their replies; arguments as of `make_instructions`."""
    for item in make_instructions(count, seed, held_out=held_out, kinds=kinds, words=words):
        yield conversation(item.question, item.answer, kind=item.kind, values=item.values)


def baselines(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Return exact match and F1, in [0, 1], of answers that need no model.

    Args:
        rows: of FairytaleQA.
    """
    rules: dict[str, Callable[[Row], str]] = {
        "constant": lambda row: "yes",
        "first sentence": lambda row: sentences(row)[0],
        "best overlap": best_overlap,
    }
    return {
        name: {
            "exact_match": round(fmean(exact_match(rule(row), row["answers"]) for row in rows), 4),
            "f1": round(fmean(token_f1(rule(row), row["answers"]) for row in rows), 4),
        }
        for name, rule in rules.items()
    }


def sentences(row: Row) -> list[str]:
    """Return the sentences of a passage."""
    return [sentence for sentence in _SENTENCE_END.split(" ".join(row["text"].split())) if sentence]


def best_overlap(row: Row) -> str:
    """Return the first sentence that shares most different words with the question."""
    asked = {*normalized(row["question"]).split()}
    return max(sentences(row), key=lambda sentence: len(asked & {*normalized(sentence).split()}))


if __name__ == "__main__":
    main()
