"""Two workers behind vllm-router, in its own environment, and HAProxy: streams, hang-ups, a worker that leaves."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time

import pytest

from fanformer.server.models import ServedModel, SlotSettings
from tests.saved_models import saved_model, tiny_tokenizer  # noqa: F401
from tests.server.conftest import PATIENCE_SECONDS, Client, offline, running
from tests.server.test_faults import LONG, sent, wait_for
from tests.server.test_gate import slowed

pytestmark = pytest.mark.ci

PINS = ("vllm-router==0.1.17", "orjson==3.13.0", "setproctitle==1.3.8")
SHORT = {"prompt": "the cat", "max_tokens": 12, "temperature": 0}


@pytest.fixture(scope="module")
def python(python_with):
    """An interpreter that has the router beside what this one has."""
    return python_with(*PINS)


def vllm_router(request, workers, port):
    """Return the command of vllm-router before workers, and its environment."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        metrics = free.getsockname()[1]
    command = [
        request.getfixturevalue("python"), "-m", "vllm_router.launch_router", "--host", "127.0.0.1", "--port", port,
        "--prometheus-port", metrics, "--policy", "round_robin", "--health-check-interval-secs", 1,
        "--health-failure-threshold", 1, "--worker-urls", *(f"http://127.0.0.1:{worker.port}" for worker in workers),
    ]  # fmt: skip
    return command, {}


def haproxy(request, workers, port):
    """Return the command of HAProxy before workers, with the file that we give, and its environment."""
    if shutil.which("haproxy") is None and "FANFORMER_NEEDS_PACKAGES" not in os.environ:
        pytest.skip("HAProxy is not installed: Debian's package haproxy")
    repository = request.getfixturevalue("repository")
    places = {f"REPLICA_{number}": f"127.0.0.1:{worker.port}" for number, worker in enumerate(workers, start=1)}
    return ["haproxy", "-f", repository / "examples/serving/haproxy.cfg"], {"LISTEN": f"127.0.0.1:{port}", **places}


@pytest.fixture
def workers(saved_model):  # noqa: F811
    """Two servers with the tiny model, in threads."""
    from fanformer.loading import load_text_model

    with contextlib.ExitStack() as stack:
        found = []
        for _ in range(2):
            model = ServedModel.open(saved_model, "tiny", SlotSettings(2, 100, queue_size=8), device="cpu")
            stack.callback(model.close)
            client = stack.enter_context(running({"tiny": model}))
            client.model = model
            found.append(client)
        found[0].model.offline = load_text_model(saved_model, device="cpu")
        yield found


@pytest.fixture(params=[vllm_router, haproxy], ids=["vllm-router", "haproxy"])
def router(request, workers, tmp_path):
    """A client of a router before both workers."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command, places = request.param(request, workers, port)
    environment = {**os.environ, **places}
    log = (tmp_path / "router.log").open("w")
    process = subprocess.Popen([str(word) for word in command], stdout=log, stderr=log, cwd=tmp_path, env=environment)
    client = Client(port)
    until = time.monotonic() + PATIENCE_SECONDS
    while True:
        assert process.poll() is None, (tmp_path / "router.log").read_text()
        with contextlib.suppress(OSError):
            if client("GET", "/health")[0] == 200:
                break
        assert time.monotonic() < until, (tmp_path / "router.log").read_text()
        time.sleep(0.1)
    yield client
    process.kill()
    process.wait()
    log.close()


def requests_of(worker):
    return sum(worker.model.scheduler.counters.finished.values())


def test_answers_and_streams_come_through_from_both_workers(router, workers):
    [expected] = offline(workers[0].model, ["the cat"], temperature=0, max_length=12)
    for _ in range(4):
        assert router.complete(**SHORT)["choices"][0]["text"] == expected.text
        chunks = router.events(**SHORT)
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == expected.text
    assert all(requests_of(worker) >= 2 for worker in workers)


def test_a_hang_up_reaches_the_worker(router, workers, monkeypatch):
    for worker in workers:
        slowed(worker.model, monkeypatch, 0.02)
    for stream in (True, False):
        before = sum(worker.model.scheduler.counters.finished["cancelled"] for worker in workers)
        begun = sent(router, LONG, stream=stream)
        wait_for(lambda: sum(worker.model.scheduler.running for worker in workers) == 1)
        begun.close()
        wait_for(lambda: sum(w.model.scheduler.counters.finished["cancelled"] for w in workers) == before + 1)  # noqa: B023


@pytest.mark.parametrize("way", ["drain", "dead"])
def test_the_other_worker_answers_when_one_leaves(router, workers, way):
    [expected] = offline(workers[0].model, ["the cat"], temperature=0, max_length=12)
    if way == "drain":
        workers[1].server.handle_exit(signal.SIGTERM, None)
    else:
        workers[1].server.should_exit = workers[1].server.force_exit = True
        workers[1].thread.join(PATIENCE_SECONDS)
    for _ in range(10):
        assert router.complete(**SHORT)["choices"][0]["text"] == expected.text
    assert requests_of(workers[1]) == 0


@pytest.mark.parametrize("router", [haproxy], indirect=True)
@pytest.mark.parametrize("path", ["/metrics", "/%6detrics", "/metrics?a=1"])
def test_the_numbers_of_a_replica_are_not_for_everybody(router, workers, path):
    assert workers[0]("GET", path)[0] == 200
    assert router("GET", path)[0] == 404


def test_errors_keep_their_shape(router):
    status, error = router.refused(prompt="a", temperature=5)
    assert (status, error["param"]) == (400, "temperature")
    status, error = router.refused(prompt="a", suffix="b")
    assert (status, error["param"]) == (400, "suffix")
