"""The page of a comparison: one file, every number of the record, and plain words for what is not known."""

import copy
import dataclasses
import io
import json
import math
import re

import pytest

from fanformer.comparison.pages.report import write_comparison_page
from fanformer.comparison.pages.rule import draw_planes
from fanformer.comparison.rule_score import Accuracy, RuleScore
from fanformer.comparison.rules import create_task
from fanformer.comparison.series_score import Horizon
from fanformer.report.charts import Chart, Line, clip_above
from tests.comparison.rule_results import on_plane, over_periods, result
from tests.pages import Reader

SPREAD = "95% t-interval over 2 seeds"


def figure(value, spread=None, unit="bits per byte"):
    if spread is None:
        return {"value": value, "unit": unit, "low": None, "high": None, "interval": None}
    return {"value": value, "unit": unit, "low": value - spread, "high": value + spread, "interval": SPREAD}


def training(spec, rate, seed, loss, parameters, variant=1000):
    curve = [{"tokens": tokens, "val_loss": 2 * loss + 9 / tokens, "val_bits_per_byte": loss + 9 / tokens}
             for tokens in (100, 500, variant)]  # fmt: skip
    figures = {"loss": 2 * loss, "bits_per_byte": loss, "tokens_per_second": 1234.0, "parameters": 2 * parameters}
    figures |= {"parameters_without_embeddings": parameters, "training_operations_per_token": 6 * parameters}
    result = {"status": "finished", "message": "", "figures": figures, "curve": curve, "details": {}}
    about = {"architecture": spec, "variant": variant, "learning_rate": rate, "seed": seed}
    return {**about, "name": f"{spec}-{rate}-{seed}", "error": None, "result": result}


def arm(spec, loss, rate=0.01, at_edge=False, spread=0.0625, troubles=(), variant=1000):
    figures = {"loss": figure(2 * loss, spread), "bits_per_byte": figure(loss, spread)}
    figures["tokens_per_second"] = figure(1234.0, spread and 10.0, "tokens/s")
    about = {"architecture": spec, "variant": variant, "learning_rate": rate, "at_edge": at_edge}
    swept = [[0.001, loss + 0.5], [rate, loss]]
    return {**about, "swept": swept, "figures": figures, "troubles": list(troubles)}


def two_families():
    """Two sizes of two families, two seeds, a learning rate that diverged."""
    losses = {"ours@40k": 2.125, "ours@80k": 2.0, "llama@40k": 2.25, "llama@80k": 2.0625}
    trainings = [
        training(spec, rate, seed, loss + (0.5 if rate == 0.001 else 0), 40_000 if "40k" in spec else 80_000)
        for spec, loss in losses.items()
        for rate, seed in ((0.001, 0), (0.01, 0), (0.01, 1))
    ]
    lost = training("llama@40k", 9.0, 0, 0, 1)
    lost["result"] |= {"status": "diverged", "message": "loss <script>alert(1)</script>", "figures": {}, "curve": []}
    doubtful = arm("llama@40k", 2.25, troubles=["llama@40k-9: loss <script>alert(1)</script>"])
    doubtful["swept"].append([9.0, None])
    difference = {"bits_per_byte_difference": figure(-0.125, 0.0625), "tokens_ratio": figure(0.75, 0.125, "ratio")}
    pair = {"candidate": "ours@40k", "baseline": "llama@40k", "variant": 1000, "figures": difference}
    open_pair = copy.deepcopy(pair) | {"candidate": "ours@80k", "baseline": "llama@80k"}
    open_pair["figures"]["bits_per_byte_difference"] = figure(-0.03125, 0.0625)
    return {
        "name": "mine",
        "command": "fanformer compare ours@40k",
        "comparison": {
            "architectures": list(losses), "data": "stdlib", "rule": None, "seeds": [0, 1],
            "learning_rates": [0.001, 0.01, 9.0],
        },
        "arms": [
            arm("ours@40k", 2.125), arm("ours@80k", 2.0, at_edge=True),
            doubtful, arm("llama@80k", 2.0625),
        ],
        "pairs": [pair, open_pair],
        "parameters_to_equal_loss": {"parameters": {"llama@80k": figure(0.7031, 0.0156, "ratio")},
                                     "parameters_without_embeddings": {}},
        "trainings": [*trainings, lost],
    }  # fmt: skip


@pytest.fixture
def record():
    return two_families()


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """The page of the record as it is."""
    path = tmp_path_factory.mktemp("drawn") / "page.html"
    write_comparison_page(two_families(), path)
    return path


