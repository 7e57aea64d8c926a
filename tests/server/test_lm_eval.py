"""lm-evaluation-harness against the server: `local-completions` scores and writes as the model does offline."""

import pytest

from fanformer.generation.sampling import Sampling
from fanformer.server.scheduler import Request
from tests.server.conftest import run, running

pytestmark = pytest.mark.ci
PAIRS = [
    ("the cat", " sat on the mat"),
    ("def add(a, b):", "\n    return a + b"),
    ("", "a small model"),
    ("\u4e16", "\u754c"),
]


@pytest.fixture(scope="module", params=["huggingface", "auto"])
def harness(request, served, saved_model):
    """The harness's model, which asks a server of ours: also for its tokens, unless it has the tokenizer itself."""
    pytest.importorskip("tenacity", reason="needs lm-eval's extra `api` (tenacity)")
    completions = pytest.importorskip("lm_eval.models.openai_completions", reason="needs lm-eval")
    with running({"tiny": served}) as client:
        made = completions.LocalCompletionsAPI(
            base_url=f"http://127.0.0.1:{client.port}/v1/completions", model="tiny", max_length=100, batch_size=3,
            tokenizer=str(saved_model) if request.param == "huggingface" else None,
            tokenizer_backend=request.param, max_retries=1,
        )  # fmt: skip
        assert made.tokenizer_backend == {"auto": "remote"}.get(request.param, request.param)
        yield made


def instance(kind, *arguments):
    from lm_eval.api.instance import Instance

    return Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


def written(served, ids, count):
    """The likeliest continuation of ids: its text and its ids."""
    [heard] = run(served, Request(ids, count, Sampling(temperature=0), likeliest=0))
    return heard.text, [token.id for token in heard.tokens]


def test_scores_are_the_local_ones(harness, served):
    found = harness.loglikelihood([instance("loglikelihood", *pair) for pair in PAIRS])
    for (context, continuation), (score, is_greedy) in zip(PAIRS, found, strict=True):
        before, new = (
            harness._encode_pair(context, continuation) if context else ([0], harness.tok_encode(continuation))
        )
        values = served.offline.log_likelihoods([*before, *new])[len(before) - 1 :]
        assert score == pytest.approx(sum(values), abs=1e-3)
        assert is_greedy == (written(served, before, len(new))[1] == new)


def test_the_likeliest_continuation_is_called_so_and_no_other(harness, served):
    ids = served.encode("the cat")
    _, likeliest = written(served, ids, 5)
    other = [*likeliest[:4], likeliest[4] ^ 1]
    pairs = [(("a", "b"), ids, likeliest), (("a", "c"), ids, other)]
    assert [is_greedy for _, is_greedy in harness._loglikelihood_tokens(pairs)] == [True, False]


def test_texts_end_at_the_harness_s_stops(harness, served):
    text, _ = written(served, harness.tok_encode("the cat"), 30)
    stop = text[6:9]
    settings = {"until": [stop, "1", "2", "3", "4", "5"], "max_gen_toks": 30, "do_sample": False, "temperature": 0}
    [found] = harness.generate_until([instance("generate_until", "the cat", settings)])
    assert found == text[: text.index(stop)]
