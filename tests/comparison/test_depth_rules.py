"""Rules of many steps: the answers are those of the rule, and depth shows in how many are solved."""

import itertools
import json

import pytest
import torch

from fanformer.comparison.architectures import architecture
from fanformer.comparison.compare import Comparison, Outcome
from fanformer.comparison.depth_score import depths, figures_of_depth, solved_positions
from fanformer.comparison.entries import write_comparison
from fanformer.comparison.ledger import read_ledger
from fanformer.comparison.pages.report import write_comparison_page
from fanformer.comparison.rule_learning import rule_config, train_rule
from fanformer.comparison.rule_score import Accuracy, RuleScore, score
from fanformer.comparison.rules import create_task, model_fields
from fanformer.comparison.summary import arms, to_record
from fanformer.comparison.trial import Result, Trial
from fanformer.errors import ConfigError
from tests.pages import Reader

RECURRENT = "fanformer:num_hidden_layers=2,hidden_size=32,intermediate_size=32,num_attention_heads=2,"
RECURRENT += "num_key_value_heads=1,head_dim=16,qkv_rank=16,o_rank=16,gate_up_rank=16,down_rank=16"
PARTS = ",prelude_layers=0,core_layers=2,coda_layers=0,mean_recurrence=2,max_recurrence=6"
SMALL = {"num_train_rows": 200, "num_test_rows": 20}


@pytest.mark.parametrize(("name", "order"), [("s3-product", 6), ("a5-product", 60)])
def test_products_are_those_of_the_group(name, order):
    task = create_task(name, **SMALL)
    table, size = task.products, len(task.vocabulary)
    assert size == order
    assert torch.equal(table[0], torch.arange(order))  # the identity
    assert torch.equal(table[:, 0], torch.arange(order))
    assert all(row.unique().numel() == order for row in (*table, *table.T))
    a, b, c = torch.randint(order, (3, 500), generator=torch.Generator().manual_seed(0))
    assert torch.equal(table[table[a, b], c], table[a, table[b, c]])
    assert not torch.equal(table, table.T)  # the order counts
    rows = task.test
    assert rows.labels.shape == rows.input_ids.shape == (20, 64)
    for row in range(3):
        whole = 0
        for place in range(64):
            whole = int(table[whole, rows.input_ids[row, place]])
            assert int(rows.labels[row, place]) == whole
    assert task.train.labels.shape == (200, 16)


def test_an_element_is_where_it_sends_the_points():
    task = create_task("s3-product", **SMALL)
    elements = list(itertools.permutations(range(3)))
    assert task.vocabulary == [f"[{''.join(map(str, element))}]" for element in elements]
    for a, b in itertools.product(range(6), repeat=2):
        expected = tuple(elements[a][point] for point in elements[b])
        assert elements[int(task.products[a, b])] == expected


def test_pointers_lead_where_the_pairs_say():
    task = create_task("pointer-chasing", **SMALL)
    for rows, hops in ((task.train, 4), (task.test, 12)):
        for row in range(20):
            ids, labels = rows.input_ids[row].tolist(), rows.labels[row].tolist()
            following = dict(zip(ids[:32:2], ids[1:32:2], strict=True))
            assert sorted(following) == list(range(16))
            assert labels[:32] == [-100] * 32
            place, found = ids[32], []
            for _ in range(hops):
                place = following[place]
                found.append(place)
            assert labels[32:] == found
            assert ids[33:] == [16] * (hops - 1)
            assert len(set(found)) == hops


def test_test_rows_are_not_training_rows():
    task = create_task("pointer-chasing", **SMALL)
    trained = set(map(tuple, task.train.input_ids[:, :33].tolist()))
    assert not trained & set(map(tuple, task.test.input_ids[:, :33].tolist()))


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        (
            "s3-product",
            {"longest_positions": 16},
            "must be above `trained_positions`, got 16 and 16: test rows",
        ),
        ("pointer-chasing", {"num_nodes": 12}, "must be below `num_nodes`, got 12 and 12: hops around the ring lead"),
        ("pointer-chasing", {"num_test_rows": 0}, "`num_test_rows` .* must be an integer from 1 on, got 0"),
    ],
)
def test_a_task_that_cannot_be_is_refused(name, fields, message):
    with pytest.raises(ConfigError, match=message):
        create_task(name, **fields)


def test_positions_count_as_solved_up_to_the_first_that_is_not():
    assert solved_positions([1.0, 0.95, 0.9, 0.4, 1.0]) == 3
    assert solved_positions([0.2]) == 0
    assert solved_positions([1.0, 1.0]) == 2


@pytest.mark.parametrize("name", ["s3-product", "pointer-chasing"])
def test_a_training_is_scored_at_every_number_of_steps(name, tmp_path):
    task = create_task(name, **SMALL)
    chosen = architecture(RECURRENT + PARTS)
    torch.manual_seed(0)
    model = chosen.build(model_fields(task))
    config = rule_config(task, tmp_path / "run", max_steps=4, batch_size=8, one_step_fraction=0.0, threads=1,
                         learning_rate=0.1)  # fmt: skip
    result = train_rule(task, model, config)
    shares, figures = result.score.by_steps, result.score.figures()
    assert list(shares) == ["1", "2", "3", "4", "5", "6"]
    assert {len(each) for each in shares.values()} == {task.longest_positions}
    assert shares["1"] != shares["6"] or name == "s3-product"
    late = shares["4"][task.trained_positions : 2 * task.trained_positions]  # a mean of 2: at most 4 in training
    assert figures["late_right"] == pytest.approx(sum(late) / len(late))
    assert "late_right_at_twice" not in figures  # it can take 6
    assert depths(model) == [1, 2, 3, 4, 5, 6]


