"""A queue does what can be done, says what cannot, keeps everything, and goes on after its time was over."""

import contextlib
import io
import json
import shutil
import time
from dataclasses import replace

import pytest
import yaml

from fanformer.comparison.ledger import read_entry, read_ledger, write_entry
from fanformer.comparison.queue import RECORD_FILE, main, print_lines, read_queue, read_status, run_queue
from fanformer.comparison.sweep import OutOfTimeError
from fanformer.data.preparation.prepare import prepare
from fanformer.data.sources.documents import open_source
from fanformer.errors import ConfigError

RUN = {"vocab_size": 320, "sequence_length": 32, "batch_size": 4, "compile": "off", "precision": "float32"}


def write(path, content):
    path.write_text(yaml.safe_dump(content))
    return path


def small(corpus, folder):
    """A queue with a wrong name, a missing file, a text that is too short, a language and a rule."""
    short = folder / "short.txt"
    short.write_text("a few words")
    defaults = {"data": str(corpus), "tokens": 1280, "learning_rates": 0.01, "evaluations": 2, "eval_tokens": 256}
    entries = [
        {"name": "unknown", "architectures": "lama@60k"},
        {"name": "missing", "architectures": "llama@60k", "data": str(folder / "nowhere.txt")},
        {"name": "short", "architectures": "llama@60k", "data": str(short)},
        {"name": "language", "architectures": ["fanformer@60k", "llama@60k"]},
        {"name": "rule", "rule": "modular-addition", "architectures": "fanformer@60k", "run": {"max_steps": 2}},
    ]
    content = {"output_dir": str(folder / "out"), "record_dir": str(folder / "ledger"), "entries": entries}
    return {**content, "defaults": {**defaults, "run": RUN}}


@pytest.fixture(scope="module")
def done(corpus, tmp_path_factory):
    """A folder with a queue that has run, and what it said."""
    folder, out, err = tmp_path_factory.mktemp("queue"), io.StringIO(), io.StringIO()
    path = write(folder / "queue.yaml", small(corpus, folder))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        assert main([str(path)]) == 2
    return folder, out.getvalue(), err.getvalue()


@pytest.mark.ci
def test_bad_entries_cost_a_line_each_and_stop_no_other(done):
    folder, out, err = done
    unknown, missing, short = err.splitlines()
    assert unknown == "error: unknown: no architecture 'lama': did you mean `llama`?"
    assert missing.startswith(f"error: missing: data `{folder / 'nowhere.txt'}`: no file")
    assert short.startswith("error: short: ")
    assert "bits per byte" in out
    assert "trained" in out

    status, running = read_status(folder / "out")
    states = {name: entry["state"] for name, entry in status["entries"].items()}
    undone = dict.fromkeys(("unknown", "missing", "short"), "cannot be done")
    assert (states, running) == ({**undone, "language": "done", "rule": "done"}, False)

    record = json.loads((folder / "out" / "language" / RECORD_FILE).read_text())
    assert [arm["architecture"] for arm in record["arms"]] == ["fanformer@60k", "llama@60k"]
    assert record["planned"] == record["finished"] == 2
    entries = read_ledger(folder / "ledger")
    assert sorted(entry.kind for entry in entries) == ["comparison", "rule", "training", "training", "training"]
    (together,) = (entry for entry in entries if entry.kind == "comparison")
    mine, theirs = (arm["figures"]["bits_per_byte"]["value"] for arm in record["arms"])
    assert together.result["bits_per_byte_difference"].value == pytest.approx(mine - theirs)
    assert together.data["fingerprint"] == record["data"]["fingerprint"]


