"""Requests that share steps: each gets what it would get alone, joins and leaves when it likes, and harms no other."""

import dataclasses
import threading
import time

import numpy as np
import pytest

from fanformer.errors import ConfigError
from fanformer.generation.sampling import Sampling
from fanformer.generation.text_model import row_seed
from fanformer.server.scheduler import ClosedError, Failure, Finish, QueueFullError, Request, Scheduler
from tests.server.conftest import PATIENCE_SECONDS, PROMPTS, Heard, offline, run, submit

GREEDY = Sampling(temperature=0)


def ask(served, prompt, max_tokens=12, sampling=GREEDY, **fields):
    ids, beginning = served.encode_to_continue(prompt)
    return Request(ids, max_tokens, sampling, beginning=beginning, **fields)


def settle(scheduler):
    """Wait until nobody has a slot or waits."""
    until = time.monotonic() + PATIENCE_SECONDS
    while scheduler.running or scheduler.waiting:
        assert time.monotonic() < until
        time.sleep(0.005)


def test_greedy_answers_of_crowded_requests_are_the_offline_ones(served):
    expected = offline(served, PROMPTS, temperature=0, max_length=30)
    found = run(served, *(ask(served, prompt, 30) for prompt in PROMPTS))
    for heard, completion in zip(found, expected, strict=True):
        assert heard.text == completion.text
        assert heard.all[-1].completion_tokens == completion.tokens
        assert heard.all[-1].reason == {"end": "stop", "length": "length"}[completion.finish_reason]


def test_sampled_answers_are_those_of_the_seed_offline(served):
    settings = {"temperature": 0.9, "top_k": 50, "top_p": 0.9}
    expected = offline(served, PROMPTS, seed=7, max_length=20, **settings)
    requests = [
        ask(served, prompt, 20, Sampling(**settings, seed=row_seed(7, index))) for index, prompt in enumerate(PROMPTS)
    ]
    assert [heard.text for heard in run(served, *requests)] == [completion.text for completion in expected]
    assert len({heard.text for heard in run(served, *requests)}) > 3


def test_requests_that_join_and_leave_at_any_token_change_nothing(served):
    prompts = [f"{prompt}{suffix}" for prompt in PROMPTS[:4] for suffix in ("", " the", " a small")]
    lengths = [1 + 5 * index % 23 for index in range(len(prompts))]
    cases = list(zip(prompts, lengths, strict=True))
    alone = [offline(served, [prompt], temperature=0, max_length=length)[0].text for prompt, length in cases]
    heard = []
    for prompt, length in cases:
        [one], _ = submit(served, ask(served, prompt, length))
        heard.append(one)
        if length % 3 == 0:
            heard[-1].next()  # the next request comes while this one is being written
    for one in heard:
        assert isinstance(one.wait(), Finish)
    assert [one.text for one in heard] == alone


def test_each_request_has_its_own_settings(served):
    base = ask(served, "the cat", 10)
    varied = [
        base,
        dataclasses.replace(base, sampling=Sampling(temperature=0, logit_bias={5: 100.0})),
        dataclasses.replace(base, sampling=Sampling(temperature=0, frequency_penalty=2.0, presence_penalty=2.0)),
        dataclasses.replace(base, max_tokens=3),
    ]
    together = [heard.text for heard in run(served, *varied)]
    assert together == [run(served, request)[0].text for request in varied]
    assert together[1] == served.decode([5]) * 10
    assert len(set(together)) == 4


def test_stop_strings_end_the_text_and_never_leak(served):
    text = run(served, ask(served, "the cat", 30))[0].text
    assert len(text) > 12
    for start in range(0, 10, 3):
        stop = text[start : start + 3]
        [heard] = run(served, ask(served, "the cat", 30, stops=(stop, "never written")))
        assert heard.text == text[: text.index(stop)]
        assert heard.all[-1].reason == "stop"


def test_log_probabilities_are_the_models_own(served):
    ids = served.encode("the cat sat on the mat")
    expected = served.offline.log_likelihoods(ids)
    sampling = Sampling(temperature=0.3, top_k=3, seed=1)  # filters change nothing about what is told
    [heard] = run(served, Request(ids, 5, sampling, likeliest=4, scores_prompt=True))
    found = [token.log_probability for token in heard.prompt]
    assert found[0] is None
    # float32 sums in another order: reading in pieces beside others
    np.testing.assert_allclose(found[1:], expected, atol=1e-4)
    new = [token.id for token in heard.tokens]
    again = served.offline.log_likelihoods([*ids, *new])[len(ids) - 1 :]
    np.testing.assert_allclose([token.log_probability for token in heard.tokens], again, atol=1e-4)
    assert heard.all[-1].log_probability == pytest.approx(sum(again), abs=1e-3)
    for token in [*heard.prompt[1:], *heard.tokens]:
        best = [value for _, value in token.likeliest]
        assert best == sorted(best, reverse=True)
        assert len(best) == 4
        if token.id in dict(token.likeliest):
            assert dict(token.likeliest)[token.id] == token.log_probability