def read(record, tmp_path):
    path = tmp_path / "page.html"
    write_comparison_page(record, path)
    return Reader(path.read_text())


def test_page_is_one_file_with_the_record_inside(drawn, record, tmp_path):
    page = Reader(drawn.read_text())
    assert [link for link in page.links if not link.startswith("#")] == []
    assert len(set(page.ids)) == len(page.ids)
    assert json.loads(page.record) == record
    first = drawn.read_bytes()
    assert len(first) < 1_000_000
    read(record, tmp_path)
    assert (tmp_path / "page.html").read_bytes() == first


def test_every_number_stands_in_the_page_with_its_interval(drawn):
    text = Reader(drawn.read_text()).text
    for shown in (
        "2.1250 [2.0625, 2.1875]", "2.0000 [1.9375, 2.0625]", "2.2500 [2.1875, 2.3125]",
        "-0.1250 [-0.1875, -0.0625] better",
        "-0.0312 [-0.0938, +0.0312] undecided at these seeds", "0.750 [0.625, 0.875]", "0.703 [0.688, 0.719]", "80,000",
        "A ours@40k is better than C llama@40k: -0.1250 [-0.1875, -0.0625] bits per byte.",
        "B ours@80k against D llama@80k: undecided at these seeds, -0.0312 [-0.0938, +0.0312] bits per byte.",
        f"in brackets: {SPREAD}", "fanformer compare ours@40k",
    ):  # fmt: skip
        assert shown in text
    for title in ("Loss over tokens", "Loss over computing", "Loss over time", "Final loss over learning rate",
                  "Final loss over parameters without embeddings", "Tokens to equal loss",
                  "Parameters to equal loss"):  # fmt: skip
        assert title in text


def test_long_names_are_told_once_and_letters_stand_for_them(record, tmp_path):
    long = "ours@40k:hidden_size=128,fan_placement=none,num_hidden_layers=2"
    renamed = json.loads(json.dumps(record).replace('"ours@40k"', json.dumps(long)))
    page = read(renamed, tmp_path)
    assert page.text.count(long) == 1 + json.dumps(renamed["comparison"]).count(long)  # in its table, and as asked for
    assert "A ours@40k " + long in page.text
    assert "A ours@40k is better than C llama@40k" in page.text


def test_page_says_what_went_wrong_and_what_is_doubtful(drawn):
    content = Reader(drawn.read_text()).text
    assert "B ours@80k: its best learning rate, 0.01, is the highest that was tried" in content
    assert "llama@40k-9: loss <script>alert(1)</script>" in content  # as text
    assert "<script>alert" not in drawn.read_text()
    assert "1 of 4 results have their best learning rate at an end of the sweep" in content
    assert "Triangles at the upper edge: higher, or diverged." in content


def test_unfinished_sweep_shows_what_there_is(record, tmp_path):
    empty = {"learning_rate": None, "figures": {}, "swept": [], "at_edge": False, "troubles": []}
    record["arms"][3] |= empty
    record["trainings"] = [one for one in record["trainings"] if one["architecture"] != "llama@80k"]
    record |= {"planned": 16, "finished": 10, "pairs": [], "parameters_to_equal_loss": {}}
    text = read(record, tmp_path).text
    assert "10 of 16 trainings have ended; the same command goes on with the others." in text
    assert "D llama@80k 1,000 no finished training" in text
    assert "No two architectures have a finished training at the same seed and budget yet." in text


def test_one_seed_decides_nothing(record, tmp_path):
    record["comparison"]["seeds"] = [0]
    record["trainings"] = [one for one in record["trainings"] if one["seed"] == 0]
    record["arms"] = [arm(one["architecture"], one["figures"]["bits_per_byte"]["value"], spread=None)
                      for one in record["arms"]]  # fmt: skip
    record["pairs"][0]["figures"] = {"bits_per_byte_difference": figure(-0.125)}
    text = read(record, tmp_path).text
    assert "-0.1250 one seed: not decided" in text
    assert "A ours@40k against C llama@40k: one seed, no interval, -0.1250 bits per byte." in text
    assert "one seed has no interval" in text


def test_several_budgets_are_drawn_over_their_tokens(record, tmp_path):
    record["arms"].append(arm("ours@40k", 2.5, variant=500))
    record["trainings"].append(training("ours@40k", 0.01, 0, 2.5, 40_000, variant=500))
    assert "Final loss over the budget" in read(record, tmp_path).text


