"""Benchmark tasks without local files: the definitions' own data sets, from a hub of their names and layout."""

import json

import pytest

from fanformer.errors import DataError
from fanformer.evaluation.tasks import evaluate_tasks
from tests.evaluation.released_files import write_released_files
from tests.local_hub import LocalHub, point_at

ARC_CARD = """---
configs:
- config_name: ARC-Easy
  data_files:
  - {split: train, path: ARC-Easy/train.jsonl}
  - {split: validation, path: ARC-Easy/train.jsonl}
  - {split: test, path: ARC-Easy/test.jsonl}
---
"""
LAMBADA_CARD = """---
configs:
- config_name: default
  data_files:
  - {split: test, path: test.jsonl}
---
"""


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


@pytest.fixture
def released(tmp_path):
    return write_released_files(tmp_path / "released")


@pytest.fixture
def hub(released, monkeypatch):
    """A hub with ARC-Easy and LAMBADA in the form of their repositories there."""
    pytest.importorskip("lm_eval", reason="needs the extra `eval` (lm-evaluation-harness)")
    from huggingface_hub import close_session

    rows = [json.loads(line) for line in (released / "arc/ARC-Easy-Test.jsonl").read_text().splitlines()]
    questions = [
        {
            "id": str(number),
            "question": row["question"]["stem"],
            "choices": {name: [choice[name] for choice in row["question"]["choices"]] for name in ("text", "label")},
            "answerKey": row["answerKey"],
        }
        for number, row in enumerate(rows)
    ]
    words = [json.loads(line) for line in (released / "lambada/lambada_openai.jsonl").read_text().splitlines()]
    with LocalHub() as server:
        files = {"README.md": ARC_CARD.encode()}
        files |= {f"ARC-Easy/{split}.jsonl": lines(questions) for split in ("train", "test")}
        server.add("datasets", "allenai/ai2_arc", files)
        texts = lines({"text": f"{row['context']} {row['continuation']}"} for row in words)
        server.add("datasets", "EleutherAI/lambada_openai", {"README.md": LAMBADA_CARD.encode(), "test.jsonl": texts})
        point_at(monkeypatch, server.url)
        yield server
    close_session()


def test_hub_gives_the_figures_of_the_released_files(hub, released, make_model, tiny_tokenizer):
    model, names = make_model("fanformer"), ["arc_easy", "lambada"]
    from_hub = evaluate_tasks(model, tiny_tokenizer, names)
    assert from_hub == evaluate_tasks(model, tiny_tokenizer, names, data_dir=released)
    assert from_hub["arc_easy"]["documents"] == 6


def test_data_set_that_the_hub_does_not_give_is_named(hub, make_model, tiny_tokenizer):
    with pytest.raises(DataError, match=r"task data cannot be had from the hub .*allenai/sciq.*--data-dir DIR"):
        evaluate_tasks(make_model("llama"), tiny_tokenizer, ["sciq"])
