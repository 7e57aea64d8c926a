import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

from fanformer.comparison.rule_score import accuracy_and_loss, answers, score
from fanformer.comparison.rules import create_task, model_fields
from fanformer.errors import ConfigError


class Oracle(torch.nn.Module):
    """Knows every row of a task by heart; `spoilt` rows get the answer one too high."""

    def __init__(self, parts, vocab_size, spoilt=()):
        super().__init__()
        self.config = SimpleNamespace(vocab_size=vocab_size)
        self.device = torch.device("cpu")
        self.table = {}
        for part in parts:
            for ids, labels in zip(part.input_ids, part.labels, strict=True):
                wrong = tuple(ids.tolist()) in spoilt
                self.table[tuple(ids.tolist())] = (labels.clamp(min=0) + wrong) % vocab_size

    def forward(self, input_ids, use_cache):
        best = torch.stack([self.table[tuple(row)] for row in input_ids.tolist()])
        return SimpleNamespace(logits=torch.nn.functional.one_hot(best, self.config.vocab_size) * 100.0)


class Constant(Oracle):
    """Says one token whatever is asked, the others being equally improbable."""

    def __init__(self, token, vocab_size):
        super().__init__((), vocab_size)
        self.token = token

    def forward(self, input_ids, use_cache):
        logits = torch.zeros(*input_ids.shape, self.config.vocab_size)
        logits[..., self.token] = 1.0
        return SimpleNamespace(logits=logits)


@pytest.fixture(scope="module")
def addition():
    return create_task("modular-addition", modulus=11, hole_side=3)


@pytest.fixture(scope="module")
def periodic():
    fields = {"trained_period": 5, "longest_period": 8, "num_symbols": 10, "scored_tokens": 6, "num_train_rows": 90}
    return create_task("periodic", **fields, rows_per_period=20)


def test_oracle_scores_everything(addition, periodic):
    for task, parts in ((addition, [addition.everything]), (periodic, [periodic.train, periodic.test, periodic.fresh])):
        result = score(Oracle(parts, len(task.vocabulary)), task)
        assert result.train.greedy == result.test.greedy == 1.0
        assert result.train.sampled == pytest.approx(1.0)


def test_answers_wrong_in_the_hole_only_show_in_the_hole_only(addition):
    spoilt = {tuple(row) for row in addition.test.input_ids.tolist()[:4]}
    result = score(Oracle([addition.everything], 13, spoilt), addition)
    assert (result.train.greedy, result.test.greedy) == (1.0, 5 / 9)
    assert sum(row.count("0") for row in result.grid.correct) == 4
    assert result.grid.hole == (4, 6)
    assert result.grid.correct[4][4:7] == "000"
    assert result.grid.percent[4][4:7] == [0, 0, 0]
    assert result.grid.correct[5][4:7] == "011"


def test_constant_answer_scores_its_share_of_the_answers(addition, periodic):
    result = score(Constant(5, 13), addition)
    inside = [(a + b) % 11 == 5 for a in range(4, 7) for b in range(4, 7)]
    assert result.test.greedy == sum(inside) / 9
    assert result.train.greedy == (11 - sum(inside)) / 112  # every a has one b with that sum
    likely, other = torch.softmax(torch.tensor([2.0] + [0.0] * 12), 0)[:2].tolist()
    assert result.test.sampled == pytest.approx((sum(inside) * likely + (9 - sum(inside)) * other) / 9)
    result = score(Constant(5, 10), periodic)
    said = periodic.test.labels[:, periodic.scored_from :] == 5
    assert result.test.greedy == pytest.approx(float(said.float().mean()))
    assert set(result.by_period) == {3, 4, 5, 6, 7, 8}


def test_score_agrees_with_counting_one_prompt_at_a_time(addition, tiny_model):
    model = tiny_model(**model_fields(addition))
    result = score(model, addition)
    right = {True: [], False: []}
    chances = {True: [], False: []}
    for a in range(11):
        for b in range(11):
            ids = torch.tensor([[a, addition.vocabulary.index("+"), b, addition.vocabulary.index("=")]])
            with torch.no_grad():
                logits = model(ids).logits[0, -1]
            inside = abs(a - 5) <= 1 and abs(b - 5) <= 1
            right[inside].append(int(logits.argmax()) == (a + b) % 11)
            chances[inside].append(float(torch.softmax(logits * 2, -1)[(a + b) % 11]))
            assert result.grid.correct[a][b] == str(int(right[inside][-1]))
            # rounding to whole percent; batched products differ in the last digits
            assert abs(result.grid.percent[a][b] - 100 * chances[inside][-1]) <= 0.51
    for inside, part in ((True, result.test), (False, result.train)):
        assert part.answers == len(right[inside])
        assert part.greedy == sum(right[inside]) / len(right[inside])
        assert part.sampled == pytest.approx(sum(chances[inside]) / len(chances[inside]), abs=1e-5)
    accuracy, loss = accuracy_and_loss(model, addition, addition.test)
    assert accuracy.greedy == result.test.greedy
    with torch.no_grad():
        logits = model(addition.test.input_ids).logits
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), addition.test.labels.flatten(), ignore_index=-100
    )
    assert loss == pytest.approx(expected.item(), rel=1e-5)


def test_score_survives_json_and_leaves_the_model_in_its_mode(addition, periodic, tiny_model):
    for task in (addition, periodic):
        model = tiny_model(**model_fields(task)).train()
        result = score(model, task)
        assert model.training
        written = json.loads(json.dumps(result.to_dict()))
        assert written["test"] == dataclasses.asdict(result.test)
        assert (written["grid"] is None, written["by_period"] is None) == (task is periodic, task is addition)


def test_batches_do_not_change_the_answers(addition, tiny_model):
    model = tiny_model(**model_fields(addition))
    whole, parts = answers(model, addition.everything), answers(model, addition.everything, batch_size=7)
    assert torch.equal(whole[0], parts[0])
    for one, other in zip(whole[1:], parts[1:], strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)  # products of other shapes round otherwise


def test_model_with_too_few_tokens_is_refused(addition, tiny_model):
    with pytest.raises(ConfigError) as caught:
        score(tiny_model(vocab_size=12), addition)
    assert str(caught.value) == (
        "`vocab_size` of the model must be above the task's highest token 12, got 12: build it with model_fields(task)."
    )
