"""Make docs/evidence.md with its pictures, and docs/performance.md, from the ledger, claims.yaml and performance.yaml.

    python benchmarks/evidence/evidence.py [--check]

The same files give the same bytes, on any day and any machine with the pinned requirements. A row that lacks command,
seeds, interval or hardware is an error, and so is a verdict without an interval.
"""

import argparse
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from claims import NOT_MEASURED, Row, judge, load_claims, problems, scale_of
from performance import performance_page
from tables import code, hardware_text, interval_text, number, seeds_text, table_row, threshold_text

from fanformer.comparison.ledger import MEASUREMENTS_FILE, TRAININGS_FILE, Entry, Kind, read_ledger
from fanformer.errors import DataError, FANformerError

REPOSITORY = Path(__file__).resolve().parents[2]
LEDGER, CLAIMS = Path("benchmarks/results"), Path("benchmarks/claims.yaml")
PAGE, PICTURES = Path("docs/evidence.md"), Path("docs/evidence")
SPEEDS, SPEED_PAGE = Path("benchmarks/performance.yaml"), Path("docs/performance.md")
# colours that stay apart in every common kind of colour blindness (Okabe and Ito)
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MEASURES = {
    "bits_per_byte": "held-out bits per byte",
    "val_bits_per_byte": "held-out bits per byte",
    "val_loss": "held-out loss, nats per token",
    "loss": "loss, nats per token",
}
HELD_OUT = {"bits_per_byte": "bits per byte", "hole_accuracy": "share right", "loss": "nats per token"}
"""Figures that say how good a training's model is, the first one there is shown, with their units."""
KINDS = {
    "comparison": "Comparisons",
    "ablation": "Ablations",
    "rule": "Rules",
    "training": "Trainings",
    "evaluation": "Evaluations",
    "benchmark": "Benchmarks",
}
NO_COMMAND = "not written yet"
HEAD = """# Evidence

Made by `make evidence` from [benchmarks/results](../benchmarks/results) and
[benchmarks/claims.yaml](../benchmarks/claims.yaml); a test fails if this page differs from what they give.

A verdict is computed: **holds** if the whole interval is on the claim's side of its threshold, **does not hold** if all
of it is on the other side, **undecided** if it straddles the threshold or there is one measurement only, **does not
count** if a condition was not reached, **not measured at this scale** if the claim is about another size of model.
An interval over seeds is Student's; a range is the lowest and the highest of repetitions; *exact* is counted, or the
same in every repetition.

What is dated up to 2026-11-28 and says `fanformer`, `92m` or `nano` was measured on the block that is now
`fanformer-tuned` and preset `92m-tuned`; the default of today has not been measured yet.
"""


def build(repository: Path, output: Path) -> None:
    """Write the page and its pictures below `output`.

    Raises:
        FANformerError: if the ledger or the claims are malformed, or a row lacks what it must have.
    """
    entries = read_ledger(repository / LEDGER)
    files = {True: TRAININGS_FILE, False: MEASUREMENTS_FILE}
    paths = {entry.name: LEDGER / files[entry.kind == "training"] for entry in entries}
    rows, speeds = (judge(load_claims(repository / file), entries) for file in (CLAIMS, SPEEDS))
    lacking = problems([*rows, *speeds], entries)
    if lacking:
        raise DataError(f"the evidence page cannot be made: {'; '.join(lacking)}.")
    folder = output / PICTURES
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.svg"):
        old.unlink()
    pictures = draw_curves(entries, folder)
    parts = [HEAD, "## Claims\n", claims_table(rows, paths)]
    for kind in get_args(Kind):
        chosen = [entry for entry in entries if entry.kind == kind]
        if chosen and kind == "training":
            parts += [f"## {KINDS[kind]}\n", trainings_table(chosen, paths)]
        elif chosen:
            parts += [f"## {KINDS[kind]}\n", *(entry_section(entry, paths[entry.name]) for entry in chosen)]
    if pictures:
        parts.append("## Curves\n")
        parts += [f"{name}\n\n![{name}: loss over tokens](evidence/{name}.svg)\n" for name in pictures]
    (output / PAGE).write_text("\n".join(parts), encoding="utf-8")
    (output / SPEED_PAGE).write_text(performance_page(speeds, entries, paths), encoding="utf-8")


