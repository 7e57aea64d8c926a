"""Cells of the tables of docs/evidence.md and docs/performance.md."""

from collections.abc import Sequence

from claims import Claim, scale_of, thresholds

from fanformer.comparison.ledger import EXACT, Entry, Figure

SIGNS = {"at_least": "at least", "at_most": "at most", "more_than": "more than", "less_than": "less than"}

BREAK = "<br>"
"""Between the lines of a cell."""


def table_row(cells: Sequence[str]) -> str:
    """Return cells as a line of a Markdown table; none may be empty."""
    assert all(cell.strip() for cell in cells), f"an empty cell in {cells}"
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def code(text: str) -> str:
    """Return a text as code, also where it holds a backtick."""
    return f"`` {text} ``" if "`" in text else f"`{text}`"


def number(value: float) -> str:
    """Return a number with its digits grouped; fractions with four significant digits."""
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join([table_row(header), "|" + "---|" * len(header), *map(table_row, rows)]) + "\n"


def interval_text(figure: Figure) -> str:
    """Return a figure's interval and what it is."""
    if figure.low is None or figure.high is None:
        return EXACT if figure.interval == EXACT else "one measurement"
    return f"{number(figure.low)} to {number(figure.high)}, {figure.interval}"


def measured_text(figure: Figure) -> str:
    """Return a figure with its unit and its interval."""
    unit = f"{figure.unit}; " if figure.unit not in ("times", "counted", "parameters", "ratio") else ""
    return f"{number(figure.value)} ({unit}{interval_text(figure)})"


def scale_text(claim: Claim, entry: Entry) -> str:
    """Return the scale of an entry as an addition to what was measured, where the claim doesn't say it."""
    scale = scale_of(entry)
    return "" if scale in (None, claim.scale) else f", {scale}"


def threshold_text(claim: Claim) -> str:
    """Return what a claim demands."""
    text = ", ".join(f"{SIGNS[name]} {number(limit)}" for name, limit in thresholds(claim).items())
    return f"{text} (aim {claim.aim})" if claim.aim else text


def seeds_text(entry: Entry) -> str:
    """Return an entry's seeds."""
    return ", ".join(map(str, entry.seeds)) or "nothing random"


def hardware_text(entry: Entry) -> str:
    """Return an entry's hardware in a few words."""
    hardware = entry.hardware
    gpus = [str(gpu) for gpu in hardware.get("gpus", [])]
    processor = str(hardware["cpu"]).replace("(R)", "").replace("not recorded", "CPU not recorded")
    memory = hardware.get("memory_bytes")
    words = [*gpus, processor, f"{hardware['cores']} cores"]
    return ", ".join([*words, f"{memory / 2**30:.0f} GiB"] if isinstance(memory, int) else words)


def how_table(entries: Sequence[Entry]) -> str:
    """Return what it takes to measure again: a row for each day and machine, in which every entry has a line."""
    made: dict[tuple[str, str], dict[str, list[str]]] = {}
    for entry in sorted(entries, key=lambda one: (one.date, one.name)):
        lines = made.setdefault((entry.date, hardware_text(entry)), {})
        lines[entry.name] = [code(entry.name), seeds_text(entry), code(entry.command)]
    rows = [[*key, *map(BREAK.join, zip(*lines.values(), strict=True))] for key, lines in sorted(made.items())]
    return table(["date", "hardware", "entry", "seeds", "command"], rows)