def test_infinite_perplexity_is_json_that_every_reader_takes(record, tmp_path):
    record["trainings"][0]["result"]["figures"]["perplexity"] = math.inf
    record["trainings"][1]["result"]["figures"]["perplexity"] = -math.inf
    record["trainings"][2]["result"]["message"] = 'Infinity, "NaN" and \\ are words here'
    page = read(record, tmp_path)

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    assert json.loads(page.record, parse_constant=refuse) == record
    record["trainings"][0]["result"]["figures"]["perplexity"] = math.nan
    found = json.loads(read(record, tmp_path).record, parse_constant=refuse)
    assert found["trainings"][0]["result"]["figures"]["perplexity"] is None


def test_an_arm_far_above_the_others_does_not_flatten_their_curves(record, tmp_path):
    for one in record["trainings"]:
        if one["architecture"] == "llama@80k":
            one["result"]["figures"]["bits_per_byte"] = 99.0
            one["result"]["curve"] = [point | {"val_bits_per_byte": 99.0} for point in one["result"]["curve"]]
    record["arms"][3]["figures"]["bits_per_byte"] = figure(99.0)
    page = read(record, tmp_path)
    assert "What lies higher is cut off." in page.text
    numbers = [float(word) for word in page.words if re.fullmatch(r"[0-9]+[.][0-9]+", word.strip())]
    assert max(number for number in numbers if number != 99.0) < 5  # ticks; the table alone says 99.0000


def test_values_up_to_half_again_the_lowest_are_drawn_to_scale():
    values = ([2.0, 3.0, 3.25, math.inf], [2.0, 2.5], [math.inf])
    assert [clip_above([Line("", 0, 0, range(len(y)), y)]) for y in values] == [3.0, None, None]


def test_every_line_of_a_chart_has_its_name_and_every_diverged_training_its_triangle():
    names = [f"{'_' if number % 2 else '$a$'}line {number}" for number in range(14)]
    lines = [Line(name, number, 0, [1.0, 10.0], [number + 1.0, math.inf]) for number, name in enumerate(names)]
    drawn = Chart(lines, "title", "x", "y", "name", markers=True).html()
    for name in names:
        assert f">{name}</text>" in drawn
    styles = [style for style in re.findall(r'style="([^"]*)"', drawn) if "stroke-width: 1.6" in style]
    assert len(set(styles)) == len(lines)  # where the colours begin again, the dashes differ
    places = re.findall(r'<use [^>]*?x="([0-9.]+)" y="([0-9.]+)" style="fill: #', drawn)
    edge = min((y for _, y in places), key=float)
    at_edge = sorted(float(x) for x, y in places if y == edge)
    assert len(set(at_edge)) == 1 + len(lines)  # the highest loss on the left, and on the right all triangles, apart


def test_machine_and_data_stand_in_the_page(record, tmp_path):
    record |= {
        "hardware": {"cpu": "A & B", "cores": 2, "gpus": []},
        "versions": {"torch": "2.11"},
        "date": "2026-01-31",
    }
    record |= {"data": {"source": "stdlib", "fingerprint": "abc123"}}
    text = read(record, tmp_path).text
    for shown in ("hardware, cpu A & B", "hardware, cores 2", "versions, torch 2.11", "data, fingerprint abc123"):
        assert shown in text
    assert "2 seeds, 3 learning rates each, 2026-01-31" in text


def rule_training(spec, result, rate, side):
    score = result.score
    figures = {"loss": 0.5, "hole_accuracy": score.test.greedy, "train_accuracy": score.train.greedy, "seconds": 2.0}
    about = {"architecture": spec, "variant": side, "learning_rate": rate, "seed": result.settings["seed"]}
    kept = {"status": "finished", "message": "", "figures": figures, "curve": [], "details": {"rule": result.to_dict()}}
    return {**about, "name": f"{spec}-{rate}", "error": None, "result": kept}


def rule_arm(spec, trainings, side):
    """The arm of trainings at two rates, of which the second was chosen."""
    names = ("loss", "train_accuracy", "hole_accuracy")
    figures = {name: figure(trainings[-1]["result"]["figures"][name], unit="share") for name in names}
    swept = [[one["learning_rate"], one["result"]["figures"]["loss"]] for one in trainings]
    return {**arm(spec, 0.25, rate=0.1, variant=side), "figures": figures, "swept": swept}