def claims_table(rows: Sequence[Row], paths: dict[str, Path]) -> str:
    """Return the table of claims, a line for each claim and entry."""
    names = ("claim", "threshold", "verdict", "measured", "interval", "scale", "seeds", "hardware", "command")
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in rows:
        claim, entry, figure = row.claim, row.entry, row.figure
        if entry is None or figure is None:
            what = f"{claim.claim} ({claim.note})" if claim.note else claim.claim
            cells = [what, threshold_text(claim), NOT_MEASURED, "-", "-", claim.scale or "any", "-", "-"]
            lines.append(table_row([*cells, claim.command if claim.command == NO_COMMAND else code(claim.command)]))
            continue
        unit = f" ({figure.unit})" if figure.unit not in ("times", "counted", "parameters") else ""
        lines.append(
            table_row(
                [
                    claim.claim,
                    threshold_text(claim),
                    f"**{row.verdict}**",
                    f"[{number(figure.value)}](../{paths[entry.name].as_posix()}){unit}",
                    interval_text(figure),
                    scale_of(entry) or "not of a model's size",
                    seeds_text(entry),
                    hardware_text(entry),
                    code(entry.command),
                ]
            )
        )
    return "\n".join(lines) + "\n"


def entry_section(entry: Entry, path: Path) -> str:
    """Return one entry: how it was measured, then its figures."""
    made = {
        "command": code(entry.command),
        "seeds": seeds_text(entry),
        "hardware": hardware_text(entry),
        "versions": ", ".join(f"{name} {number}" for name, number in entry.versions.items()),
        "data": "none"
        if entry.data is None
        else f"{code(str(entry.data['source']))}, fingerprint {code(str(entry.data['fingerprint'])[:16])}",
    }
    lines = [
        f"### {entry.name}\n",
        f"{entry.what[0].upper()}{entry.what[1:]} ({entry.date}, [raw](../{path.as_posix()})).\n",
    ]
    lines += [f"- {name}: {text}" for name, text in made.items()]
    table = ablation_table(entry) if entry.kind == "ablation" else figures_table(entry)
    return "\n".join([*lines, "", *table]) + "\n"


def figures_table(entry: Entry) -> list[str]:
    """Return a line for each figure of an entry."""
    lines = ["| figure | value | interval | unit |", "|---|---:|---|---|"]
    for name, figure in entry.result.items():
        lines.append(table_row([name.replace("_", " "), number(figure.value), interval_text(figure), figure.unit]))
    return lines


def ablation_table(entry: Entry) -> list[str]:
    """Return a line for each arm of an ablation, the best first."""
    default = entry.details["default"]
    names = ("architecture", "parameters in the blocks", "held-out bits per byte", "less the default's")
    lines = ["| " + " | ".join(names) + " |", "|---|---:|---:|---|"]
    arms = entry.details["arms"]
    for slug in sorted(arms, key=lambda one: entry.result[f"bits_per_byte_of_{one}"].value):
        size = number(entry.details["parameters_without_embeddings"][slug])
        loss = f"{entry.result[f'bits_per_byte_of_{slug}'].value:.4f}"
        words = "the default"
        if slug != default:
            difference = entry.result[f"difference_of_{slug}"]
            ends = f" [{difference.low:+.4f}, {difference.high:+.4f}]" if difference.low is not None else ""
            words = f"{difference.value:+.4f}{ends}"
        lines.append(table_row([code(arms[slug]), size, loss, words]))
    lacking = entry.details["troubles"]
    return [*lines, *["", *(f"- without result: {line}" for line in lacking)]] if lacking else lines