def test_a_prompt_is_only_read_with_no_new_tokens(served):
    [heard] = run(served, Request(served.encode("the cat"), 0, scores_prompt=True))
    assert heard.tokens == []
    assert heard.all[-1].completion_tokens == 0
    assert len(heard.prompt) == len(served.encode("the cat"))


def test_a_long_prompt_is_read_between_the_steps_of_others(served, monkeypatch):
    monkeypatch.setattr(served.slots, "chunk_tokens", 4)
    long = ask(served, "the cat sat on the mat. " * 6, 3)
    expected = offline(served, ["the cat sat on the mat. " * 6], temperature=0, max_length=3)[0].text
    pieces = -(-len(long.ids) // 4)
    assert pieces > 8
    order = []
    heard = [Heard(), Heard()]
    listeners = [
        lambda event: (order.append("short"), heard[0](event)),
        lambda event: (order.append("long"), heard[1](event)),
    ]
    served.scheduler.submit([ask(served, "def", 60), long], listeners)
    assert isinstance(heard[1].wait(), Finish)
    heard[0].wait()
    assert heard[1].text == expected
    # a word may be held back now and then, but the short text went on while the long prompt was read
    assert order[: order.index("long")].count("short") >= pieces // 3


def test_what_a_slot_still_holds_is_not_read_again(served):
    settle(served.scheduler)
    prompt = "def add(a, b):\n    return a + b\n"
    first = run(served, ask(served, prompt, 5))[0]
    second = run(served, ask(served, prompt, 5))[0]
    other = run(served, ask(served, prompt + "the end", 5))[0]
    expected = offline(served, [prompt, prompt + "the end"], temperature=0, max_length=5)
    assert [first.text, other.text] == [completion.text for completion in expected]
    assert second.text == first.text
    length = len(served.encode(prompt))
    assert second.all[-1].cached_tokens == length - 1
    assert length - 3 <= other.all[-1].cached_tokens <= length


def test_a_cancelled_request_frees_its_slot_and_says_nothing_more(served):
    heard, tickets = submit(served, *(ask(served, prompt, 70) for prompt in PROMPTS[:6]))
    heard[0].next()  # it is being written; the last two wait for a slot
    for ticket in tickets:
        ticket.cancel()
    settle(served.scheduler)
    said = [one.events.qsize() for one in heard]
    assert run(served, ask(served, "def", 5))[0].text == offline(served, ["def"], temperature=0, max_length=5)[0].text
    assert [one.events.qsize() for one in heard] == said
    assert served.scheduler.counters.finished["cancelled"] >= 6


def test_a_full_queue_refuses_all_of_a_submission(served):
    settle(served.scheduler)
    refused = served.scheduler.counters.refused
    many = [ask(served, "the cat", 60)] * 12  # four slots and eight that wait
    with pytest.raises(QueueFullError, match="a client may have 10 answers in work, 0 are"):
        submit(served, *many)
    _, tickets = submit(served, *many[:10])
    with pytest.raises(QueueFullError, match="a client may have 10 answers in work, 10 are"):
        submit(served, many[0])
    tickets += submit(served, *many[10:], client="another")[1]
    with pytest.raises(QueueFullError, match="12 answers are in work or wait already: try again later"):
        submit(served, many[0], many[0], client="a third one")
    assert served.scheduler.counters.refused == refused + 15
    for ticket in tickets:
        ticket.cancel()
    settle(served.scheduler)
    assert run(served, ask(served, "def", 2))


def test_clients_take_turns(tiny_tokenizer):
    slots, order = Still(), []
    slots.count = 2
    scheduler = Scheduler(slots, tiny_tokenizer, 300, [0], queue_size=16)

    def listener(name):
        return lambda event: order.append(name) if isinstance(event, Finish) else None

    for client, count in (("a", 6), ("b", 3), ("c", 1)):
        names = [f"{client}{number}" for number in range(count)]
        scheduler.submit([Request([1], 5, GREEDY)] * count, list(map(listener, names)), client)
    while scheduler.running < slots.count:
        time.sleep(0.001)
    slots.gate.set()
    while len(order) < 10:
        time.sleep(0.001)
    scheduler.close()
    # whoever came first may have had both slots before the others came; then they take turns
    assert [name for name in order if name[0] == "a"] == [f"a{number}" for number in range(6)]
    assert max(map(order.index, ("b0", "c0"))) <= 4
    assert order.index("b2") < order.index("a5")


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request([], 1), "at least one token"),
        (Request([0], -1), "`max_tokens` 0 or more"),
        (Request([0] * 60, 41), "the prompt has 60 tokens and max_tokens 41 more make 101, expected at most 100"),
        (Request([300], 1), r"token ids must be in \[0, 300\), got 300 to 300"),
        (Request([-1], 1), "token ids must be in"),
    ],
)
def test_what_cannot_be_done_is_refused_before_it_waits(served, request_, message):
    with pytest.raises(ConfigError, match=message):
        submit(served, request_)


def test_a_listener_that_fails_ends_its_own_request_alone(served):
    def broken(event):
        raise RuntimeError("gone")

    heard = Heard()
    served.scheduler.submit([ask(served, "the cat", 20), ask(served, "def", 20)], [broken, heard])
    assert isinstance(heard.wait(), Finish)
    assert heard.text == offline(served, ["def"], temperature=0, max_length=20)[0].text