@pytest.mark.ci
def test_what_the_ledger_knows_is_not_trained_again(done, corpus, tmp_path):
    folder, _, _ = done
    before = {path: path.stat().st_mtime_ns for path in folder.glob("ledger/*")}
    assert len(before) == 2
    content = {**small(corpus, tmp_path), "record_dir": str(folder / "ledger")}
    assert main([str(write(tmp_path / "queue.yaml", content))]) == 2
    assert not list((tmp_path / "out").glob("trials/*"))
    record, again = (json.loads((place / "out/language" / RECORD_FILE).read_text()) for place in (folder, tmp_path))
    assert (again["arms"], again["pairs"]) == (record["arms"], record["pairs"])
    rules = [json.loads((place / "out/rule" / RECORD_FILE).read_text()) for place in (folder, tmp_path)]
    learned, again = ([one["result"]["details"]["rule"] for one in rule["trainings"]] for rule in rules)
    assert again == learned  # the answers to every question too
    assert {path: path.stat().st_mtime_ns for path in folder.glob("ledger/*")} == before


def stop_at_the_second_seed(event):
    """End everything where the first training of the second seed begins, after those of both architectures at one."""
    if event.kind == "begin" and event.figures["done"] == 2:
        raise OutOfTimeError


@pytest.mark.ci
def test_a_stopped_queue_leaves_the_whole_comparison_of_the_ledger_as_it_is(done, corpus, tmp_path):
    ledger = shutil.copytree(done[0] / "ledger", tmp_path / "ledger")
    write_entry(ledger, replace(read_entry(ledger, "language"), seeds=[0, 1]))
    before = (ledger / "measurements.jsonl").read_bytes()
    entry = {"name": "language", "architectures": ["fanformer@60k", "llama@60k"], "seeds": 2}
    queue = read_queue(write(tmp_path / "queue.yaml", {**small(corpus, tmp_path), "entries": [entry]}))
    with pytest.raises(OutOfTimeError):
        run_queue(queue, stop_at_the_second_seed, "a command")
    record = json.loads((tmp_path / "out" / "language" / RECORD_FILE).read_text())
    assert (record["finished"], record["planned"], len(record["pairs"])) == (2, 4, 1)
    assert read_status(tmp_path / "out")[0]["entries"]["language"]["state"] == "stopped"
    assert (ledger / "measurements.jsonl").read_bytes() == before


@pytest.mark.ci
def test_architectures_see_the_same_rows_and_a_baseline_does_not_call_itself_a_fanformer(done):
    out = done[0] / "out"
    rows = [
        [json.loads(line)["rows"] for line in path.read_text().splitlines() if "rows" in line]
        for path in out.rglob("run/metrics.jsonl")
    ]
    assert len(rows) == 2
    assert rows[0] == rows[1] != []
    cards = [path.read_text() for path in out.rglob("run/README.md")]
    titles = {line for card in cards for line in card.splitlines() if line.startswith("# ")}
    assert titles == {"# FANformer, preset nano", "# llama, trained as preset nano"}


@pytest.mark.slow
def test_a_queue_stops_when_its_time_is_over_and_goes_on(corpus, tmp_path):
    entry = {"name": "one", "architectures": "llama@60k", "data": str(corpus), "learning_rates": 0.01, "run": RUN}
    long = {**entry, "tokens": "100M", "evaluations": 2, "eval_tokens": 256}
    path = write(tmp_path / "queue.yaml", {"output_dir": str(tmp_path / "out"), "entries": [long]})
    for minutes in (0.1, 0.2, 0.4, 0.8):  # on a busy machine the first may end before the first step
        start = time.monotonic()
        assert main([str(path), "--minutes", str(minutes)]) == 75
        assert time.monotonic() - start < 60 * minutes + 60
        status, _ = read_status(tmp_path / "out")
        assert status["entries"]["one"]["state"] == "stopped"
        if list((tmp_path / "out").rglob("checkpoint-*")):
            break
    assert len(list((tmp_path / "out").rglob("checkpoint-*"))) == 1  # it saved before it ended


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], "must hold output_dir, record_dir, defaults, entries, got list"),
        ({"entry": []}, "`entry` is not a field of a queue: did you mean `entries`?"),
        ({"entries": []}, "`entries` must be a list of comparisons"),
        ({"entries": [{"name": "a"}], "defaults": 3}, "`defaults` must hold fields of a comparison"),
        ({"entries": [{"name": "a"}, {"name": "a"}]}, "two entries are called a"),
    ],
)
def test_a_file_that_is_no_queue_is_refused(tmp_path, content, message):
    with pytest.raises(ConfigError) as caught:
        read_queue(write(tmp_path / "queue.yaml", content))
    assert message in str(caught.value)


