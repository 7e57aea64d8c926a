"""What this package needs of the system is there on Windows and macOS too."""

import os
import resource
import signal
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest

from fanformer.data.preparation import workers

WITHOUT_WHAT_WINDOWS_LACKS = """
import importlib, os, pkgutil, signal, sys

import fanformer

# once with everything, so that other packages have taken what they need of this system before it is gone
names = [module.name for module in pkgutil.walk_packages(fanformer.__path__, "fanformer.")]
for name in names:
    importlib.import_module(name)
for name in [name for name in sys.modules if name.partition(".")[0] == "fanformer"]:
    del sys.modules[name]

for module in ("fcntl", "grp", "pwd", "readline", "resource", "syslog", "termios", "tty"):
    sys.modules[module] = None
gone = {
    os: "O_DIRECTORY O_NOFOLLOW O_NONBLOCK fchmod fork forkpty getloadavg geteuid getpgid getuid killpg mkfifo pread "
    "pwrite register_at_fork sched_getaffinity setsid statvfs sysconf sysconf_names uname wait",
    signal: "SIGALRM SIGHUP SIGKILL SIGPIPE SIGQUIT SIGSTOP SIGUSR1 SIGUSR2 SIGXCPU pthread_kill pthread_sigmask",
}
for module, attributes in gone.items():
    for name in attributes.split():
        delattr(module, name)

for name in names:
    importlib.import_module(name)

from fanformer.data.preparation.workers import _ctrl_c_held_back
from fanformer.machine.threads import free_cores
from fanformer.machine.versions import hardware

assert hardware()["memory_bytes"] > 0 and free_cores() >= 1
with _ctrl_c_held_back():
    pass
print(len(names))
"""


@pytest.mark.ci
def test_all_modules_are_imported_without_what_windows_lacks():
    done = subprocess.run([sys.executable, "-c", WITHOUT_WHAT_WINDOWS_LACKS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) > 120


@pytest.mark.parametrize(("platform", "unit"), [("linux", 1024), ("darwin", 1)])
def test_peak_of_memory_is_in_bytes_where_the_system_counts_it(monkeypatch, platform, unit):
    usage = SimpleNamespace(ru_maxrss=300_000)
    monkeypatch.setattr(resource, "getrusage", lambda who: usage)
    monkeypatch.setattr(sys, "platform", platform)
    assert workers.peak_bytes() == 300_000 * unit


def test_peak_of_memory_on_windows_is_that_of_its_working_set(monkeypatch):
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=7))
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(psutil, "Process", lambda: process)
    monkeypatch.setitem(sys.modules, "resource", None)
    assert workers.peak_bytes() == 7


def test_ctrl_c_is_held_back_where_the_system_can(monkeypatch):
    with workers._ctrl_c_held_back():
        assert signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_lines_are_read_from_a_terminal_without_readline(monkeypatch):
    from fanformer.cli import chat

    monkeypatch.setitem(sys.modules, "readline", None)
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True, encoding="utf-8"))
    monkeypatch.setattr("builtins.input", lambda prompt: f"typed after {prompt}")
    assert chat.read_line() == "typed after > "


def test_a_lock_is_not_read_where_the_system_locks_its_bytes(tmp_path, monkeypatch):
    from fanformer.errors import DataError
    from fanformer.files.locking import hold

    path = tmp_path / "lock"
    with hold(path, "the folder"):
        path.write_bytes(b"\0" + path.read_bytes()[1:])  # the byte that Windows lets nobody else read
        with pytest.raises(DataError, match=rf"in use by process {os.getpid()} on \S+ since"), hold(path, "the folder"):
            pass
