"""Rule learning as a table, as pictures of the (a, b) plane, and as accuracy over the period."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from fanformer.comparison.ledger import Figure, interval_over_seeds
from fanformer.comparison.rule_learning import RuleResult
from fanformer.comparison.rules import HoleTask, PeriodicContinuation, RuleTask
from fanformer.errors import ConfigError, DataError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# A comparison counts only where every training example was learned, or nearly: else the hole says nothing of the rule.
COUNTS_FROM_TRAIN_ACCURACY = 0.99
# Told apart by every common kind of colour vision. Source: Okabe and Ito, Color Universal Design, 2008.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vPX"
_FORMATS = (".png", ".svg", ".pdf")

Results = Mapping[str, Sequence[RuleResult]]
"""For each architecture's name its results: any tasks, hole sides and seeds, in any order."""


def _percent(figure: Figure) -> str:
    """Return a mean over seeds with half of its interval."""
    spread = "" if figure.high is None else f" +- {figure.high - figure.value:.1f}"
    return f"{figure.value:.1f}{spread}"


@dataclass(frozen=True)
class _Cell:
    """One architecture's seeds on one task."""

    architecture: str
    task: RuleTask
    results: tuple[RuleResult, ...]

    @property
    def learned(self) -> bool:
        """Whether every seed learned what it was trained on."""
        return all(result.score.train.greedy >= COUNTS_FROM_TRAIN_ACCURACY for result in self.results)

    def over_seeds(self, part: str, figure: str) -> str:
        """Return a figure of "train" or "test" in percent, the mean over the seeds with its 95% t-interval."""
        shares = [getattr(getattr(result.score, part), figure) for result in self.results]
        return _percent(interval_over_seeds([100 * share for share in shares], "%"))

    def setting(self, name: str) -> str:
        """Return a setting's value, or all of them where seeds differ."""
        values = sorted({result.settings[name] for result in self.results})
        return ", ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)


def _cells(results: Results) -> dict[RuleTask, list[_Cell]]:
    """Return the results by task, tasks in the order of name and hole, architectures in the order given."""
    if not any(results.values()):
        raise DataError("there is no result to report: got 0 trainings; run train_rule first.")
    tasks = {result.rule for several in results.values() for result in several}
    ordered = sorted(tasks, key=lambda task: (task.name, list(task.to_dict().values())[1:]))
    by_task: dict[RuleTask, list[_Cell]] = {}
    for task in ordered:
        for architecture, several in results.items():
            mine = tuple(result for result in several if result.rule == task)
            if mine:
                by_task.setdefault(task, []).append(_Cell(architecture, task, mine))
    return by_task


def _asked(task: RuleTask) -> str:
    if isinstance(task, HoleTask):
        return f"hole {task.side} x {task.side}"
    if not isinstance(task, PeriodicContinuation):
        raise DataError(
            f"a table of accuracies needs results of a rule with right answers, got those of {task.name}: its errors "
            "stand in the page of a comparison."
        )
    return f"periods {task.trained_period + 1} to {task.longest_period}"


def verdict(cells: Sequence[_Cell]) -> str:
    """Return whether the architectures on one task may be compared, and if not, why."""
    failed = [cell.architecture for cell in cells if not cell.learned]
    if not failed:
        return "yes"
    return f"does not count: train accuracy below {100 * COUNTS_FROM_TRAIN_ACCURACY:.0f}% ({', '.join(failed)})"


def rule_table(results: Results, style: Literal["markdown", "html"] = "markdown") -> str:
    """Return one row for each task and architecture: accuracies in percent with 95% t-intervals over the seeds.

    Args:
        results: for each architecture its trainings.
        style: of the table.

    Raises:
        DataError: if there is no result, or one of `series`, which has errors instead.
    """
    header = [
        *("rule", "left out of training", "architecture", "parameters in the blocks", "learning rate", "seeds"),
        *("train, %", "left out, %", "left out, sampled at T = 0.5, %", "counts"),
    ]
    rows = []
    for task, cells in _cells(results).items():
        counts = verdict(cells)
        for cell in cells:
            sizes = sorted({result.block_parameters for result in cell.results})
            rows.append(
                [
                    task.name,
                    _asked(task),
                    cell.architecture,
                    ", ".join(f"{size:,}" for size in sizes),
                    cell.setting("learning_rate"),
                    str(len(cell.results)),
                    cell.over_seeds("train", "greedy"),
                    cell.over_seeds("test", "greedy"),
                    cell.over_seeds("test", "sampled"),
                    counts,
                ]
            )
    if style == "markdown":
        lines = [header, ["---"] * len(header), *rows]
        return (
            "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines) + "\n"
        )
    body = [_html_row("th", header), *(_html_row("td", row) for row in rows)]
    return "<table>\n" + "\n".join(body) + "\n</table>\n"


