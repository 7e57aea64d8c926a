import gzip
import io
import json
import os
import pickle
import re
import socket
import subprocess
import sys
import threading
import time

import pytest

from fanformer.data.sources import hub
from fanformer.data.sources.documents import Document, open_source
from fanformer.data.sources.readers import Fields
from fanformer.errors import DataError, DependencyError
from tests.local_hub import LocalHub, point_at

CARD = """---
license: odc-by
configs:
- config_name: all
  default: true
  data_files: [{split: train, path: data/**/*.parquet}]
- config_name: sample-10BT
  data_files: [{split: train, path: sample/10BT/*.parquet}]
- config_name: untrained
  data_files: [{split: test, path: sample/10BT/*.parquet}]
- config_name: empty
  data_files: [{split: train, path: empty/*.parquet}]
- config_name: nowhere
  data_files: [{split: train, path: nowhere/*.parquet}]
- config_name: damaged
  data_files: [{split: train, path: damaged/*.parquet}]
---
# A set
"""
NAME, LINES = "some/set", "some/lines"
FILES, ROWS, GROUP_ROWS = 3, 2500, 500


def texts_of(file):
    """Return texts that no compression makes small, so that a file takes several requests."""
    return [f"{file}.{row} " + os.urandom(40).hex() for row in range(ROWS)]


def parquet(texts, **columns):
    import pyarrow
    from pyarrow import parquet

    buffer = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": texts, **columns}), buffer, row_group_size=GROUP_ROWS)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def texts():
    return [texts_of(file) for file in range(FILES)]


@pytest.fixture
def hub_at(monkeypatch):
    from huggingface_hub import close_session

    yield lambda endpoint: point_at(monkeypatch, endpoint)
    close_session()


@pytest.fixture
def impatient(monkeypatch):
    """Waits of milliseconds, ours and those of the packages below."""
    import functools

    import datasets
    from huggingface_hub import hf_file_system

    for name in dir(datasets.config):
        if name.startswith("STREAMING_") and name.endswith("_INTERVAL"):
            monkeypatch.setattr(datasets.config, name, 0.01)
    for name in ("STREAMING_OPEN_MAX_RETRIES", "STREAMING_READ_MAX_RETRIES"):
        monkeypatch.setattr(datasets.config, name, 1)
    for name in ("http_backoff", "http_stream_backoff"):
        quick = functools.partial(getattr(hf_file_system, name), max_retries=0)
        monkeypatch.setattr(hf_file_system, name, quick)
    monkeypatch.setattr(hub, "FIRST_WAIT_SECONDS", 0.001)


@pytest.fixture
def local_hub(hub_at, impatient, texts):
    """A hub with a set of parquet files in several configurations, and one of jsonl files without a card."""
    lines = ["".join(json.dumps({"text": text, "id": 1}) + "\n" for text in texts[file]).encode() for file in (0, 1)]
    files = {"README.md": CARD.encode()}
    files["data/more/0.parquet"] = parquet(["one", "two"], id=[1, 2])
    files["empty/0.parquet"] = parquet(["", ""])
    files["damaged/0.parquet"] = parquet(texts[0])[:-100]
    for number, content in enumerate(texts):
        files[f"sample/10BT/{number:03}_00000.parquet"] = parquet(content, id=list(range(ROWS)))
    with LocalHub() as server:
        server.add("datasets", NAME, files)
        server.add(
            "datasets", LINES, {"data/train-0.jsonl": lines[0], "data/train-1.jsonl.gz": gzip.compress(lines[1])}
        )
        server.add("datasets", "some/broken", {"train.jsonl": b'{"text": "a"}\n{"text": \n'})
        hub_at(server.url)
        yield server


def read(source, number, skip=0):
    return [(document.name, document.text) for document in source.read_part(number, skip)]


def named(source, number, texts, first=1):
    prefix = f"{source.describe()['dataset']}/{source.parts[number]}"
    return [(f"{prefix}:{row}", text) for row, text in enumerate(texts[number], start=1) if row >= first]


