"""Make docs/evidence.md with its pictures, and docs/performance.md, from the ledger, claims.yaml and performance.yaml.

    python benchmarks/evidence/evidence.py [--check]

The same files give the same bytes, on any day and any machine with the pinned requirements. A row that lacks command,
seeds, interval or hardware is an error, and so is a verdict without an interval.
"""

import argparse
import itertools
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from claims import NOT_MEASURED, OTHER_SCALE, Row, judge, load_claims, problems, scale_of
from performance import performance_page
from pictures import draw_curves, draw_horizons, is_horizon
from tables import BREAK, code, how_table, measured_text, number, scale_text, table, threshold_text

from fanformer.comparison.ledger import Entry, read_ledger
from fanformer.errors import ConfigError, DataError, FANformerError

REPOSITORY = Path(__file__).resolve().parents[2]
LEDGER, CLAIMS = Path("benchmarks/results"), Path("benchmarks/claims.yaml")
PAGE, PICTURES = Path("docs/evidence.md"), Path("docs/evidence")
SPEEDS, SPEED_PAGE = Path("benchmarks/performance.yaml"), Path("docs/performance.md")


@dataclass(frozen=True)
class Group:
    """What a reader asks.

    Attributes:
        title: of its part of the page.
        words: what to know before reading the table.
        picture: id of the claim whose newest entry's curves are drawn.
    """

    title: str
    words: str
    picture: str | None = None


GROUPS = {
    "size": Group("Is it smaller?", "Parameters and memory, beside models of the same loss or the same purpose."),
    "quality": Group(
        "Is it better?",
        "Loss at equal tokens, tokens to equal loss, tasks, and rules learned from scratch (the share of right answers "
        "to what training left out, less the baseline's).",
        "tokens-to-equal-loss",
    ),
    "speed": Group(
        "Is it faster?",
        "Ratios to a baseline that took turns with it, and a share of a GPU's peak; [performance.md](performance.md) "
        "has more, and says which operations are counted.",
    ),
    "reliability": Group("Can it be relied on?", "Kills, restarts and damage; zero and one are counts, and exact."),
    "quantization": Group("What do fewer bits cost?", "Held-out loss over that of the folder it was made from."),
    "community": Group(
        "Can several train it together?",
        "Simulated in one process with real updates, a model of about 0.3M parameters; "
        "[community.md](community.md) has the tables.",
    ),
    "depth": Group(
        "Does thinking longer help?",
        "A core of blocks that runs several times, at preset nano's size; products in a group are a rule whose every "
        "position takes one step more. [latent-depth.md](latent-depth.md) says when to turn the dial.",
    ),
    "tuning": Group(
        "Does it learn to answer?",
        "A base of preset nano tuned on real questions, three seeds; [tuning.md](tuning.md) has the recipe.",
    ),
}
HEAD = """# Evidence

Made by `make evidence` from [benchmarks/results](../benchmarks/results) and
[benchmarks/claims.yaml](../benchmarks/claims.yaml); a test fails if this page differs from what they give. Every number
is in a line of `measurements.jsonl` or `trainings.jsonl` there, under the name of its entry.

A verdict is computed: **holds** if the whole interval is on the claim's side of its threshold, **does not hold** if all
of it is on the other side, **undecided** if it straddles the threshold, there is one measurement only, or there are
trainings of fewer than three seeds or one that diverged, **does not count** if a condition was not reached, **not
measured at this scale** if the claim is about another size of model.

An interval over seeds is Student's; a range is the lowest and the highest of repetitions; *exact* is counted, or the
same in every repetition. What says *tuned* was measured on the block of preset `92m-tuned`, the default until
2026-11-28, and judges no claim about `92m`.
"""
PARTS = """## What is each part worth?

Held-out bits per byte with one thing changed, and the difference to the default with its interval over the seeds; the
best first, below 0 the change is better.
"""