def test_an_entry_takes_over_the_defaults_and_a_rule_leaves_those_of_language(tmp_path):
    entries = [
        {"name": "a", "architectures": "llama@60k", "run": {"batch_size": 2}},
        {"name": "b", "rule": "modular-addition", "architectures": "llama@60k"},
        {"name": "c/d", "architectures": "llama@60k"},
        {"architectures": "llama@60k"},
    ]
    defaults = {"tokens": "1M", "seeds": 2, "run": RUN}
    queue = read_queue(write(tmp_path / "my.yaml", {"entries": entries, "defaults": defaults}))
    first, second, third, fourth = queue.entries
    assert first.comparison.run == {**RUN, "batch_size": 2}
    assert first.comparison.tokens == (1_000_000,)
    assert (second.error, second.comparison.run, second.comparison.seeds) == (None, {}, (0, 1))
    assert "`name` must be letters" in third.error
    assert (fourth.name, str(fourth.folder)) == ("entry-4", "runs/my/entry-4")


def test_an_entry_with_a_value_that_no_architecture_takes_keeps_its_place_with_its_error(tmp_path):
    entries = [{"architectures": "fanformer@1m:fan_placement=ffm"}, {"architectures": "llama@60k"}]
    wrong, right = read_queue(write(tmp_path / "queue.yaml", {"entries": entries})).entries
    assert wrong.error.startswith("architecture 'fanformer@1m:fan_placement=ffm' cannot be built: ")
    assert right.error is None


@pytest.mark.ci
def test_a_report_that_cannot_be_written_stops_no_training(done, corpus, tmp_path, monkeypatch):
    """The first rate is in the ledger; its page fails, and the second is trained all the same."""
    monkeypatch.setattr("fanformer.comparison.queue._SECONDS_BETWEEN_PAGES", 0.0)
    shutil.copytree(done[0] / "ledger", tmp_path / "ledger")
    entry = {"name": "one", "architectures": "llama@60k", "learning_rates": [0.01, 0.02]}
    queue = read_queue(write(tmp_path / "queue.yaml", {**small(corpus, tmp_path), "entries": [entry]}))
    finished = []

    def publish(record, folder):
        finished.append(record["finished"])
        raise ZeroDivisionError("no page")

    (outcome,) = run_queue(queue, print_lines, "a command", publish=publish)
    assert (outcome.finished, outcome.error) == (2, "the report could not be written, ZeroDivisionError: no page")
    assert finished == [1, 2, 2]
    assert len(list((tmp_path / "out" / "trials").iterdir())) == 1
    assert json.loads((tmp_path / "out" / "one" / RECORD_FILE).read_text())["finished"] == 2


@pytest.mark.slow
def test_the_accelerators_queue_trains_on_prepared_data_with_its_own_preset(repository, corpus, tmp_path):
    fields = yaml.safe_load((repository / "benchmarks" / "queues" / "accelerator.yaml").read_text())
    prepare(open_source(str(corpus)), tmp_path / "prepared", tokenizer=None, vocab_size=320)
    own = {"device": "cpu", "precision": "float32", "compile": "off", "batch_size": 4, "sequence_length": 32}
    small = {"tokens": 256, "seeds": 1, "evaluations": 1, "eval_tokens": 128, "run": own}
    given = {**fields["defaults"], **fields["entries"][0], **small, "data": str(tmp_path / "prepared")}
    given["architectures"] = ["fanformer@60k", "llama@60k"]
    path = tmp_path / "queue.yaml"
    path.write_text(yaml.safe_dump({"output_dir": str(tmp_path / "out"), "entries": [given]}))
    (outcome,) = run_queue(read_queue(path), print_lines, "a command")
    assert (outcome.finished, outcome.error) == (2, None)