def trainings_table(entries: Sequence[Entry], paths: dict[str, Path]) -> str:
    """Return a line for each training: there are too many of them for a section each."""
    names = ("training", "parameters", "held out", "tokens/s", "seeds", "data", "hardware", "command")
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for entry in entries:
        measured = [(name, entry.result[name]) for name in HELD_OUT if name in entry.result]
        held_out = f"{number(measured[0][1].value)} ({HELD_OUT[measured[0][0]]})" if measured else "diverged"
        counted = [
            number(entry.result[name].value) if name in entry.result else "-"
            for name in ("parameters", "tokens_per_second")
        ]
        source = "generated" if entry.data is None else code(str(entry.data["source"]))
        link = f"[{entry.what}](../{paths[entry.name].as_posix()})"
        last = [seeds_text(entry), source, hardware_text(entry), code(entry.command)]
        lines.append(table_row([link, counted[0], held_out, counted[1], *last]))
    return "\n".join(lines) + "\n"


def series(entries: Sequence[Entry]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Return the curves that belong in one picture, by the picture's and the curve's name.

    Entries with the same `details.comparison` share a picture; the points of one entry may have an `arm` each. What is
    part of a comparison is drawn by the comparison's own entry.
    """
    pictures: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for entry in entries:
        for point in entry.curve if "part_of" not in entry.details else ():
            if "tokens" in point and any(measure in point for measure in MEASURES):
                picture = re.sub(r"[^A-Za-z0-9._-]+", "-", str(entry.details.get("comparison", entry.name)))
                label = str(point.get("arm", entry.details.get("arm", entry.name)))
                pictures.setdefault(picture, {}).setdefault(label, []).append(point)
    return pictures


def draw_curves(entries: Sequence[Entry], folder: Path) -> list[str]:
    """Draw every picture into the folder and return their names."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pictures = series(entries)
    for name, curves in sorted(pictures.items()):
        points = [point for curve in curves.values() for point in curve]
        measure = next(key for key in MEASURES if any(key in point for point in points))
        settings = {"svg.hashsalt": name, "svg.fonttype": "none", "font.family": "DejaVu Sans", "font.size": 10}
        with matplotlib.rc_context(settings):
            figure, axes = pyplot.subplots(figsize=(7, 4.2))
            for index, (label, curve) in enumerate(sorted(curves.items())):
                chosen = [(point["tokens"], point[measure]) for point in curve if measure in point]
                colour, dash = COLOURS[index % len(COLOURS)], ("-", "--", ":")[index // len(COLOURS) % 3]
                axes.plot(*zip(*chosen, strict=True), dash, label=label, color=colour, marker="o", markersize=3)
            axes.set(xlabel="tokens", ylabel=MEASURES[measure], title=name)
            axes.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
            axes.legend(frameon=False)
            figure.tight_layout()
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None, "Creator": None})
            pyplot.close(figure)
    return sorted(pictures)


def difference(repository: Path) -> list[str]:
    """Return the files of the page that differ from what the ledger gives, or lie there without being part of it."""
    with tempfile.TemporaryDirectory() as made:
        build(repository, Path(made))
        roots = (Path(made), repository)
        names = {path.relative_to(root) for root in roots for path in (root / PICTURES).glob("*.svg")}
        names |= {PAGE, SPEED_PAGE}
        content = {name: [path.read_bytes() if path.exists() else None for path in (root / name for root in roots)]
                   for name in names}  # fmt: skip
    return sorted(name.as_posix() for name, (new, old) in content.items() if new != old)


def main() -> int:
    """Make the page, or say whether it is what the ledger gives."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if the page is out of date")
    arguments = parser.parse_args()
    try:
        stale = difference(REPOSITORY)
        if not arguments.check:
            build(REPOSITORY, REPOSITORY)
    except FANformerError as error:
        print(error, file=sys.stderr)
        return 2
    word = "out of date" if arguments.check else "written"
    print(f"{word}: {', '.join(stale)}" if stale else f"{PAGE} and {SPEED_PAGE} are what the ledger gives")
    return 1 if arguments.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
