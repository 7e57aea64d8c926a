"""A preparation that is killed at any moment, and started again, gives the same folder to the byte."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from fanformer.data.preparation import journal, selection
from fanformer.data.preparation.prepare import open_prepared, prepare
from fanformer.data.sources.documents import open_source
from fanformer.data.tokenizer import train_tokenizer
from fanformer.errors import ConfigError, DataError
from tests.warm_processes import WarmParent

WORDS = "the small model spoke of many things and then of none while rain fell on an old stone bridge".split()  # noqa: SIM905
WARM = (
    "fanformer.data.sources.documents",
    "fanformer.data.preparation.prepare",
    "fanformer.data.tokenizer",
    "tests.data.restart_worker",
    "regex",
    "transformers.models.auto.tokenization_auto",
    "transformers.tokenization_utils_tokenizers",
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Three files of texts, some repeated, some too short for the filter."""
    folder = tmp_path_factory.mktemp("corpus")
    chance = random.Random(5)
    texts = [" ".join(chance.choices(WORDS, k=chance.randrange(5, 90))) + f" {i}" for i in range(3000)]
    texts += chance.sample(texts, 300)
    chance.shuffle(texts)
    for number in range(3):
        lines = [json.dumps({"text": text, "origin": f"book {len(text) % 3}"}) for text in texts[number::3]]
        (folder / f"part-{number}.jsonl").write_text("\n".join(lines) + "\n")
    return f"{folder}/*.jsonl"


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([" ".join(WORDS) + " 0123456789"] * 9, 400).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def warm():
    """Start preparations in processes that have imported what they need."""
    with WarmParent(*WARM) as parent:
        yield parent


@pytest.fixture(scope="module")
def start(warm):
    def begin(corpus, out, tokenizer="", workers=1, delay=0.0):
        words = [corpus, out, tokenizer, workers, delay]
        return warm.start(words, out.parent, call="tests.data.restart_worker:main")

    return begin


@pytest.fixture(scope="module")
def run(start):
    """Prepare to the end, and return how many batches that took."""

    def whole(*arguments, **options):
        process = start(*arguments, **options)
        assert process.wait() == 0, process.stderr.read_text()
        return batches(process)

    return whole


def batches(process):
    """Return how many batches a process has encoded so far."""
    return process.stdout.read_text().count("encoding\n")


def wait_for_batches(process, count):
    while batches(process) < count:
        assert process.poll() is None, process.stderr.read_text()
        time.sleep(0.002)


def content(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def uninterrupted(run, corpus, tokenizer_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    run(corpus, out, tokenizer_folder)
    files = content(out)
    assert len([name for name in files if name.startswith("train-")]) > 3
    assert open_prepared(out).metadata["dropped"].keys() == {"min-words", "duplicate"}
    return files


@pytest.mark.parametrize("count", [1, 4, 9])
def test_killed_preparation_goes_on_to_the_same_bytes(
    start, run, tmp_path, corpus, tokenizer_folder, uninterrupted, count
):
    process = start(corpus, tmp_path / "out", tokenizer_folder, delay=0.02)
    wait_for_batches(process, count + 1)
    process.kill()
    process.wait()
    assert os.listdir(tmp_path).count("out") == 0
    assert run(corpus, tmp_path / "out", tokenizer_folder) > 0
    assert content(tmp_path / "out") == uninterrupted
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.ci
@pytest.mark.timeout(900)
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_kills_at_random_moments_change_nothing(start, run, tmp_path, corpus, seed, workers):
    run(corpus, tmp_path / "whole")
    out, chance, kills = tmp_path / "out", random.Random(seed), 0
    while not out.exists():
        process = start(corpus, out, workers=workers, delay=0.02)
        try:
            process.wait(chance.uniform(0, 0.5 + kills / 4))
        except TimeoutError:  # and killed
            process.wait()
            kills += 1
    assert kills > 0
    if (out / "work").exists():  # killed when the folder had its name already: the next command tidies up
        start(corpus, out, workers=workers).wait()
    assert content(out) == content(tmp_path / "whole")


def test_number_of_workers_does_not_change_the_result(run, tmp_path, corpus, tokenizer_folder, uninterrupted):
    run(corpus, tmp_path / "out", tokenizer_folder, workers=2)
    assert content(tmp_path / "out") == uninterrupted


def test_workers_end_when_their_main_process_is_killed(start, tmp_path, corpus, tokenizer_folder):
    psutil = pytest.importorskip("psutil")
    process = start(corpus, tmp_path / "out", tokenizer_folder, workers=2, delay=0.1)
    own, children = psutil.Process(process.pid), []
    while len([child for child in children if "spawn_main" in " ".join(child.cmdline())]) < 2:
        assert process.poll() is None, process.stderr.read_text()
        children = own.children(recursive=True)
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)  # it alone, and not its process group
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=20)
    assert children
    assert alive == []


def test_second_process_is_told_who_prepares_the_folder(start, tmp_path, corpus, tokenizer_folder):
    process = start(corpus, tmp_path / "out", tokenizer_folder, delay=0.2)
    wait_for_batches(process, 1)
    with pytest.raises(DataError, match=rf"out is in use by process {process.pid} on \S+ since \S+: wait until it end"):
        prepare(open_source(corpus), tmp_path / "out", tokenizer=None, vocab_size=300)
    process.kill()
    process.wait()


class Stop(Exception):
    pass


