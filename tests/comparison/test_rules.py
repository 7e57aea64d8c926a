import pytest
import torch

from fanformer.comparison.rules import PeriodicContinuation, create_task, model_fields
from fanformer.errors import ConfigError

SMALL = {
    "modular-addition": {"modulus": 13, "hole_side": 3},
    "linear-regression": {"values": 12, "hole_side": 3},
    "periodic": {"trained_period": 5, "longest_period": 8, "num_symbols": 10, "num_train_rows": 90},
}


@pytest.mark.parametrize(("side", "inside"), [(5, 25), (11, 121), (21, 441)])
@pytest.mark.parametrize(("name", "pairs"), [("modular-addition", 12769), ("linear-regression", 10000)])
def test_hole_has_as_many_pairs_as_in_the_paper(name, pairs, side, inside):
    task = create_task(name, hole_side=side)
    assert (len(task.test), len(task.train)) == (inside, pairs - inside)
    assert len(set(map(tuple, task.train.keys.tolist())) & set(map(tuple, task.test.keys.tolist()))) == 0
    middle = {"modular-addition": 56, "linear-regression": 50}[name]
    assert (task.test.keys - middle).abs().max() == side // 2
    assert len(set(map(tuple, task.test.keys.tolist()))) == inside


@pytest.mark.parametrize("name", ["modular-addition", "linear-regression"])
def test_rows_read_as_prompt_and_right_answer(name):
    task = create_task(name)
    for row in torch.randint(0, len(task.everything), (50,)).tolist():
        example = task.everything[row]
        a, b = example.keys.tolist()
        expected = {"modular-addition": f"{a}+{b}=", "linear-regression": f"({a},{b})="}[name]
        answer = {"modular-addition": (a + b) % 113, "linear-regression": a + 2 * b + 3}[name]
        assert task.text(example.input_ids) == expected
        assert example.labels.tolist() == [-100] * (task.prompt_tokens - 1) + [answer]
        assert task.vocabulary[answer] == str(answer)


@pytest.mark.parametrize("side", [5, 11, 21])
@pytest.mark.parametrize("name", ["modular-addition", "linear-regression"])
def test_every_token_occurs_in_training_with_the_paper_s_holes(name, side):
    task = create_task(name, hole_side=side)
    seen = set(task.train.input_ids.unique().tolist()) | set(task.train.labels[:, -1].tolist())
    assert seen == set(range(len(task.vocabulary)))
    for column in (0, 1):
        assert set(task.test.keys[:, column].tolist()) <= set(task.train.keys[:, column].tolist())
    assert set(task.test.labels[:, -1].tolist()) <= set(task.train.labels[:, -1].tolist())


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        (
            "modular-addition",
            {"modulus": 7, "hole_side": 7},
            "`hole_side` of the rule modular-addition must leave every number of the hole in the training examples "
            "too, got 7: a 0 occurs in the hole only; take a smaller one.",
        ),
        (
            "modular-addition",
            {"hole_side": 20},
            "`hole_side` of the rule modular-addition must be odd, got 20: the hole reaches equally far from its "
            "middle; the paper's |a - 56| <= 10 is 21.",
        ),
        (
            "linear-regression",
            {"hole_side": 101},
            "`hole_side` of the rule linear-regression must leave the hole inside the 100 x 100 pairs, got 101: take "
            "a smaller one.",
        ),
        (
            "linear-regression",
            {"hole_side": -1},
            "`hole_side` of the rule linear-regression must be an integer from 1 on, got -1.",
        ),
        (
            "periodic",
            {"longest_period": 8},
            "`shortest_period` <= `trained_period` < `longest_period` <= `num_symbols` must hold in the rule "
            "periodic, got 3, 8, 8 and 32: a pattern's symbols are distinct, and test periods are longer than trained "
            "ones.",
        ),
        (
            "periodic",
            {"num_train_rows": 1},
            "`num_train_rows` of the rule periodic must be large enough for every symbol to occur, got 1 for 32 "
            "symbols: take more rows or fewer symbols.",
        ),
        (
            "modular-adition",
            {},
            "a rule must be one that exists, got 'modular-adition': did you mean `modular-addition`?",
        ),
        (
            "periodic",
            {"trained_periods": 3},
            "`trained_periods` is not a field of the rule periodic: did you mean `trained_period`?",
        ),
    ],
    ids=["whole plane", "even", "outside", "negative", "periods", "few rows", "name", "field"],
)
def test_wrong_task_is_refused_in_one_line(name, fields, message):
    with pytest.raises(ConfigError) as caught:
        create_task(name, **fields)
    assert str(caught.value) == message


@pytest.mark.parametrize("name", sorted(SMALL))
def test_task_survives_its_dictionary_and_tells_the_model_its_sizes(name):
    task = create_task(name, **SMALL[name])
    fields = task.to_dict()
    again = create_task(fields.pop("name"), **fields)
    assert again == task
    assert torch.equal(again.train.input_ids, task.train.input_ids)
    needed = model_fields(task)
    assert needed["vocab_size"] == int(max(task.train.input_ids.max(), task.train.labels.max())) + 1
    assert needed["max_position_embeddings"] == task.train.input_ids.shape[1]
    assert needed["eos_token_id"] is None


def test_periodic_rows_repeat_distinct_symbols_and_ask_only_for_what_is_determined():
    task = PeriodicContinuation(**SMALL["periodic"])
    for part in (task.train, task.test, task.fresh):
        for ids, labels, period in zip(part.input_ids.tolist(), part.labels.tolist(), part.keys.tolist(), strict=True):
            assert len(set(ids[:period])) == period
            assert all(ids[place] == ids[place - period] for place in range(period, len(ids)))
            assert labels[:period] == [-100] * period
            assert labels[period:-1] == ids[period + 1 :]
            assert labels[-1] == ids[len(ids) - period]
    assert set(task.train.keys.tolist()) == {3, 4, 5}
    assert set(task.test.keys.tolist()) == {6, 7, 8}


def test_periodic_test_rows_are_new_and_are_scored_at_positions_that_training_labels():
    task = PeriodicContinuation()
    trained = set(map(tuple, task.train.input_ids.tolist()))
    for part in (task.test, task.fresh):
        assert not trained & set(map(tuple, part.input_ids.tolist()))
        assert (part.labels[:, task.scored_from :] >= 0).all()
    assert (task.train.labels[:, task.scored_from :] >= 0).all()
    assert task.train.input_ids.shape[1] - task.scored_from == task.scored_tokens