def trained_on_products(spec, seed, by_steps):
    """What a comparison keeps of a training of the rule, as if these were its right answers."""
    task = create_task("s3-product", **SMALL)
    steps = 4 if len(by_steps) > 1 else 1
    part = Accuracy(0.5, 0.5, 1000)
    score = RuleScore(part, part, by_steps=by_steps, of_depth=figures_of_depth(by_steps, 16, steps))
    curve = [{"step": 4, "loss": 1.0, "train_accuracy": 0.5, "test_accuracy": 0.5, "learning_rate": 0.1, "seconds": 1}]
    rule = {"task": task.to_dict(), "block_parameters": 1000, "score": score.to_dict(), "curve": curve}
    figures = {"loss": 1.0, **score.figures(), "seconds": 1.0, "parameters": 1000, "parameters_without_embeddings": 900}
    return Outcome(Trial(spec, 0.1, seed, {}), 0, Result("finished", "", figures, curve, {"rule": rule}))


def solved(count):
    return [1.0] * count + [0.25] * (64 - count)


@pytest.mark.ci
def test_a_page_shows_how_far_each_depth_gets_and_a_control_that_fails_counts(tmp_path):
    specs = [RECURRENT + PARTS.replace("max_recurrence=6", "max_recurrence=8"), RECURRENT]
    comparison = Comparison.from_fields(
        {"architectures": specs, "rule": "s3-product", "learning_rates": [0.1], "seeds": 2}
    )
    deep = {str(steps): solved(4 * steps) for steps in range(1, 9)}
    outcomes = [
        trained_on_products(spec, seed, by_steps)
        for seed in (0, 1)
        for spec, by_steps in ((specs[0], deep), (specs[1], {"1": solved(3)}))
    ]
    found = {arm.architecture: arm.figures for arm in arms(comparison, outcomes)}
    assert found[specs[0]]["solved_linearity"].value == pytest.approx(1.0)
    assert found[specs[0]]["late_right"].value == pytest.approx(0.25)  # at 4 steps 16 are solved, those trained
    assert found[specs[0]]["late_right_at_twice"].value == pytest.approx(1.0)
    assert found[specs[1]].keys() & {"solved_linearity", "late_right_at_twice"} == set()
    write_comparison_page(json.loads(json.dumps(to_record(comparison, outcomes))), tmp_path / "page.html")
    text = Reader((tmp_path / "page.html").read_text()).text
    assert "does not count" not in text  # though neither has learned 99% of its training rows
    assert "Solved positions over steps, trained on the first 16" in text
    assert "Right answers over the position, A fanformer" in text
    assert "50.0 [50.0, 50.0] 25.0 [25.0, 25.0] 100.0 [100.0, 100.0] 32.00 [32.00, 32.00] 1.00 [1.00, 1.00]" in text
    assert "50.0 [50.0, 50.0] 25.0 [25.0, 25.0] not measured 3.00 [3.00, 3.00] not measured" in text
    write_comparison(tmp_path, "deep", "fanformer compare", comparison, outcomes, None)
    kept = [entry.result["late_right"].value for entry in read_ledger(tmp_path)]
    assert kept == [0.25, 0.25]


def test_figures_of_depth_are_of_the_line_up_to_where_all_is_solved():
    shares = {str(steps): solved(min(64, 20 * steps)) for steps in range(1, 9)}
    found = figures_of_depth(shares, 16, 2)
    assert found == {
        "solved_positions": 64,
        "late_right": 1.0,
        "late_right_at_twice": 1.0,
        "solved_linearity": pytest.approx(5776 / 6160),  # 20, 40, 60, 64
    }
    flat = {str(steps): solved(5) for steps in range(1, 9)}
    assert figures_of_depth(flat, 16, 4)["solved_linearity"] == 0.0


def test_the_score_at_a_number_of_steps_is_that_of_the_model_at_it():
    task = create_task("s3-product", **SMALL)
    torch.manual_seed(0)
    model = architecture(RECURRENT + PARTS).build(model_fields(task)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # from the identity of the bridge, and from silent branches
            parameter.add_(0.3 * torch.randn_like(parameter))
        found = score(model, task).by_steps
        for steps in (1, 3, 6):
            right = model(task.test.input_ids, num_steps=steps).logits.argmax(-1) == task.test.labels
            assert found[str(steps)] == pytest.approx(right.double().mean(0).tolist())
    assert found["1"] != found["6"]
    plain = architecture(RECURRENT).build(model_fields(task)).eval()
    assert list(score(plain, task).by_steps) == ["1"]


def test_fields_of_depth_go_to_recurrent_architectures_alone():
    run = {"core_learning_rate_scale": 0.7, "one_step_fraction": 0.2}
    comparison = Comparison(("nano-recurrent", "nano"), run={**run, "batch_size": 8})
    assert comparison.settings("nano-recurrent", 2_000_000).items() >= run.items()
    assert not comparison.settings("nano", 2_000_000).keys() & run.keys()
    assert Comparison(("nano-recurrent",)).settings("nano-recurrent", 2_000_000)["core_learning_rate_scale"] == 0.5
    assert architecture("nano-recurrent").is_recurrent
    assert not architecture("llama@nano").is_recurrent