def rule_record(inside_and_outside, sides=(3,)):
    specs = inside_and_outside
    trainings = [
        rule_training(spec, on_plane(side, *shares), rate, side)
        for spec, shares in specs.items() for side in sides for rate in (0.01, 0.1)
    ]  # fmt: skip
    figures = {"hole_accuracy_difference": figure(0.5, 0.25), "train_accuracy_difference": figure(0.25)}
    pairs = [{"candidate": "ours@60k", "baseline": "llama@60k", "variant": side, "figures": figures} for side in sides]
    asked = {"architectures": list(specs), "rule": "modular-addition", "seeds": [0], "learning_rates": [0.01, 0.1]}
    arms = [rule_arm(spec, [one for one in trainings if (one["architecture"], one["variant"]) == (spec, side)], side)
            for side in sides for spec in specs]  # fmt: skip
    no_size = {"parameters": {}, "parameters_without_embeddings": {}}
    record = {"comparison": asked, "arms": arms, "pairs": pairs, "parameters_to_equal_loss": no_size}
    return record | {"trainings": trainings}


def test_rule_comes_with_its_table_and_its_plane(tmp_path):
    page = read(rule_record({"ours@60k": (0.75, 1.0), "llama@60k": (0.25, 0.5)}), tmp_path)
    assert "does not count: train accuracy below 99% (B llama@60k)" in page.text
    assert "+0.2500 +0.5000 [+0.2500, +0.7500] does not count" in page.text
    assert page.text.count("hole 3 x 3") == 2  # one row for each, at its best learning rate only
    assert "A ours@60k 3 0.1 0 0.5000 1.0000 0.7500 2.0 finished" in page.text
    assert [link[:22] for link in page.links if not link.startswith("#")] == ["data:image/png;base64,"]


def test_rule_whose_rates_were_chosen_elsewhere_says_so(tmp_path):
    record = rule_record({"ours@60k": (0.75, 1.0)})
    record["comparison"]["rates_on"] = {"hole_side": 5}
    record["trainings"] += [rule_training("ours@60k", on_plane(5, 0.5, 1.0), rate, -1) for rate in (0.01, 0.1)]
    page = read(record, tmp_path)
    assert "most right answers to what was left out of trainings of their own (hole_side = 5)" in page.text
    assert "A ours@60k to choose a rate 0.1 0 0.5000" in page.text
    assert "Left out right over learning rate" in page.text


def test_rule_is_drawn_for_every_hole_and_names_what_has_no_result(tmp_path):
    record = rule_record({"ours@60k": (0.75, 1.0), "llama@60k": (0.25, 1.0)}, sides=(3, 5))
    record["trainings"] = [
        one for one in record["trainings"] if one["architecture"] == "ours@60k" or one["variant"] == 5
    ]
    record["arms"][1] |= {"learning_rate": None, "figures": {}, "swept": []}
    page = read(record, tmp_path)
    assert "B llama@60k (hole 3): no finished training" in page.text
    assert "+0.5000 [+0.2500, +0.7500] better" in page.text
    for chart_of in ("Accuracy over steps, hole 3 x 3", "Accuracy over steps, hole 5 x 5", "B llama@60k, left out"):
        assert chart_of in page.text
    assert len(set(page.ids)) == len(page.ids)


def test_rule_without_any_result_says_so(tmp_path):
    record = rule_record({"ours@60k": (0.75, 1.0), "llama@60k": (0.25, 1.0)})
    record |= {"trainings": [], "pairs": [], "planned": 4, "finished": 0}
    record["arms"] = [one | {"learning_rate": None, "figures": {}, "swept": []} for one in record["arms"]]
    text = read(record, tmp_path).text
    assert "No training has finished yet." in text
    assert "0 of 4 trainings have ended" in text


def test_periods_are_drawn_over_their_length(tmp_path):
    record = rule_record({"ours@60k": (1.0, 1.0)})
    record["comparison"]["rule"], record["pairs"] = "periodic", []
    record["trainings"] = [rule_training("ours@60k", over_periods(0.75), rate, 0) for rate in (0.01, 0.1)]
    record["arms"] = [rule_arm("ours@60k", record["trainings"], 0)]
    page = read(record, tmp_path)
    assert "Accuracy over the period of the pattern, trained up to 5" in page.text
    assert "periods 6 to 8" in page.text


def over_horizon(errors, rate, seed):
    task = create_task("series", held_out=88, trained_horizon=2, horizon=4)
    horizon = Horizon(2, errors, {"persistence": [1.0] * 4, "a day ago": [0.5, 0.5, 0.125, 0.125]})
    made = result(task, RuleScore(Accuracy(0.5, 0.5, 90), Accuracy(0.5, 0.5, 90), horizon=horizon), seed)
    return dataclasses.replace(made, settings={**made.settings, "learning_rate": rate})