def test_a_step_that_fails_ends_what_it_computed_and_the_next_works(served, monkeypatch):
    settle(served.scheduler)
    forward = served.slots.forward

    def failing(tokens, every=False):
        monkeypatch.setattr(served.slots, "forward", forward)
        raise MemoryError("no room")

    monkeypatch.setattr(served.slots, "forward", failing)
    [heard], _ = submit(served, ask(served, "the cat"))
    assert heard.wait() == Failure("the model failed to compute: see the server's log")
    assert run(served, ask(served, "the cat"))
    assert served.scheduler.is_healthy


def test_a_request_that_cannot_be_begun_ends_alone(served, monkeypatch):
    settle(served.scheduler)
    noise = served.slots.noise

    def failing(seed):
        monkeypatch.setattr(served.slots, "noise", noise)
        raise MemoryError("no room")

    monkeypatch.setattr(served.slots, "noise", failing)
    heard, _ = submit(served, ask(served, "the cat"), ask(served, "def", 5))
    assert heard[0].wait() == Failure("internal error: see the server's log")
    assert isinstance(heard[1].wait(), Finish)
    assert heard[1].text == offline(served, ["def"], temperature=0, max_length=5)[0].text
    assert served.scheduler.is_healthy


def test_logits_that_are_no_numbers_end_their_own_request_alone(served, monkeypatch):
    settle(served.scheduler)
    forward, spoilt = served.slots.forward, set()

    def spoiling(tokens, every=False):
        found = {slot: logits.copy() for slot, logits in forward(tokens, every).items()}
        for slot in tokens:
            if not spoilt or slot in spoilt:
                spoilt.add(slot)
                found[slot][:] = np.nan
        return found

    monkeypatch.setattr(served.slots, "forward", spoiling)
    heard, _ = submit(served, ask(served, "the cat", 20), ask(served, "def", 20))
    assert "no numbers" in heard[0].wait().message
    assert isinstance(heard[1].wait(), Finish)
    monkeypatch.undo()
    assert run(served, ask(served, "the cat"))


def test_what_is_no_number_does_not_stay_in_the_slot(tmp_path, saved_model):
    """A token whose embedding is spoilt ends its own request; the next text of the slot, a shorter one, is right."""
    import torch

    from fanformer.loading import load_text_model
    from fanformer.server.models import ServedModel, SlotSettings

    model = ServedModel.open(saved_model, "tiny", SlotSettings(1, 100, queue_size=8), device="cpu")
    model.offline = load_text_model(saved_model, device="cpu")
    with torch.no_grad():
        model.text_model.model.model.embed_tokens.weight[7] = torch.nan
    [heard], _ = submit(model, Request([0, *[9] * 20, 7, *[9] * 20], 5))
    assert "no numbers" in heard.wait().message
    expected = offline(model, ["the cat"], temperature=0, max_length=8)[0].text
    assert run(model, ask(model, "the cat", 8))[0].text == expected
    model.close()


def test_many_threads_lose_and_mix_nothing(served):
    settle(served.scheduler)
    expected = [completion.text for completion in offline(served, PROMPTS, temperature=0, max_length=8)]
    wrong = []

    def client(index):
        for turn in range(5):
            which = (index + turn) % len(PROMPTS)
            while True:
                try:
                    [heard] = run(served, ask(served, PROMPTS[which], 8))
                    break
                except QueueFullError:
                    time.sleep(0.01)
            if heard.text != expected[which]:
                wrong.append((which, heard.text))

    threads = [threading.Thread(target=client, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_SECONDS)
    assert wrong == []


class Still:
    """Slots that compute nothing until they are let."""

    count, positions, chunk_tokens, steps = 1, 32, 8, None

    def depth(self, slot):
        return None

    def __init__(self):
        self.gate, self.kept = threading.Event(), 0

    def forward(self, tokens, every=False):
        assert self.gate.wait(PATIENCE_SECONDS)
        return {slot: np.eye(1, 320, k=5, dtype=np.float32) for slot in tokens}  # never the end token

    def cut(self, slot, length):
        self.kept = length

    def wipe(self, slot):
        self.kept = 0

    def show(self, slot, shown):
        pass

    def noise(self, seed):
        return lambda: np.ones(300, dtype=np.float32)

    def close(self):
        pass


def test_closing_tells_whoever_waits_and_takes_no_more(tiny_tokenizer):
    slots = Still()
    scheduler = Scheduler(slots, tiny_tokenizer, 300, [0], queue_size=4)
    heard = [Heard(), Heard()]
    scheduler.submit([Request([1], 5, GREEDY), Request([2], 5, GREEDY)], heard)
    closing = threading.Thread(target=scheduler.close)
    closing.start()
    while not scheduler._closed:
        time.sleep(0.001)
    with pytest.raises(ClosedError, match="shutting down"):
        scheduler.submit([Request([1], 5)], [Heard()])
    slots.gate.set()
    closing.join(PATIENCE_SECONDS)
    assert [one.wait().closing for one in heard] == [True] * 2