def _html_row(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def _check_format(path: Path) -> None:
    if path.suffix.lower() not in _FORMATS:
        raise ConfigError(
            f"a picture must end in {', '.join(_FORMATS)}, got {path.name!r}: the ending says its format."
        )


def plot_planes(
    results: Results, task_name: str, path: Path, quantity: Literal["probability", "correct"] = "probability"
) -> None:
    """Draw the (a, b) plane of a hole task, a row of pictures for each architecture, a column for each hole.

    Args:
        results: for each architecture its trainings; those of other tasks are left aside.
        task_name: modular-addition or linear-regression.
        path: where to write; its ending, .png, .svg or .pdf, says the format.
        quantity: "probability" of the right answer at temperature 0.5, or the share of seeds whose greedy answer is
            right; the mean over seeds either way.

    Raises:
        ConfigError: if the ending is none of these.
        DataError: if there is no result of that task.
    """
    _check_format(path)
    cells = {task: found for task, found in _cells(results).items() if task.name == task_name}
    if not cells or not all(isinstance(task, HoleTask) for task in cells):
        raise DataError(f"a picture of the plane needs results of a task with a hole, got none of {task_name!r}.")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    architectures = [name for name in results if any(c.architecture == name for found in cells.values() for c in found)]
    figure, grid = pyplot.subplots(
        len(architectures),
        len(cells),
        figsize=(1.3 + 2.9 * len(cells), 0.7 + 3.0 * len(architectures)),
        dpi=150,
        squeeze=False,
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    image = None
    for column, found in enumerate(cells.values()):
        by_name = {cell.architecture: cell for cell in found}
        for row, name in enumerate(architectures):
            axes = grid[row][column]
            if name not in by_name:
                axes.set_axis_off()
                continue
            image = _draw_plane(axes, by_name[name], quantity, counts=verdict(found) == "yes")
            if row == len(architectures) - 1:
                axes.set_xlabel("a")
            if column == 0:
                axes.set_ylabel(f"{name}\nb")
    what = {"probability": "probability of the right answer, T = 0.5", "correct": "share of seeds that answer right"}
    assert image is not None, "every task has a cell"
    bar = figure.colorbar(image, ax=grid, shrink=0.8, ticks=[0, 0.25, 0.5, 0.75, 1])
    bar.set_label(what[quantity])
    figure.suptitle(f"{task_name}: answers inside and outside the hole, which is outlined", fontsize=11)
    figure.savefig(path)
    pyplot.close(figure)


def _draw_plane(axes: "Axes", cell: _Cell, quantity: str, counts: bool) -> Any:
    """Draw the mean over the seeds and return the image, for the colour bar."""
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    planes = []
    for result in cell.results:
        assert result.score.grid is not None, "a task with a hole has a grid"
        if quantity == "probability":
            planes.append(np.array(result.score.grid.percent) / 100)
        else:
            planes.append(np.array([[sign == "1" for sign in row] for row in result.score.grid.correct], float))
    plane = np.mean(planes, axis=0)  # (a, b)
    image = axes.imshow(plane.T, origin="lower", vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
    assert isinstance(cell.task, HoleTask), "only tasks with a hole are drawn as planes"
    first, last = cell.task.hole
    side = last - first + 1
    # A whole pair outside the hole, so that the line hides none of its pairs.
    corner, length = (first - 1.5, first - 1.5), side + 2
    outline = Rectangle(corner, length, length, fill=False, edgecolor="white", linewidth=1.0)
    outline.set_path_effects([withStroke(linewidth=2.2, foreground="black")])
    axes.add_patch(outline)
    inside, outside = (cell.over_seeds(part, "greedy") for part in ("test", "train"))
    seeds = f"{len(cell.results)} seed{'s' if len(cell.results) > 1 else ''}"
    doubt = "" if counts else ", does not count"
    axes.set_title(f"{_asked(cell.task)}, {seeds}{doubt}\ninside {inside}%, outside {outside}%", fontsize=8)
    axes.tick_params(labelsize=8)
    return image


def plot_periods(results: Results, path: Path) -> None:
    """Draw the accuracy on `periodic` over the period, the mean over seeds with its 95% t-interval.

    Args:
        results: for each architecture its trainings; those of other tasks are left aside.
        path: where to write; its ending, .png, .svg or .pdf, says the format.

    Raises:
        ConfigError: if the ending is none of these.
        DataError: if there is no result of `periodic`, or they are of differing tasks.
    """
    _check_format(path)
    cells = {task: found for task, found in _cells(results).items() if isinstance(task, PeriodicContinuation)}
    if len(cells) != 1:
        raise DataError(
            f"a picture of the periods needs results of one `periodic` task, got {len(cells)} of them: draw each alone."
        )
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    ((task, found),) = cells.items()
    figure, axes = pyplot.subplots(figsize=(7, 4.6), dpi=150, layout="constrained")
    for index, cell in enumerate(found):
        tables = [result.score.by_period or {} for result in cell.results]
        periods = sorted(tables[0])
        points = [interval_over_seeds([100 * table[period].greedy for table in tables], "%") for period in periods]
        means = np.array([point.value for point in points])
        spread = np.array([point.high - point.value if point.high is not None else 0.0 for point in points])
        color = _COLORS[index % len(_COLORS)]
        doubt = "" if cell.learned else ", does not count: train accuracy below 99%"
        label = f"{cell.architecture} ({len(tables)} seed{'s' if len(tables) > 1 else ''}{doubt})"
        marker = _MARKERS[index % len(_MARKERS)]
        axes.plot(periods, means, marker=marker, markersize=5, linewidth=1.6, color=color, label=label)
        low, high = np.clip(means - spread, 0, 100), np.clip(means + spread, 0, 100)
        axes.fill_between(periods, low, high, color=color, alpha=0.18, linewidth=0)
    assert isinstance(task, PeriodicContinuation), "chosen above"
    axes.axvline(task.trained_period + 0.5, color="0.35", linestyle="--", linewidth=1)
    for text, side, where in (("trained ", "right", 0.5), (" never trained", "left", 0.5)):
        axes.text(task.trained_period + where, 103, text, ha=side, va="bottom", fontsize=9, color="0.35")
    axes.set(xlabel="period of the pattern (symbols)", ylabel="right continuations (%)", ylim=(-3, 103))
    axes.set_xticks(range(task.shortest_period, task.longest_period + 1))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=1, fontsize=9)
    figure.suptitle("periodic: the same positions of the row for every period", fontsize=11)
    figure.savefig(path)
    pyplot.close(figure)
