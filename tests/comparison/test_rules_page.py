import dataclasses
import re

import pytest

from fanformer.comparison.pages.rules import plot_periods, plot_planes, rule_table
from fanformer.comparison.rule_learning import RulePoint, RuleResult, RuleSettings
from fanformer.comparison.rule_score import Accuracy, Grid, RuleScore
from fanformer.comparison.rules import create_task
from fanformer.errors import ConfigError, DataError

MODULUS = 11


def result(task, score, seed=0):
    """A training with the given score; everything that no report reads is the same."""
    return RuleResult(
        task=task.to_dict(),
        settings=RuleSettings(max_steps=5, seed=seed).to_dict(),
        model_type="fanformer",
        parameters=1200,
        block_parameters=1000,
        steps=5,
        reached_end=True,
        seconds=1.0,
        examples_per_second=5.0,
        curve=[RulePoint(5, 0.1, 1.0, 0.5, 0.0, 1.0)],
        score=score,
    )


def on_plane(side, inside, outside=1.0, seed=0):
    task = create_task("modular-addition", modulus=MODULUS, hole_side=side)
    first, last = task.hole

    def value(a, b):
        return inside if first <= a <= last and first <= b <= last else outside

    plane = range(MODULUS)
    grid = Grid(
        task.hole,
        [[round(100 * value(a, b)) for b in plane] for a in plane],
        ["".join(str(round(value(a, b))) for b in plane) for a in plane],
    )
    train, test = Accuracy(outside, outside, len(task.train)), Accuracy(inside, inside / 2, len(task.test))
    return result(task, RuleScore(train, test, grid=grid), seed)


def over_periods(longer, seed=0):
    task = create_task("periodic", trained_period=5, longest_period=8, num_symbols=10, num_train_rows=90)
    accuracy = {period: Accuracy(1.0 if period <= 5 else longer, longer, 100) for period in range(3, 9)}
    return result(task, RuleScore(Accuracy(1.0, 1.0, 90), Accuracy(longer, longer, 300), by_period=accuracy), seed)


def test_table_has_a_row_for_each_hole_and_architecture_and_says_what_does_not_count():
    results = {
        "FANformer": [on_plane(5, 0.5), on_plane(3, 0.8, seed=0), on_plane(3, 1.0, seed=1)],
        "Llama": [on_plane(3, 0.1), on_plane(5, 0.0, outside=0.97)],
    }
    rows = [line.strip("| ").split(" | ") for line in rule_table(results).splitlines()]
    head = ["modular-addition", "hole 3 x 3"]
    assert rows[2] == [
        *head,
        "FANformer",
        "1,000",
        "0.003",
        "2",
        "100.0 +- 0.0",
        "90.0 +- 127.1",
        "45.0 +- 63.5",
        "yes",
    ]
    assert rows[3] == [*head, "Llama", "1,000", "0.003", "1", "100.0", "10.0", "5.0", "yes"]
    doubt = "does not count: train accuracy below 99% (Llama)"
    assert [row[-1] for row in rows[4:]] == [doubt, doubt]
    assert [row[1] for row in rows[4:]] == ["hole 5 x 5"] * 2


def test_html_table_has_the_same_cells_and_escapes_names():
    table = rule_table({"A<B>": [on_plane(3, 0.5)], "C": [over_periods(0.9)]}, style="html")
    assert "A&lt;B&gt;" in table
    assert "A<B>" not in table
    assert len(re.findall("<tr>", table)) == 3
    assert "periods 6 to 8" in table


@pytest.mark.parametrize("quantity", ["probability", "correct"])
def test_plane_picture_shows_the_hole_where_it_is(tmp_path, quantity):
    import numpy as np
    from matplotlib import image

    results = {"FANformer": [on_plane(5, 1.0)], "Llama": [on_plane(5, 0.0), on_plane(5, 0.0, seed=1)]}
    path = tmp_path / "plane.png"
    plot_planes(results, "modular-addition", path, quantity)
    pixels = image.imread(path)[..., :3]
    height, width = pixels.shape[:2]
    dark, bright = (np.array(color) for color in ((0.267, 0.005, 0.329), (0.993, 0.906, 0.144)))  # viridis at 0 and 1
    left = pixels[:, : width * 3 // 4]  # without the colour bar
    upper, lower = left[: height // 2], left[height // 2 :]

    def area(part, color):
        return (np.abs(part - color).max(-1) < 0.02).mean()

    assert area(upper, dark) < 0.001 < 0.1 < area(upper, bright)
    # 25 of 121 pairs lie in the hole; its outline covers some of it
    assert 0.15 < area(lower, dark) / (area(lower, dark) + area(lower, bright)) < 0.22


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_pictures_are_written_with_their_labels(tmp_path, ending):
    several = {"FANformer": [over_periods(0.9), over_periods(0.7, seed=1)], "Llama": [over_periods(0.4)]}
    plot_periods(several, tmp_path / f"periods.{ending}")
    plot_planes({"FANformer": [on_plane(3, 0.5), on_plane(5, 0.2)]}, "modular-addition", tmp_path / f"plane.{ending}")
    for name in ("periods", "plane"):
        assert (tmp_path / f"{name}.{ending}").stat().st_size > 5000
    if ending == "svg":
        text = (tmp_path / "periods.svg").read_text(encoding="utf-8")
        assert "FANformer (2 seeds)" in text
        assert "hole 5 x 5" in (tmp_path / "plane.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("draw", "kind", "message"),
    [
        (
            lambda folder: rule_table({"FANformer": []}),
            DataError,
            "there is no result to report: got 0 trainings; run train_rule first.",
        ),
        (
            lambda folder: plot_planes({"A": [on_plane(3, 1.0)]}, "modular-addition", folder / "plane.gif"),
            ConfigError,
            "a picture must end in .png, .svg, .pdf, got 'plane.gif': the ending says its format.",
        ),
        (
            lambda folder: plot_planes({"A": [over_periods(1.0)]}, "periodic", folder / "plane.png"),
            DataError,
            "a picture of the plane needs results of a task with a hole, got none of 'periodic'.",
        ),
        (
            lambda folder: plot_periods({"A": [on_plane(3, 1.0)]}, folder / "periods.png"),
            DataError,
            "a picture of the periods needs results of one `periodic` task, got 0 of them: draw each alone.",
        ),
        (
            lambda _: rule_table({"A": [result(create_task("series"), RuleScore(*[Accuracy(0.5, 0.5, 9)] * 2))]}),
            DataError,
            "a table of accuracies needs results of a rule with right answers, got those of series: its errors stand "
            "in the page of a comparison.",
        ),
    ],
    ids=["nothing", "ending", "no hole", "no periods", "series"],
)
def test_wrong_report_is_refused_in_one_line(draw, kind, message, tmp_path):
    with pytest.raises(kind) as caught:
        draw(tmp_path)
    assert str(caught.value) == message
    assert not list(tmp_path.iterdir())


def test_architectures_that_differ_in_settings_are_told_apart_in_the_table():
    slow = on_plane(3, 1.0)
    fast = dataclasses.replace(slow, settings={**slow.settings, "learning_rate": 0.02})
    assert "| 0.003, 0.02 |" in rule_table({"FANformer": [slow, fast]})
