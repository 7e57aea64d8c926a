import http.server
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import types

import pytest

from fanformer.data import hub
from fanformer.data.documents import Document, open_source
from fanformer.errors import DataError, DependencyError


@pytest.fixture
def hub_at(monkeypatch):
    from huggingface_hub import close_session, constants

    def use(endpoint):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        close_session()

    yield use
    close_session()


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
            hub.HubSource("hf:someone/something", "text")
        assert time.monotonic() - started < 2


@pytest.fixture
def local_hub(hub_at):
    """A hub that answers, and knows the one dataset `known/data`."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_response(200)
            self.end_headers()

        def do_GET(self):
            known = self.path.startswith("/api/datasets/known/data")
            body = json.dumps({"id": "known/data", "sha": "5eed"} if known else {"error": "no such thing"}).encode()
            self.send_response(200 if known else 404)
            if not known:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        hub_at(f"http://127.0.0.1:{server.server_port}")
        yield
        server.shutdown()


@pytest.fixture
def rows(monkeypatch):
    """Rows that stand in for a download: the package `datasets` is an extra, and its streams come from afar."""
    rows = [{"text": "one", "id": 1}, {"text": "two \ud83d", "id": 2}]

    def load_dataset(name, config, *, split, revision, streaming):
        assert (name, split, revision, streaming) == ("known/data", "train", "5eed", True)
        if config not in (None, "small"):
            raise ValueError(f"BuilderConfig '{config}' not found.\nAvailable: small")
        return rows

    package = types.ModuleType("datasets")
    package.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", package)
    return rows


def test_hub_rows_become_documents_of_a_fixed_revision(local_hub, rows):
    source = open_source("hf:known/data:small")
    assert list(source) == [
        Document("one", "known/data:small:1"),
        Document("two \ufffd", "known/data:small:2", replaced_bytes=1),
    ]
    description = source.describe()
    assert (description["dataset"], description["config"], description["revision"]) == ("known/data", "small", "5eed")
    assert source.total_bytes is None


def test_hub_dataset_that_is_unknown_or_lacks_the_column_is_refused(local_hub, rows):
    with pytest.raises(DataError, match=r"data `hf:un/known`: the hub has no dataset `un/known` for you \(.*\)$"):
        open_source("hf:un/known")
    with pytest.raises(DataError, match=r"data `hf:known/data:big` cannot be opened: BuilderConfig 'big' not found\.$"):
        list(open_source("hf:known/data:big"))
    with pytest.raises(DataError, match=r"row 1: no string in column `body`; it has `text`, `id`: name the one"):
        list(open_source("hf:known/data", text_field="body"))


def test_hub_data_without_the_package_is_refused_with_its_extra(local_hub, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        DependencyError, match=r"data `hf:known/data` needs the package `datasets`.*'fanformer\[data\]'"
    ):
        open_source("hf:known/data")


def test_tokenizer_that_the_hub_at_hf_endpoint_does_not_know_is_refused(local_hub):
    from huggingface_hub import constants

    code = (
        "from fanformer.data.tokenizer import load_tokenizer\n"
        "try:\n    load_tokenizer('un/known')\n"
        "except Exception as error:\n    print(type(error).__name__, error, sep=': ')"
    )
    # the packages read their settings when they are imported
    environment = os.environ | {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": constants.ENDPOINT}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    assert re.fullmatch(
        r"ConfigError: tokenizer `un/known` cannot be loaded \(.*\): expected tokenizer.json.*\n", done.stdout
    )


def test_hub_name_without_a_name_is_refused():
    with pytest.raises(DataError, match=r"data `hf:` must be hf:NAME or hf:NAME:CONFIG, got no NAME"):
        hub.HubSource("hf:", "text")


def test_hub_data_offline_is_refused_with_what_to_do():
    with pytest.raises(DataError, match=r"data `hf:a/b` needs the hub, and HF_HUB_OFFLINE=1 .* --data FILE"):
        hub.HubSource("hf:a/b", "text")
