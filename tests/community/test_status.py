"""The status of a run: as lines, as a page, from a folder; and what is none."""

import contextlib
import datetime
import json
import signal

import pytest

from fanformer.cli.main import main
from fanformer.community.folder import KEYS_FOLDER, STATUS_FILE
from fanformer.community.identity import CERTIFICATE, PUBLIC_KEY
from fanformer.community.status import lines, note_end, read_status, status_page
from fanformer.errors import CheckpointError
from fanformer.training.events import silent
from tests.pages import Reader

NOW = datetime.datetime(2026, 11, 29, 12, 0, tzinfo=datetime.UTC)


def a_status(**changes):
    """A status as a host writes it."""
    member = {"name": "alice", "connected": True, "last_report": "2026-11-29T11:58:00+00:00", "excuse": "",
              "tokens": 2048, "rounds": 2, "refused": 1, "sources": {"stdlib (PSF-2.0)": 2048}}  # fmt: skip
    known = {
        "format_version": 1, "run": "cafe0123cafe0123", "preset": "nano", "parameters": 1234567, "state": "training",
        "error": "", "written": "2026-11-29T11:59:30+00:00", "round": 3, "number": 2, "rounds": 10,
        "rejected_rounds": 1, "tokens": 4096, "held_out": [[2048, 6.5], [4096, 6.25]], "bytes_received": 50_000,
        "bytes_sent": 90_000, "update_bytes": 20_000, "base_bytes": 40_000, "round_seconds": 60.0, "last_reports": {},
        "members": [member], "refusals": [{"round": 1, "member": "mallory", "reason": "not finite <b>"}],
        "last_rounds": [{"round": 2, "accepted": True, "reason": "", "counted": 1, "reports": 2, "tokens": 2048,
                         "held_out_loss": 6.25, "seconds": 4.0, "bytes_received": 20_000}],
    }  # fmt: skip
    return {**known, **changes}


def test_lines_tell_members_rounds_tokens_loss_bytes_and_refusals():
    text = "\n".join(lines(a_status(), NOW))
    for words in ("1,234,567 parameters, training", "2 of 10 accepted, 1 rejected; round 3 is open", "tokens: 4,096",
                  "6.2500 nats per token (from 6.5000)", "50,000 received, 90,000 sent", "written 30 seconds ago",
                  "alice: connected, 2,048 tokens in 2 rounds, 1 refused, last report 2 minutes ago",
                  "refused in round 1, mallory: not finite"):  # fmt: skip
        assert words in text


def test_a_strangers_status_does_not_move_the_cursor():
    shown = lines(a_status(state="training\x1b[2J\r\u202e"), NOW)
    assert all(line.isprintable() or not line for line in shown)


def test_the_page_has_all_of_it_and_markup_of_nobody():
    page = status_page(a_status())
    assert json.loads(Reader(page).record) == a_status()
    assert "not finite &lt;b&gt;" in page
    assert "stdlib (PSF-2.0): 2,048" in page
    assert "Held-out loss after each round" in page
    young = status_page(a_status(members=[], refusals=[], last_rounds=[], held_out=[]))
    assert "Nobody has joined yet." in young


def test_status_of_a_folder(tmp_path, capsys):
    (tmp_path / STATUS_FILE).write_text(json.dumps(a_status()))
    assert main(["community", "status", str(tmp_path)]) == 0
    assert "2 of 10 accepted" in capsys.readouterr().out
    assert main(["community", "status", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == a_status()


def test_a_status_says_how_a_host_ended(tmp_path):
    note_end(tmp_path, "stopped")  # before the run has one
    assert list(tmp_path.iterdir()) == []
    (tmp_path / STATUS_FILE).write_text(json.dumps(a_status()))
    note_end(tmp_path, "failed", "the disk has no room")
    found = read_status(tmp_path)
    assert "failed: the disk has no room" in lines(found, NOW)[0]
    assert found["written"] > a_status()["written"]
    assert [one["connected"] for one in found["members"]] == [False]


def test_a_host_that_sigterm_ends_says_that_it_was_stopped(tmp_path, monkeypatch, capsys):
    from fanformer.cli.community import _host

    def sigterm(*given):
        signal.getsignal(signal.SIGTERM)(signal.SIGTERM, None)

    run = tmp_path / "run"
    (run / KEYS_FOLDER).mkdir(parents=True)
    for file in (run / KEYS_FOLDER / CERTIFICATE, run / PUBLIC_KEY):
        file.write_text("")
    (run / STATUS_FILE).write_text(json.dumps(a_status()))
    module = "fanformer.community"
    monkeypatch.setattr(f"{module}.hosted_run.begun", lambda *given: contextlib.nullcontext())
    monkeypatch.setattr("fanformer.cli.community._plan", lambda *given: None)
    monkeypatch.setattr(f"{module}.flower.processes.HostProcesses", lambda *given: contextlib.nullcontext())
    monkeypatch.setattr(f"{module}.flower.keeping.keep", sigterm)
    with pytest.raises(SystemExit) as ended:
        _host({}, {"preset": "nano", "output_dir": str(run)}, tmp_path, [], ("127.0.0.1", 8000), silent)
    assert ended.value.code == 128 + signal.SIGTERM
    assert "stopped" in lines(read_status(run), NOW)[0]
    assert "stopped: the same command goes on from the last round" in capsys.readouterr().out


@pytest.mark.parametrize("content", [None, "no json", "[]", '{"format_version": 2}'])
def test_what_is_no_status_is_one_line(tmp_path, content, capsys):
    if content is not None:
        (tmp_path / STATUS_FILE).write_text(content)
    with pytest.raises(CheckpointError, match=r"status\.json"):
        read_status(tmp_path)
    assert main(["community", "status", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