def build(repository: Path, output: Path) -> None:
    """Write the pages and pictures below `output`.

    Raises:
        FANformerError: if the ledger or the claims are malformed, or a row lacks what it must have.
    """
    entries = read_ledger(repository / LEDGER)
    rows, speeds = (judge(load_claims(repository / file), entries) for file in (CLAIMS, SPEEDS))
    lacking = problems([*rows, *speeds], entries)
    if lacking:
        raise DataError(f"the evidence page cannot be made: {'; '.join(lacking)}.")
    rows = of_nearest_scale(rows)
    for row in rows:
        if row.claim.group not in GROUPS:
            expected = ", ".join(GROUPS)
            raise ConfigError(f"`group` of claim {row.claim.id} must be one of {expected}, got {row.claim.group!r}.")
    (output / PICTURES).mkdir(parents=True, exist_ok=True)
    for old in (output / PICTURES).glob("*.svg"):
        old.unlink()
    parts = [HEAD]
    for name, group in GROUPS.items():
        mine = [row for row in rows if row.claim.group == name]
        parts += [f"## {group.title}\n", f"{group.words}\n", claims_table(mine)] if mine else []
        drawn = [row.entry for row in mine if row.claim.id == group.picture and row.entry and row.entry.curve]
        if drawn:
            draw_curves(drawn[0], output / PICTURES / f"{name}.svg")
            parts.append(f"![{drawn[0].name}: loss over tokens](evidence/{name}.svg)\n")
    continued = [entry for entry in entries if is_horizon(entry)]
    for name in {entry.details["part_of"] for entry in continued}:
        arms = [entry for entry in continued if entry.details["part_of"] == name]
        draw_horizons(arms, output / PICTURES / f"{name}.svg")
    ablations = [entry for entry in entries if entry.kind == "ablation"]
    parts += [PARTS, ablations_table(ablations)] if ablations else []
    used = [*(row.entry for row in rows if row.entry is not None), *ablations]
    parts += ["## How it was measured\n", how_table(used)]
    (output / PAGE).write_text("\n".join(parts), encoding="utf-8")
    (output / SPEED_PAGE).write_text(performance_page(speeds, entries), encoding="utf-8")


def of_nearest_scale(rows: Sequence[Row]) -> list[Row]:
    """Return rows without those of another scale than the claim's, where it has some of its own."""
    own = {row.claim.id for row in rows if row.verdict != OTHER_SCALE}
    return [row for row in rows if row.verdict != OTHER_SCALE or row.claim.id not in own]


def claims_table(rows: Sequence[Row]) -> str:
    """Return the table of claims: a row for each, in which every entry that measures it has a line."""
    lines = []
    for claim, group in itertools.groupby(rows, key=lambda row: row.claim):
        cells = []
        for row in group:
            if row.entry is None or row.figure is None:
                cells.append([NOT_MEASURED, "-", "-"])
            else:
                measured = measured_text(row.figure) + scale_text(claim, row.entry)
                cells.append([f"**{row.verdict}**", measured, code(row.entry.name)])
        lines.append([claim.claim, threshold_text(claim), *map(BREAK.join, zip(*cells, strict=True))])
    return table(["claim", "threshold", "verdict", "measured", "entry"], lines)


def ablations_table(entries: Sequence[Entry]) -> str:
    """Return a row for each ablation, in which every arm has a line, the best first."""
    rows = []
    for entry in entries:
        arms, default = entry.details["arms"], entry.details["default"]
        losses = {slug: entry.result[f"bits_per_byte_of_{slug}"].value for slug in arms}
        cells = []
        for slug in sorted(arms, key=lambda one: losses[one]):
            words = "the default"
            if slug != default:
                difference = entry.result[f"difference_of_{slug}"]
                ends = f" [{difference.low:+.4f}, {difference.high:+.4f}]" if difference.low is not None else ""
                words = f"{difference.value:+.4f}{ends}"
            size = number(entry.details["parameters_without_embeddings"][slug])
            cells.append([code(arms[slug]), size, f"{losses[slug]:.4f}", words])
        cells += [[f"without result: {line}", "-", "-", "-"] for line in entry.details["troubles"]]
        name = code(entry.name) + (f", {scale}" if (scale := scale_of(entry)) is not None else "")
        rows.append([name, *map(BREAK.join, zip(*cells, strict=True))])
    return table(["entry", "architecture", "parameters in the blocks", "bits per byte", "less the default's"], rows)


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
