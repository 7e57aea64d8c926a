"""Scores of continuations: those of a plain forward pass, the same bits in any company, kept over a kill."""

import json

import pytest
import torch

from fanformer.errors import DataError, NotANumberError
from fanformer.evaluation import scoring
from fanformer.evaluation.scoring import Scorer, model_fingerprint


@pytest.fixture(scope="module")
def requests():
    generator = torch.Generator().manual_seed(0)

    def ids(longest):
        length = int(torch.randint(1, longest, (1,), generator=generator))
        return torch.randint(0, 300, (length,), generator=generator).tolist()

    made = [(ids(40), ids(6)) for _ in range(37)]
    context = ids(20)
    return [*made, *((context, [token]) for token in range(5)), made[0]]


@pytest.mark.parametrize("kind", ["fanformer", "llama", "gpt2"])
def test_scores_are_those_of_a_forward_pass(make_model, requests, kind):
    model = make_model(kind)
    scores = Scorer(model).score("task", requests)
    assert scores[-1] == scores[0]
    for (context, continuation), score in zip(requests, scores, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([context + continuation]), use_cache=False).logits[0, len(context) - 1 : -1]
        expected = logits.double().log_softmax(-1).gather(1, torch.tensor(continuation)[:, None]).sum()
        assert score.log_likelihood == pytest.approx(float(expected), abs=1e-4)  # float32, padded
        assert score.is_greedy == (logits.argmax(-1).tolist() == continuation)


def test_scores_are_the_same_bits_in_any_order(make_model, requests):
    model = make_model("fanformer")
    backwards = Scorer(model).score("task", requests[::-1])
    assert Scorer(model).score("task", requests) == backwards[::-1]


def test_requests_of_one_context_and_one_token_share_a_row(make_model, requests):
    scorer = Scorer(make_model("llama"))
    scorer.score("task", [([1, 2, 3], [token]) for token in range(50)])
    assert scorer.passes_computed == 1


def test_killed_evaluation_goes_on_with_the_same_bits(make_model, requests, tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "TOKENS_PER_PASS", 128)  # eight passes or more
    model = make_model("fanformer")
    whole = Scorer(model).score("task", requests)
    done = []

    class Killed(Exception):
        pass

    def kill(number):
        done.append(number)
        if len(done) == 3:
            raise Killed

    with pytest.raises(Killed):
        Scorer(model, tmp_path).score("task", requests, kill)
    (file,) = tmp_path.iterdir()
    with file.open("a") as stream:
        stream.write("[3, [[-1.5, tr")  # what a kill in the middle of a write leaves
    again = Scorer(model, tmp_path)
    assert again.score("task", requests) == whole
    alone = Scorer(model)
    alone.score("task", requests)
    assert again.passes_computed == alone.passes_computed - 3 >= 5
    third = Scorer(model, tmp_path)
    assert third.score("task", requests) == whole
    assert third.passes_computed == 0
    assert len(list(tmp_path.iterdir())) == 1
    third.score("task", requests[1:-1])
    assert len(list(tmp_path.iterdir())) == 2  # other requests, other passes
    assert all(json.loads(line) for line in file.read_text().splitlines())


def test_steps_of_passes_that_were_kept_are_counted_again(tiny_model, requests, tmp_path):
    from fanformer.generation.depth import chosen_depth

    layers = {"num_hidden_layers": 3, "prelude_layers": 1, "core_layers": 1, "coda_layers": 1}
    model = tiny_model(vocab_size=320, eos_token_id=0, bos_token_id=0, max_position_embeddings=128, **layers)
    with torch.no_grad():  # else a step changes nothing
        model.model.bridge.scale.fill_(0.7)
    means = []
    for computed in (True, False):
        scorer = Scorer(model, tmp_path)
        with chosen_depth(model, 8, 0.3) as told:
            scorer.score("task", requests)
        assert (scorer.passes_computed > 0) == computed
        means.append(told["mean_steps"])
    assert 1 < means[0] == means[1] < 8


def test_a_log_likelihood_that_is_no_number_is_refused_and_not_kept(make_model, requests, tmp_path):
    model = make_model("llama")
    with torch.no_grad():
        model.lm_head.weight[5] = torch.nan
    with pytest.raises(NotANumberError, match="values that are no numbers"):
        Scorer(model, tmp_path).score("task", requests)
    (file,) = tmp_path.iterdir()
    assert file.read_bytes() == b""


def test_damaged_file_of_finished_passes_is_named(make_model, requests, tmp_path):
    model = make_model("llama")
    Scorer(model, tmp_path).score("task", requests)
    (file,) = tmp_path.iterdir()
    file.write_bytes(b"\0" + file.read_bytes()[1:])
    with pytest.raises(DataError, match=rf"{file} is damaged .*: delete it"):
        Scorer(model, tmp_path).score("task", requests)


def test_passes_are_as_large_as_their_width_allows(make_model):
    scorer = Scorer(make_model("llama"))
    scorer.score("task", [([index, index + 1], [3]) for index in range(64)])
    assert scorer.passes_computed == 1  # 64 rows of 16 tokens
    scorer.score("task", [([index] * 128, [3]) for index in range(9)])
    assert scorer.passes_computed == 3  # 8 rows of 128 tokens, and the ninth


def test_fingerprint_is_that_of_weights_configuration_and_dtype(saved_model, make_model):
    from fanformer.loading import load_model

    first = model_fingerprint(load_model(saved_model, "cpu"))
    model = load_model(saved_model, "cpu")
    assert model_fingerprint(model) == first
    assert model_fingerprint(load_model(saved_model, "cpu", "bfloat16")) != first
    model.config.rms_norm_eps *= 2
    assert model_fingerprint(model) != first
    model.config.rms_norm_eps /= 2
    with torch.no_grad():
        next(model.parameters()).view(-1)[-1] += 1
    assert model_fingerprint(model) != first
    assert model_fingerprint(make_model("llama")) != model_fingerprint(make_model("qwen3"))


def test_long_context_is_cut_on_its_left_and_counted(make_model):
    scorer = Scorer(make_model("llama"))
    context = [index % 300 for index in range(200)]
    long, short = scorer.score("task", [(context, [5, 6]), (context[-127:], [5, 6])])
    assert long == short
    assert scorer.truncated == {"task": 1}


def test_continuation_longer_than_the_context_is_predicted_in_pieces(make_model):
    model = make_model("llama")
    scorer = Scorer(model)
    tokens = [(index * 7) % 300 for index in range(203)]
    (score,) = scorer.score("task", [(tokens[:3], tokens[3:])])
    expected = 0.0
    for start in range(3, 203, 64):  # 128 positions: halves of them, each with all the context that fits
        stop = min(start + 64, 203)
        before = max(0, stop - 129)
        with torch.no_grad():
            logits = model(torch.tensor([tokens[before : stop - 1]]), use_cache=False).logits[0, start - stop :]
        expected += float(logits.double().log_softmax(-1).gather(1, torch.tensor(tokens[start:stop])[:, None]).sum())
    assert score.log_likelihood == pytest.approx(expected, rel=1e-6)  # float32 in rows of other widths
    assert scorer.truncated == {"task": 1}


def test_empty_continuation_is_refused(make_model):
    with pytest.raises(DataError, match="`task` asks for a continuation of 0 tokens: expected 1 or more"):
        Scorer(make_model("llama")).score("task", [([1], [])])
