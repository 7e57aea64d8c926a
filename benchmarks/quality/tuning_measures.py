"""What a tuned model is measured by in tuning.py: its answers, whether they end, and what it forgot of its base."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from answer_data import Row, read
from tuning_data import SETS, question, score

from fanformer.evaluation.loss import evaluate_documents
from fanformer.generation.interruption import Interruption
from fanformer.generation.settings import GenerationSettings
from fanformer.generation.text_model import Batch
from fanformer.generation.torch_model import TorchModel
from fanformer.loading import load, load_model, load_tokenizer

LONGEST_ANSWER = 64
"""Tokens after which an answer that has not ended is cut; all right answers but one title have fewer."""
_ROWS_AT_ONCE = 16


def bits_per_byte(folder: Path, base: Path, text: Path) -> float:
    """Return the bits per byte of a text by the model of `folder`, in the tokens of its base."""
    model = load_model(folder, "cpu", "float32")
    tokenizer = load_tokenizer(base, model.config.vocab_size)
    texts = [record["text"] for record in read(text)]
    return evaluate_documents(model, tokenizer, texts).figures().bits_per_byte


def answers(model: TorchModel, rows: Sequence[Row]) -> list[tuple[str, bool | None]]:
    """Return the most likely answer to each row's question, and whether it ended by itself.

    A question that leaves no room for an answer is not asked: its answer is nothing, and whether that ended is None.
    """
    settings = GenerationSettings(max_length=LONGEST_ANSWER, temperature=0.0)
    asked = [model.encode_messages(row["messages"][:1]) for row in rows]
    room = (model.positions or 1 << 30) - LONGEST_ANSWER
    found: dict[int, tuple[str, bool | None]] = dict.fromkeys(range(len(rows)), ("", None))
    fitting = [index for index, ids in enumerate(asked) if len(ids) <= room]
    fitting.sort(key=lambda index: len(asked[index]))
    for start in range(0, len(fitting), _ROWS_AT_ONCE):
        chosen = fitting[start : start + _ROWS_AT_ONCE]
        batch = Batch([asked[index] for index in chosen], [""] * len(chosen), settings, None, Interruption())
        for index, new in zip(chosen, model.continue_batch(batch), strict=True):
            ended = bool(new) and new[-1] in model.end_ids
            found[index] = model.tokenizer.decode(new[:-1] if ended else new, skip_special_tokens=True), ended
    return [found[index] for index in range(len(rows))]


def measure(folder: Path, base: Path, data: Path, *, blind: bool) -> dict[str, Any]:
    """Return the scores of a tuned folder on every held-out set, and its bits per byte.

    `ended` is of the answers to questions that were asked, and `unasked` counts the others; scores are of all.

    Args:
        folder: the tuned model.
        base: what it was tuned from.
        data: folder of the held-out sets and text.
        blind: whether stories are asked about without their passages.
    """
    model = TorchModel(*load(folder, "cpu", "float32"))
    found: dict[str, Any] = {}
    replies, ends = {}, []
    for name in SETS:
        file = "fairytale-blind" if blind and name == "fairytale" else name
        rows = list(read(data / f"valid-{file}.jsonl"))
        given = answers(model, rows)
        ends += [end for _, end in given]
        found[name] = score(name, rows, [text for text, _ in given])
        replies[name] = [
            {"question": question(row)[-80:], "reply": text} for row, (text, _) in zip(rows, given, strict=True)
        ][:5]
    asked = [end for end in ends if end is not None]
    found |= {"ended": sum(asked) / max(1, len(asked)), "unasked": len(ends) - len(asked)}
    found["bits_per_byte"] = bits_per_byte(folder, base, data / "held-out.jsonl")
    found["replies"] = replies
    return found


def measure_preferences(folder: Path, base: Path, data: Path) -> dict[str, Any]:
    """Return the last held-out figures of a run on preferences, and its bits per byte."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    measured = [record for record in map(json.loads, lines) if "val_margin" in record]
    last = {name.removeprefix("val_"): value for name, value in measured[-1].items() if name.startswith("val_")}
    return {**last, "bits_per_byte": bits_per_byte(folder, base, data / "held-out.jsonl")}