def series_record(errors):
    trainings = []
    for spec, of_seeds in errors.items():
        for seed, errors_of_it in enumerate(of_seeds):
            made = over_horizon(errors_of_it, 0.1, seed)
            trainings.append(rule_training(spec, made, 0.1, 0))
            trainings[-1]["result"]["figures"] |= made.score.figures()
    figures = {f"error_{part}_window_difference": figure(-0.25, 0.125) for part in ("within", "beyond")}
    pair = {"candidate": "ours@60k", "baseline": "llama@60k", "variant": 0, "figures": figures}
    asked = {"architectures": list(errors), "rule": "series", "seeds": [0, 1], "learning_rates": [0.1]}
    return {
        "comparison": asked,
        "arms": [arm(spec, 0.25, 0.1, variant=0) for spec in errors],
        "pairs": [pair],
        "parameters_to_equal_loss": [],
        "trainings": trainings,
    }


def test_series_comes_with_its_errors_beside_naive_forecasts_and_their_chart(tmp_path):
    page = read(
        series_record(
            {
                "ours@60k": [[0.25, 0.25, 0.25, 0.5], [0.25, 0.25, 0.5, 0.75]],
                "llama@60k": [[0.25, 0.25, 0.75, 0.75]] * 2,
            }
        ),
        tmp_path,
    )
    assert "ours@60k 1,000 0.1 2 0.250 [0.250, 0.250] 0.500 [-1.088, 2.088]" in page.text  # 12.706 * 0.125
    assert "persistence 1.000 1.000" in page.text
    assert "a day ago 0.500 0.125" in page.text
    assert "-0.2500 [-0.3750, -0.1250] -0.2500 [-0.3750, -0.1250] better" in page.text
    assert "Error over the horizon" in page.text
    assert len(set(page.ids)) == len(page.ids)


def test_series_that_is_continued_no_better_than_by_its_shortest_period_does_not_count(tmp_path):
    page = read(
        series_record({"ours@60k": [[0.25] * 4] * 2, "llama@60k": [[0.25] * 4, [0.75, 0.25, 0.0, 0.0]]}), tmp_path
    )
    assert "[-0.3750, -0.1250] does not count" in page.text


def shares(value, spread=None):
    return figure(value, spread, "share")


def test_rule_table_has_a_row_for_each_hole_and_architecture_and_says_what_does_not_count(tmp_path):
    record = rule_record({"ours@60k": (0.8, 1.0), "A<B@60k": (0.1, 1.0)}, sides=(3, 5))
    for one in record["trainings"]:
        if one["variant"] == 5 and one["architecture"] == "A<B@60k":
            one["result"]["figures"]["train_accuracy"] = 0.97
    figures = {"train_accuracy": shares(1.0, 0.0), "hole_accuracy": shares(0.9, 0.25)}
    record["arms"][0]["figures"] = figures | {"hole_sampled_accuracy": shares(0.45, 0.125)}
    record["pairs"] = []
    text = read(record, tmp_path).text
    ours = "hole 3 x 3 1,000 0.1 1 100.0 [100.0, 100.0] 90.0 [65.0, 115.0] 45.0 [32.5, 57.5] yes"
    assert f"A ours@60k {ours} B A<B@60k hole 3 x 3 1,000 0.1 1 100.0 10.0 not measured yes" in " ".join(text.split())
    assert text.count("hole 5 x 5 1,000") == text.count("does not count: train accuracy below 99% (B A<B@60k)") == 2


def test_plane_picture_shows_the_hole_where_it_is():
    import numpy as np
    from matplotlib import image

    results = {"FANformer": [on_plane(5, 1.0)], "Llama": [on_plane(5, 0.0), on_plane(5, 0.0, seed=1)]}
    rules = [
        ({"architecture": name, "variant": 5}, [one.to_dict() for one in several]) for name, several in results.items()
    ]
    pixels = image.imread(io.BytesIO(draw_planes(rules)))[..., :3]
    height, width = pixels.shape[:2]
    dark, bright = (np.array(color) for color in ((0.267, 0.005, 0.329), (0.993, 0.906, 0.144)))  # viridis at 0 and 1
    left = pixels[:, : width * 3 // 4]  # without the colour bar
    upper, lower = left[: height // 2], left[height // 2 :]

    def area(part, color):
        return (np.abs(part - color).max(-1) < 0.02).mean()

    assert area(upper, dark) < 0.001 < 0.1 < area(upper, bright)
    # 25 of 121 pairs lie in the hole; its outline covers some of it
    assert 0.15 < area(lower, dark) / (area(lower, dark) + area(lower, bright)) < 0.22