@pytest.fixture
def begun(tmp_path, corpus, monkeypatch):
    """A preparation that was stopped after a few batches, and a function that goes on with other arguments."""
    monkeypatch.setattr(journal, "INTERVAL_SECONDS", 0.0)
    monkeypatch.setattr(selection, "BATCH_CHARACTERS", 20_000)

    def go(stop=False, spec=corpus, **arguments):
        def progress(done, total):
            calls.append(done)
            if stop and len(calls) == 4:
                raise Stop

        calls = []
        defaults = {"tokenizer": None, "vocab_size": 400}
        return prepare(open_source(spec), tmp_path / "out", **(defaults | arguments), progress=progress)

    with pytest.raises(Stop):
        go(stop=True)
    assert os.listdir(tmp_path) == ["out.partial"]
    return go


@pytest.mark.parametrize(
    ("arguments", "difference"),
    [
        ({"held_out_fraction": 0.1}, r"`held_out_fraction` 0.05, not 0.1"),
        ({"vocab_size": 500}, r"`tokenizer` 400, not 500"),
        ({"filters": ["min-words"]}, r"`filters` \[\], not \['min-words'\]"),
        ({"deduplicate": True}, r"`deduplicate` False, not True"),
        ({"max_bytes": 10**9}, r"`max_bytes` None, not 1000000000"),
    ],
)
def test_other_arguments_are_refused_with_what_differs(begun, arguments, difference):
    with pytest.raises(DataError, match=rf"out.partial was begun with {difference}: give the same again to go on from"):
        begun(**arguments)
    begun()


def test_changed_source_is_refused_with_the_file_that_changed(begun, corpus):
    path = Path(corpus.replace("*", "part-1"))
    before = path.read_bytes()
    path.write_bytes(before + b'{"text": "one more"}\n')
    try:
        with pytest.raises(DataError, match=r"another source \(`files` as they were before part-1.jsonl changed\)"):
            begun()
    finally:
        path.write_bytes(before)
    begun()


def test_damaged_work_is_refused(begun, tmp_path):
    partial = tmp_path / "out.partial"
    shard = partial / "train-00000.bin"
    kept = shard.read_bytes()
    shard.write_bytes(b"")
    with pytest.raises(DataError, match=r"train-00000.bin is not as it was left: delete .*out.partial and prepare"):
        begun()
    shard.write_bytes(kept)
    tokenizer = (partial / "tokenizer.json").read_text()
    (partial / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"out.partial lacks the tokenizer it was begun with: delete it to start anew"):
        begun()
    (partial / "tokenizer.json").write_text(tokenizer)
    entry = (partial / "work" / "journal.json").read_text()
    for content, message in (
        ("{", "is damaged: delete"),
        ("[" * 100_000, "is damaged: delete"),
        ('{"version": ' + "2" * 5000 + "}", "is damaged: delete"),
        (entry.replace('"documents_of_part": ', '"documents_of_part": 1'), "is damaged: delete"),
        (entry.replace('"arguments": {', '"arguments": [], "none": {'), "is damaged: delete"),
        (entry.replace('"entry": {', '"entry": {"position": {}, "others": {'), "is damaged: delete"),
        (entry.replace(f'"version": {journal.JOURNAL_VERSION}', '"version": 9'), "got 9: del"),
    ):
        (partial / "work" / "journal.json").write_text(content)
        with pytest.raises(DataError, match=message):
            begun()
    (partial / "work" / "journal.json").write_text(entry)
    begun()
    assert os.listdir(tmp_path) == ["out"]


def test_error_in_late_data_keeps_the_work_that_is_worth_it(tmp_path, monkeypatch):
    monkeypatch.setattr(journal, "INTERVAL_SECONDS", 0.0)
    monkeypatch.setattr(selection, "BATCH_CHARACTERS", 2000)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine line of text"}\n' * 1500 + "broken\n")
    tokenizer = train_tokenizer(["fine line of text"], 300)
    with pytest.raises(DataError, match=r"a.jsonl:1501: .* \(what was done is kept in .*out.partial, and the same com"):
        prepare(open_source(str(path)), tmp_path / "out", tokenizer=tokenizer, vocab_size=0)
    assert sorted(os.listdir(tmp_path)) == ["a.jsonl", "out.partial"]


def test_folder_completed_just_before_a_kill_needs_no_more_than_tidying(run, tmp_path, corpus, tokenizer_folder):
    run(corpus, tmp_path / "out", tokenizer_folder)
    (tmp_path / "out" / "work").mkdir()
    with pytest.raises(DataError, match="out exists already"):
        prepare(open_source(corpus), tmp_path / "out", tokenizer=None, vocab_size=300)
    assert not (tmp_path / "out" / "work").exists()


@pytest.mark.parametrize("name", ["workers", "shard_tokens"])
def test_numbers_below_one_are_refused(tmp_path, corpus, name):
    with pytest.raises(ConfigError, match=rf"`{name}` must be at least 1, got 0"):
        prepare(open_source(corpus), tmp_path / "out", tokenizer=None, vocab_size=300, **{name: 0})


def test_lock_of_a_dead_process_does_not_hold(start, run, tmp_path, corpus, tokenizer_folder):
    process = start(corpus, tmp_path / "out", tokenizer_folder, delay=5)
    wait_for_batches(process, 1)
    process.kill()
    process.wait()
    assert (tmp_path / "out.lock").exists()
    started = time.monotonic()
    run(corpus, tmp_path / "out", tokenizer_folder)
    assert time.monotonic() - started < 60
    assert os.listdir(tmp_path) == ["out"]
