"""A comparison as one HTML page: who is better by how much, every curve and sweep, and the numbers behind them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fanformer.comparison.depth_rules import DepthTask
from fanformer.comparison.pages.depth import DepthParts
from fanformer.comparison.pages.figures import Shown
from fanformer.comparison.pages.language import LanguageParts
from fanformer.comparison.pages.rule import RuleParts
from fanformer.comparison.pages.series import SeriesParts
from fanformer.comparison.rules import TASKS
from fanformer.comparison.series import SeriesContinuation
from fanformer.files.durable import replace_text
from fanformer.report.page import bullets, page, table, text


def write_comparison_page(record: Mapping[str, Any], path: Path) -> None:
    """Write the report of a comparison as one file that needs no other.

    Args:
        record: as `comparison_summary.to_record` returns it, with `name`, `command`, `date`, `hardware`, `versions`,
            `data`, `planned` and `finished` on top where they are known.
        path: of the page.
    """
    title = str(record.get("name", "comparison"))
    shown, rule = Shown(record), record["comparison"]["rule"]
    content = LanguageParts(shown) if rule is None else _parts_of_rule(rule)(shown)
    body = [
        f"<h1>{text(title)}</h1>",
        f'<p class="quiet">{text(_summary(record))}</p>',
        *_warnings(record),
        "<h2>Architectures</h2>",
        table(["name here", "architecture"], [[name, spec] for spec, name in shown.names.items()]),
        *content.parts(),
        *_troubles(shown),
        *_configuration(record),
    ]
    replace_text(path, page(title, body, record, f"{title}.json"))


def _parts_of_rule(name: str) -> type[RuleParts]:
    if name == SeriesContinuation.name:
        return SeriesParts
    return DepthParts if issubclass(TASKS[name], DepthTask) else RuleParts


def _summary(record: Mapping[str, Any]) -> str:
    asked = record["comparison"]
    what = f"rule {asked['rule']}" if asked["rule"] else f"data {asked['data']}"
    seeds, when = len(asked["seeds"]), record.get("date")
    rates = len(asked["learning_rates"])
    several = f"{seeds} seed{'s' if seeds > 1 else ''}, {rates} learning rate{'s' if rates > 1 else ''} each"
    return ", ".join([what, several, *([str(when)] if when else [])])


def _warnings(record: Mapping[str, Any]) -> list[str]:
    found, planned, finished = [], record.get("planned"), record.get("finished", len(record["trainings"]))
    if planned is not None and finished < planned:
        found.append(f"{finished} of {planned} trainings have ended; the same command goes on with the others.")
    edges, arms = sum(arm["at_edge"] for arm in record["arms"]), len(record["arms"])
    if edges:
        told = "have their best learning rate at an end of the sweep, so that a better one may lie beyond: named below."
        found.append(f"{edges} of {arms} results {told}")
    return [f'<p class="warn">{line}</p>' for line in found]


def _troubles(shown: Shown) -> list[str]:
    lines = [line for arm in shown.arms for line in arm["troubles"]]
    edges = [
        f"{arm['architecture']}{shown.of_variant(arm)}: its best learning rate, {arm['learning_rate']:g}, is the "
        f"{'lowest' if arm['learning_rate'] == arm['swept'][0][0] else 'highest'} that was tried; a better one "
        "may lie beyond: give more of them, or --extend 2"
        for arm in shown.arms
        if arm["at_edge"]
    ]
    parts = []
    if edges:
        parts += ["<h2>Best at the edge of the sweep</h2>", bullets(dict.fromkeys(edges))]
    if lines:
        parts += ["<h2>Diverged or failed</h2>", bullets(lines)]
    return parts


def _configuration(record: Mapping[str, Any]) -> list[str]:
    command = [f"<p>Measured by <code>{text(record['command'])}</code></p>"] if record.get("command") else []
    rows = [
        [f"{about}, {name.replace('_', ' ')}", value if isinstance(value, str) else json.dumps(value)]
        for about in ("data", "hardware", "versions")
        for name, value in (record.get(about) or {}).items()
        if value not in (None, [])
    ]
    shown = json.dumps(record["comparison"], indent=2)
    found = ["<h2>Configuration</h2>", *command]
    found.append(f"<details><summary>All settings</summary><pre>{text(shown)}</pre></details>")
    if rows:
        about_run = table(["what", "value"], rows)
        found.append(f"<details><summary>Data, hardware and versions</summary>{about_run}</details>")
    return found
