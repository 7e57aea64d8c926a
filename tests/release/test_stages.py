"""A chain of stages: what is done stays done, another recipe is refused, and the status is that of a queue."""

import json

import pytest

from fanformer.comparison.queue import read_status
from fanformer.errors import ConfigError

SETTINGS = {"text": {"shards": 4}, "base": {"shards": 4, "layers": 5}, "box": {"shards": 4, "layers": 5}}


@pytest.fixture
def chain(tmp_path):
    from stages import Chain

    made = Chain(tmp_path, SETTINGS)
    made.begin("text")
    made.finish("text", {"documents": 12000, "share": 0.25})
    made.begin("base")
    return made


def test_a_stage_is_done_where_it_has_a_result(chain, tmp_path):
    from stages import Chain

    again = Chain(tmp_path, SETTINGS)
    assert again.result("text") == {"documents": 12000, "share": 0.25}
    assert again.result("base") is again.result("box") is None
    again.begin("base")
    again.begin("text")  # done already: stays so
    assert again.result("text") is not None


def test_a_stage_that_was_begun_otherwise_is_refused(chain, tmp_path):
    from stages import Chain

    other = Chain(tmp_path, {**SETTINGS, "base": {"shards": 4, "layers": 6}, "box": {}})
    assert other.result("text") is not None
    assert other.result("box") is None  # not begun: free to change
    with pytest.raises(ConfigError, match=r"stage base of .* was begun with layers 5, got 6: put that back, .*delete"):
        other.begin("base")


def test_the_lines_say_where_it_stands(chain, tmp_path):
    run = tmp_path / "base"
    run.mkdir()
    parts = {name: {"a": 1} for name in ("configuration", "model", "data", "environment")}
    (run / "run.yaml").write_text(json.dumps({**parts, "length": {"max_steps": 9765}}))
    records = [{"step": 800, "elapsed_seconds": 2000.0}, {"step": 1200, "elapsed_seconds": 3240.0}]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    text, base, box = chain.lines(SETTINGS)
    assert text == "text       done     documents 12,000, share 0.2500"
    assert base == "base       stopped  step 1,200 of 9,765, 12%, after 0.90 h"
    assert box == "box        waiting"
    assert chain.lines(SETTINGS, is_running=True)[1].startswith("base       running  step 1,200 of")


def test_the_status_is_one_that_compare_reads(chain, tmp_path):
    chain.tell(list(SETTINGS), running="base")
    content, running = read_status(tmp_path)
    assert not running
    assert {name: entry["state"] for name, entry in content["entries"].items()} == {
        "text": "done",
        "base": "running",
        "box": "waiting",
    }
