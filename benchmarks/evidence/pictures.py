"""Pictures of the evidence page: losses over tokens, and errors over the horizon of a series."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean
from typing import Any

from fanformer.comparison.ledger import Entry

# colours that stay apart in every common kind of colour blindness (Okabe and Ito)
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES = ("-", "--", ":")
MEASURES = {
    "bits_per_byte": "held-out bits per byte",
    "val_bits_per_byte": "held-out bits per byte",
    "val_loss": "held-out loss, nats per token",
    "loss": "loss, nats per token",
}


@contextmanager
def picture(path: Path, **labels: str) -> Iterator[Any]:
    """Give axes to draw on, and save what was drawn: the same bytes for the same lines, on any day.

    Args:
        path: of the SVG file.
        labels: of the axes, as `Axes.set` takes them.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    settings = {"svg.hashsalt": path.stem, "svg.fonttype": "none", "font.family": "DejaVu Sans", "font.size": 10}
    with matplotlib.rc_context(settings):
        figure, axes = pyplot.subplots(figsize=(7, 4.2))
        yield axes
        axes.set(**labels)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        figure.tight_layout()
        figure.savefig(path, metadata={"Date": None, "Creator": None})
        pyplot.close(figure)


def draw_curves(entry: Entry, path: Path) -> None:
    """Draw an entry's losses over tokens, a line for each arm."""
    from matplotlib.ticker import EngFormatter

    measure = next(key for key in MEASURES if any(key in point for point in entry.curve))
    arms = sorted({str(point.get("arm", entry.name)) for point in entry.curve})
    with picture(path, xlabel="tokens", ylabel=MEASURES[measure], title=entry.name) as axes:
        for index, arm in enumerate(arms):
            mine = [point for point in entry.curve if str(point.get("arm", entry.name)) == arm and measure in point]
            colour, dash = COLOURS[index % len(COLOURS)], DASHES[index // len(COLOURS) % len(DASHES)]
            x, y = [point["tokens"] for point in mine], [point[measure] for point in mine]
            axes.plot(x, y, dash, label=arm, color=colour, marker="o", markersize=3)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def is_horizon(entry: Entry) -> bool:
    """Whether an entry is how an architecture continued a series."""
    return "horizon" in entry.details


def draw_horizons(entries: Sequence[Entry], path: Path) -> None:
    """Draw the errors of one series' continuations: a band over the seeds for each entry, naive forecasts dashed.

    Left of the vertical line is what training rows reach. A naive forecast whose mean lies above all bands is left out.
    """
    labels = {"xlabel": "steps after what is given", "ylabel": "mean absolute error, standard deviations"}
    told, specs = entries[0].details["horizon"], [str(entry.configuration["architecture"]) for entry in entries]
    with picture(path, title=f"rule {entries[0].details['part_of']}", **labels) as axes:
        for entry, name, colour in zip(entries, without_common_fields(specs), COLOURS, strict=False):
            steps, error, low, high = (
                [point[name] for point in entry.curve] for name in ("step", "error", "low", "high")
            )
            axes.plot(steps, error, color=colour, label=name)
            axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
        top = 1.1 * max(point["high"] for entry in entries for point in entry.curve)
        shown = {name: errors for name, errors in told["baselines"].items() if fmean(errors) < top}
        for (name, errors), dash in zip(shown.items(), ("--", "-.", ":", (0, (1, 4))), strict=False):
            axes.plot(range(1, len(errors) + 1), errors, linestyle=dash, color="#6b7280", linewidth=1, label=name)
        axes.axvline(told["trained_steps"] + 0.5, color="#9ca3af", linewidth=1)
        axes.set_ylim(0, top)


def without_common_fields(specs: Sequence[str]) -> list[str]:
    """Return architectures, NAME[:FIELD=VALUE,...], without the fields that all of them have."""
    parts = [(name, fields.split(",") if fields else []) for name, _, fields in (one.partition(":") for one in specs)]
    common = set.intersection(*(set(fields) for _, fields in parts))
    own = [(name, [field for field in fields if field not in common]) for name, fields in parts]
    return [":".join(filter(None, (name, ",".join(fields)))) for name, fields in own]
