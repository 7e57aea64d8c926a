"""What people are told of a run in rounds: as lines of text, and as a page; read from its folder or from its host.

The host writes status.json anew whenever something happened; a page and a terminal need nothing else. This module
imports no torch, so that asking is quick.
"""

import contextlib
import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fanformer.community.folder import STATUS_FILE
from fanformer.errors import CheckpointError
from fanformer.files.durable import read_json, replace_json
from fanformer.report.charts import Chart, Line
from fanformer.report.page import page, table, text

FORMAT_VERSION = 1
MOST_REFUSALS = 200
"""Refused updates that are told, the newest; rounds.jsonl has all."""


def read_status(folder: Path) -> dict[str, Any]:
    """Read the status of a run in a folder.

    Raises:
        CheckpointError: if there is none.
    """
    path = folder / STATUS_FILE
    try:
        return check_status(read_json(path), str(path.absolute()))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"cannot read {path.absolute()} ({type(error).__name__}): is this the folder of a run of `fanformer "
            "community host`?"
        ) from error


def note_end(folder: Path, state: str, error: str = "") -> None:
    """Let the status of a run say that its host is not at work any more; where there is none, nothing is said.

    Args:
        folder: of the run.
        state: "stopped" or "failed".
        error: why it failed.
    """
    with contextlib.suppress(CheckpointError, OSError):  # the run has not begun, or the disk is full
        status = read_status(folder)
        away = [{**member, "connected": False} for member in status["members"]]
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        content = {**status, "state": state, "error": error, "members": away, "written": now}
        replace_json(folder / STATUS_FILE, content)


def check_status(content: Any, where: str) -> dict[str, Any]:
    """Return a status that this release can show.

    Raises:
        CheckpointError: if it is something else.
    """
    if not isinstance(content, dict) or content.get("format_version") != FORMAT_VERSION:
        got = content.get("format_version") if isinstance(content, dict) else content
        raise CheckpointError(
            f"{where} must be a status of format version {FORMAT_VERSION}, got {got!r:.40}: ask with the release of "
            "fanformer that the host runs."
        )
    return content


def lines(status: Mapping[str, Any], now: datetime.datetime) -> list[str]:
    """Return a status as lines for a terminal."""
    told = [
        f"run {status['run']}: preset {status['preset']}, {status['parameters']:,} parameters, {_state(status)}",
        f"rounds: {status['number']:,} of {status['rounds']:,} accepted, {status['rejected_rounds']:,} rejected; round "
        f"{status['round']} is open",
        f"tokens: {status['tokens']:,}",
        f"held-out loss: {_loss(status)}",
        f"bytes: {status['bytes_received']:,} received, {status['bytes_sent']:,} sent; an update has "
        f"{status['update_bytes']:,}, the weights {status['base_bytes']:,}",
        f"written {_ago(status['written'], now)}",
        "",
    ]
    for member in status["members"]:
        given = f"{member['tokens']:,} tokens in {member['rounds']:,} rounds, {member['refused']:,} refused"
        link = "connected" if member["connected"] else "away"
        told.append(f"  {member['name']}: {link}, {given}, last report {_ago(member['last_report'], now)}")
    for refusal in status["refusals"][-5:]:
        told.append(f"  refused in round {refusal['round']}, {refusal['member']}: {refusal['reason']}")
    return [_printable(line) for line in told]


def _printable(line: str) -> str:
    """Return a line without what moves a terminal's cursor: a status may come from a stranger."""
    return "".join(letter if letter.isprintable() else "?" for letter in line)


def _state(status: Mapping[str, Any]) -> str:
    return f"{status['state']}: {status['error']}" if status["error"] else str(status["state"])


def _loss(status: Mapping[str, Any]) -> str:
    points = status["held_out"]
    return f"{points[-1][1]:.4f} nats per token (from {points[0][1]:.4f})" if points else "not measured yet"


def _ago(then: str | None, now: datetime.datetime) -> str:
    if then is None:
        return "never"
    seconds = max(0, round((now - datetime.datetime.fromisoformat(then)).total_seconds()))
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds // size} {unit} ago"
    return f"{seconds} seconds ago"


def status_page(status: Mapping[str, Any], script: str = "") -> str:
    """Return the page of a status.

    Args:
        status: of a run.
        script: that the page runs besides.
    """
    title = f"community run {status['run'][:8]}"
    body = [
        f"<h1>{text(title)}</h1>",
        f"<p>Preset {text(status['preset'])}, {status['parameters']:,} parameters, {text(_state(status))}. "
        f"Written at {text(status['written'])}.</p>",
        _summary(status),
        *_charts(status),
        "<h2>Members</h2>",
        _members(status["members"]),
        *_refusals(status["refusals"]),
        *_rounds(status["last_rounds"]),
    ]
    return page(title, body, status, f"{status['run']}.json", script)


def _summary(status: Mapping[str, Any]) -> str:
    header = ["rounds accepted", "rejected", "round open", "tokens", "held-out loss", "received", "sent"]
    row = [
        f"{status['number']:,} of {status['rounds']:,}",
        f"{status['rejected_rounds']:,}",
        str(status["round"]),
        f"{status['tokens']:,}",
        f"{status['held_out'][-1][1]:.4f}" if status["held_out"] else "",
        f"{status['bytes_received'] / 1e6:,.1f} MB",
        f"{status['bytes_sent'] / 1e6:,.1f} MB",
    ]
    return table(header, [row], "the run")


def _charts(status: Mapping[str, Any]) -> list[str]:
    points = status["held_out"]
    if len(points) < 2:
        return []
    tokens, losses = zip(*points, strict=True)
    chart = Chart(
        [Line("held out", 0, 0, tokens, losses)], "Held-out loss after each round", "tokens", "nats per token", "loss",
        logarithmic=False, markers=len(points) < 30,
    )  # fmt: skip
    return ["<h2>Loss</h2>", '<div class="charts">', chart.html(), "</div>"]


def _members(members: Sequence[Mapping[str, Any]]) -> str:
    header = ["member", "link", "tokens", "rounds", "refused", "last report", "data (licence): tokens"]
    rows = [
        [
            member["name"],
            "connected" if member["connected"] else "away",
            f"{member['tokens']:,}",
            f"{member['rounds']:,}",
            f"{member['refused']:,}",
            member["last_report"] or "never",
            ", ".join(f"{name}: {tokens:,}" for name, tokens in member["sources"].items()),
        ]
        for member in members
    ]
    return table(header, rows, "members") if rows else "<p>Nobody has joined yet.</p>"


def _refusals(refusals: Sequence[Mapping[str, Any]]) -> list[str]:
    if not refusals:
        return []
    rows = [[str(one["round"]), one["member"], one["reason"]] for one in reversed(refusals)]
    return ["<h2>Refused updates</h2>", table(["round", "member", "why"], rows, "refused updates")]


def _rounds(rounds: Sequence[Mapping[str, Any]]) -> list[str]:
    if not rounds:
        return []
    header = ["round", "outcome", "counted", "tokens", "held-out loss", "seconds", "received"]
    rows = [
        [
            str(one["round"]),
            "accepted" if one["accepted"] else f"rejected: {one['reason']}",
            f"{one['counted']} of {one['reports']}",
            f"{one['tokens']:,}",
            "" if one["held_out_loss"] is None else f"{one['held_out_loss']:.4f}",
            f"{one['seconds']:.1f}",
            f"{one['bytes_received'] / 1e6:,.2f} MB",
        ]
        for one in reversed(rounds)
    ]
    return ["<h2>The last rounds</h2>", table(header, rows, "rounds")]
