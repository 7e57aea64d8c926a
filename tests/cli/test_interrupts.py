"""Ctrl-C at any moment: no traceback, and an exit code that says so."""

import os
import re
import signal
import subprocess
import sys
import time
from functools import partial

import pytest

heeds = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a job in the background ignores SIGINT
OWN_LINES = re.compile(r"import time:.*fanformer\.cli\.(interrupts|failure)$", re.MULTILINE)
DELAYS = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 1.1, 1.5, 2.0, 3.0)
AT_ONCE = 3


def start(words, stderr):
    """Start the command; -X importtime writes to standard error which of its lines have run."""
    program = [sys.executable, "-X", "importtime", "-m", "fanformer.cli.main", *map(str, words)]
    with stderr.open("w") as file:
        return subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=file, preexec_fn=heeds)


def interrupt(process, stderr, delay):
    """Send SIGINT `delay` seconds after the command's own first line, and return its code and what it says."""
    while not OWN_LINES.search(stderr.read_text()) and process.poll() is None:
        time.sleep(0.002)
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    code = process.wait(timeout=60)
    return code, [line for line in stderr.read_text().splitlines() if not line.startswith("import time:")]


@pytest.mark.ci
@pytest.mark.parametrize("verb", ["info", "generate"])
def test_interrupt_at_any_moment_ends_without_a_traceback(saved_model, tmp_path, verb):
    words = {"info": ("info", "nano"), "generate": ("generate", saved_model, "x", "--device", "cpu")}[verb]
    waiting = list(DELAYS[verb == "generate" :: 2])  # every other, so that both together take 20 seconds
    while waiting:
        started = []
        for delay in [waiting.pop() for _ in range(min(AT_ONCE, len(waiting)))]:
            stderr = tmp_path / f"{delay}"
            started.append((start(words, stderr), stderr, delay))
        for process, stderr, delay in reversed(started):  # the shortest delay first
            code, said = interrupt(process, stderr, delay)
            assert code in (130, -signal.SIGINT, 0), (delay, said)
            assert said == [], (delay, code)


LOST_IN_A_DESTRUCTOR = """
import os, signal, sys, time
import click
from fanformer.cli.failure import run_command
class Object:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
@click.command()
def work():
    Object()
    time.sleep(20)
    print("not interrupted")
sys.exit(run_command(work, [], "work"))
"""
IMPORTS_FOR_EVER = """
import sys
import click
from fanformer.cli.failure import run_command
@click.command()
def work():
    import endless
sys.exit(run_command(work, [], "work"))
"""


def test_interrupt_that_a_destructor_swallows_ends_the_command():
    done = subprocess.run(
        [sys.executable, "-c", LOST_IN_A_DESTRUCTOR], capture_output=True, text=True, timeout=60, preexec_fn=heeds
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_interrupt_in_an_import_that_catches_everything_ends_the_command(tmp_path):
    (tmp_path / "endless.py").write_text(
        "import time\nprint('begun', flush=True)\nwhile True:\n    try: time.sleep(1)\n    except BaseException: pass\n"
    )
    program = [sys.executable, "-c", IMPORTS_FOR_EVER]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(program, env=environment, preexec_fn=heeds, **pipes) as process:
        assert process.stdout.readline() == "begun\n"
        process.send_signal(signal.SIGINT)
        try:
            assert process.communicate(timeout=10) == ("", "")
        finally:
            process.kill()
    assert process.returncode == 130