def test_hub_that_refuses_connections_is_reported_at_once(hub_at):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    hub_at(f"http://127.0.0.1:{port}")
    with pytest.raises(DataError, match=rf"needs the hub, and http://127.0.0.1:{port} does not answer \(.*\): go on"):
        open_source("hf:someone/something:config")


def test_hub_that_never_answers_is_given_up(hub_at, monkeypatch):
    monkeypatch.setattr(hub, "HUB_TIMEOUT_SECONDS", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        hub_at(f"http://127.0.0.1:{silent.getsockname()[1]}")
        started = time.monotonic()
        with pytest.raises(DataError, match=r"does not answer \(.*\): go on offline with --data FILE"):
            hub.HubSource("hf:someone/something", Fields("text"))
        assert time.monotonic() - started < 2


def test_hub_that_is_overloaded_is_reported_at_once(local_hub):
    local_hub.fail("HEAD /", status=503)
    with pytest.raises(DataError, match=r"does not answer \(HTTP status 503\): go on"):
        open_source(f"hf:{NAME}")


def test_each_file_of_the_configuration_is_a_part_of_a_fixed_revision(local_hub, texts):
    source = open_source(f"hf:{NAME}:sample-10BT")
    assert source.parts == [f"sample/10BT/{number:03}_00000.parquet" for number in range(FILES)]
    repository = local_hub.repositories["datasets", NAME]
    assert source.describe() == {
        "kind": "hub",
        "dataset": NAME,
        "config": "sample-10BT",
        "split": "train",
        "revision": repository.head,
        "licence": "odc-by",
        "text_field": "text",
        "source_field": None,
        "licence_field": None,
        "parts": source.parts,
    }
    assert source.total_bytes is None
    repository.commit({"README.md": b"all data is gone"})
    for number in (2, 0, 1):  # in any order, from another process too
        assert read(pickle.loads(pickle.dumps(source)), number) == named(source, number, texts)


def test_default_configuration_is_the_one_the_card_names(local_hub):
    source = open_source(f"hf:{NAME}")
    assert source.describe()["config"] == "all"
    assert list(source) == [
        Document("one", f"{NAME}/data/more/0.parquet:1"),
        Document("two", f"{NAME}/data/more/0.parquet:2"),
    ]


@pytest.mark.parametrize("skip", [0, 1, GROUP_ROWS, 2 * GROUP_ROWS + 7, ROWS - 1, ROWS])
@pytest.mark.parametrize("spec", [f"hf:{NAME}:sample-10BT", f"hf:{LINES}"])
def test_part_goes_on_after_any_row(local_hub, texts, spec, skip):
    source = open_source(spec)
    assert read(source, 0, skip) == named(source, 0, texts, first=skip + 1)


def test_row_groups_before_the_first_row_wanted_and_other_columns_are_not_fetched(local_hub):
    import pyarrow

    wide = {
        "text": [os.urandom(6000).hex() for _ in range(1000)],
        "other": [os.urandom(6000).hex() for _ in range(1000)],
    }
    content = parquet(pyarrow.array(wide["text"]), other=wide["other"])
    local_hub.add("datasets", "some/wide", {"train.parquet": content})
    source = open_source("hf:some/wide")
    local_hub.requests.clear()
    assert len(read(source, 0, skip=950)) == 50
    asked = [re.fullmatch(r"bytes=(\d+)-(\d+)", request.range) for request in local_hub.asked("GET /storage/")]
    fetched = sum(int(match[2]) - int(match[1]) for match in asked)
    # the last of 20 row groups and the table of contents, each with 5 MB read ahead
    assert fetched < len(content) / 2, (fetched, len(content))


def test_compressed_jsonl_is_read_as_the_plain_one(local_hub, texts):
    source = open_source(f"hf:{LINES}")
    assert source.parts == ["data/train-0.jsonl", "data/train-1.jsonl.gz"]
    assert (source.describe()["config"], source.describe()["licence"]) == ("default", None)
    assert read(source, 1) == named(source, 1, texts)


def test_string_that_is_not_utf8_is_counted(local_hub):
    import pyarrow

    damaged = pyarrow.array([b"caf\xe9"]).cast(pyarrow.string(), safe=False)
    local_hub.add("datasets", "some/latin", {"train.parquet": parquet(damaged)})
    assert list(open_source("hf:some/latin")) == [Document("caf\ufffd", "some/latin/train.parquet:1", replaced_bytes=1)]


@pytest.fixture
def small_requests(monkeypatch):
    """Fetch 16 KB at a time, so that a break comes after some rows of a small file."""
    from fsspec.spec import AbstractBufferedFile

    monkeypatch.setattr(AbstractBufferedFile, "DEFAULT_BLOCK_SIZE", 1 << 14)


FAULTS = {
    "server error": {"status": 503},
    "connection lost in the body": {"drop_at_byte": 1000},
    "too many requests": {"status": 429},
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize(
    ("spec", "after"), [(f"hf:{NAME}:sample-10BT", 0), (f"hf:{NAME}:sample-10BT", 5), (f"hf:{LINES}", 0)]
)
def test_stream_that_breaks_loses_and_repeats_no_row(local_hub, texts, caplog, small_requests, spec, fault, after):
    source = open_source(spec)
    local_hub.fail("GET /storage/", times=3, after=after, **fault)
    assert read(source, 0) == named(source, 0, texts)
    assert not local_hub.faults[0].times
    broke_at = [int(row) for row in re.findall(r"after row (\d+)", caplog.text)]
    assert len(broke_at) == 3
    assert (broke_at[0] > 0) == bool(after)


def test_hub_that_goes_away_and_comes_back_is_waited_for(local_hub, texts, caplog, small_requests):
    source = open_source(f"hf:{NAME}:sample-10BT")
    stream = source.read_part(0)
    got = [next(stream) for _ in range(70)]
    local_hub.stop()
    threading.Timer(0.1, local_hub.start).start()
    got += stream
    assert [(document.name, document.text) for document in got] == named(source, 0, texts)
    assert re.search(r"after row 1024", caplog.text), caplog.text


def test_opening_is_tried_again_too(local_hub):
    local_hub.fail(f"GET /api/datasets/{NAME}", times=2, status=500)
    assert open_source(f"hf:{NAME}").parts == ["data/more/0.parquet"]


def test_hub_that_is_gone_for_good_ends_the_stream_with_the_row_it_broke_at(local_hub, monkeypatch):
    monkeypatch.setattr(hub, "MAX_FAILURES", 3)
    source = open_source(f"hf:{NAME}:sample-10BT")
    local_hub.fail("GET /storage/", times=99, status=502)
    with pytest.raises(
        DataError,
        match=r"^data `hf:some/set:sample-10BT`, sample/10BT/001_00000.parquet after row 20: .*502.* "
        r"\(3 failures in a row\): once the hub answers, the same command goes on there$",
    ):
        read(source, 1, skip=20)
    local_hub.stop()
    with pytest.raises(DataError, match=r"sample/10BT/002_00000.parquet after row 0: .*\(3 failures in a row\)"):
        read(source, 2)
    local_hub.start()


def test_outage_is_given_up_after_a_time_as_well(monkeypatch):
    monkeypatch.setattr(hub, "FIRST_WAIT_SECONDS", 0.01)
    monkeypatch.setattr(hub, "LONGEST_OUTAGE_SECONDS", 0.05)
    outage, started = hub._Outage(), time.monotonic()
    while outage.wait("no answer"):
        pass
    assert outage.failures < hub.MAX_FAILURES
    assert time.monotonic() - started < 1


REFUSALS = {
    "hf:un/known": r"the hub has no dataset `un/known` that you may read: check the name, or log in with `hf auth",
    "hf:a/b/c": r"must be hf:OWNER/NAME\[:CONFIG\], got Repo id must be in the form",
    "hf:some/private": r"no dataset `some/private` that you may read: .* or HF_TOKEN if it is private",
    "hf:some/gated": r"access to `some/gated` must be asked for: do so at http://.*/datasets/some/gated, then log in",
    f"hf:{NAME}:sample-10B": r"`some/set` has no configuration `sample-10B`: did you mean `sample-10BT`\?",
    f"hf:{NAME}:untrained": r"must have files of a split `train`, got test: name another dataset",
    f"hf:{NAME}:nowhere": r"must have files of a split `train`, got none: name another dataset",
    "hf:some/several": r"must name one of its configurations, as hf:some/several:one; it has one, two$",
    "hf:some/script": r"cannot be opened \(Dataset scripts are no longer supported, but found script.py\): name a",
    "hf:some/nothing": r"while it was opened: .*: check the dataset on the hub, or name another",
}


@pytest.fixture
def odd_sets(local_hub):
    """Sets that cannot be opened."""
    local_hub.add("datasets", "some/private", {"a.jsonl": b"{}"}, private=True)
    local_hub.add("datasets", "some/gated", {"a.jsonl": b'{"text": "a"}\n'}, gated=True)
    local_hub.add("datasets", "some/script", {"script.py": b"import datasets\n"})
    local_hub.add("datasets", "some/nothing", {"README.md": b"# nothing\n"})
    one, two = ({"config_name": name, "data_files": f"{name}.jsonl"} for name in ("one", "two"))
    card = f"---\nconfigs: {json.dumps([one, two])}\n---\n".encode()
    local_hub.add("datasets", "some/several", {"README.md": card, "one.jsonl": b'{"text": "a"}', "two.jsonl": b"{}"})
    return local_hub


@pytest.mark.parametrize(("spec", "message"), REFUSALS.items(), ids=REFUSALS)
def test_dataset_that_cannot_be_opened_is_refused_in_one_line(odd_sets, spec, message):
    with pytest.raises(DataError, match=message) as caught:
        open_source(spec)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"data `{spec}`")


def test_gated_and_private_datasets_open_for_whoever_may_read_them(odd_sets, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", odd_sets.TOKEN)
    assert [document.text for document in open_source("hf:some/gated")] == ["a"]
    assert open_source("hf:some/private").parts == ["a.jsonl"]


@pytest.mark.parametrize("spec", [f"hf:{NAME}:sample-10BT", f"hf:{LINES}"])
def test_missing_column_is_named_with_those_there_are(local_hub, spec):
    with pytest.raises(DataError, match=r"no column `body`; it has `text`, `id`: name the one that holds text"):
        read(open_source(spec, text_field="body"), 0)
    with pytest.raises(DataError, match=r"column `id` must hold strings, got int64"):
        read(open_source(spec, text_field="id"), 0)


def test_empty_and_damaged_files_are_refused(local_hub):
    with pytest.raises(DataError, match=r"data `hf:some/set:empty` holds no text: name a source that does"):
        list(open_source(f"hf:{NAME}:empty"))
    with pytest.raises(DataError, match=r"damaged/0.parquet: not a complete parquet file \(.*\): fetch it again"):
        list(open_source(f"hf:{NAME}:damaged"))
    with pytest.raises(DataError, match=r"train.jsonl after row 0: .*: check the dataset on the hub"):
        list(open_source("hf:some/broken"))


def test_hub_data_without_the_package_is_refused_with_its_extra(local_hub, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DependencyError, match=r"data `hf:some/set` needs the package `datasets`.*'fanformer\[data\]'"):
        open_source(f"hf:{NAME}")


def test_tokenizer_that_the_hub_at_hf_endpoint_does_not_know_is_refused(tmp_path):
    code = (
        "from fanformer.data.tokenizer import load_tokenizer\n"
        "try:\n    load_tokenizer('un/known')\n"
        "except Exception as error:\n    print(type(error).__name__, error, sep=': ')"
    )
    with LocalHub() as server:
        # the packages read their settings when they are imported
        environment = os.environ | server.environment(tmp_path)
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=60
        )
    assert re.fullmatch(
        r"ConfigError: tokenizer `un/known` cannot be loaded \(.*\): expected tokenizer.json.*\n", done.stdout
    )


def test_hub_name_without_a_name_is_refused():
    with pytest.raises(DataError, match=r"data `hf:` must be hf:NAME or hf:NAME:CONFIG, got no NAME"):
        hub.HubSource("hf:", Fields("text"))


def test_hub_data_offline_is_refused_with_what_to_do():
    with pytest.raises(DataError, match=r"data `hf:a/b` needs the hub, and HF_HUB_OFFLINE=1 .* --data FILE"):
        hub.HubSource("hf:a/b", Fields("text"))
