"""Streamed text: whole characters, and in the end the very text that decoding all tokens at once gives."""

import itertools
import os
import random
import signal
import threading
import time

import numpy as np
import pytest
import torch

from fanformer.errors import ConfigError
from fanformer.generation.decoding import TextDecoder, TextWriter
from fanformer.generation.interruption import Interruption, interruptible
from fanformer.generation.settings import GenerationSettings
from fanformer.generation.torch_model import StopWhenInterrupted, TextStreamer, TorchModel
from fanformer.gguf import ggml_model
from tests.gguf_models import export
from tests.saved_models import complete_on_torch as generate

# Chinese, Thai, an emoji of three joined ones with skin tones, a flag, combining accents, leading and double spaces.
TEXTS = [
    "\u4e16\u754c\uff0c\u4f60\u597d",
    "\u0e2a\u0e27\u0e31\u0e2a",
    "\U0001f469\U0001f3fd\u200d\U0001f680 \U0001f1eb\U0001f1f7",
]
TEXTS += ["e\u0301t\u00e9", "  two  spaces ", " x", "\ttab\nline\r\n"]


def pieces_of(tokenizer, prompt_ids, ids):
    decoder = TextDecoder(tokenizer, prompt_ids)
    return [*map(decoder.push, ids), decoder.finish()]


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_streamed_pieces_join_to_the_text_and_split_no_character(tiny_tokenizer, text):
    ids = tiny_tokenizer.encode(text)
    pieces = pieces_of(tiny_tokenizer, [0], ids)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_every_character_comes_with_its_last_byte(tiny_tokenizer):
    ids = tiny_tokenizer.encode("\u4e16")
    assert len(ids) == 3
    assert pieces_of(tiny_tokenizer, [], ids) == ["", "", "\u4e16", ""]


@pytest.mark.parametrize("seed", range(20))
def test_random_bytes_join_to_the_full_decode(tiny_tokenizer, seed):
    ids = random.Random(seed).choices(range(1, len(tiny_tokenizer)), k=60)
    assert "".join(pieces_of(tiny_tokenizer, [0], ids)) == tiny_tokenizer.decode(ids)


def test_unfinished_character_comes_at_the_end_only(tiny_tokenizer):
    ids = tiny_tokenizer.encode("a\u4e16")[:-1]
    *pieces, last = pieces_of(tiny_tokenizer, [], ids)
    assert "".join(pieces) == "a"
    assert last == "\ufffd"


def test_a_prompt_that_ends_in_no_character_does_not_come_back(tiny_tokenizer):
    whole = tiny_tokenizer.encode("a\u4e16 cat")
    cut = next(n for n in range(len(whole)) if tiny_tokenizer.decode(whole[:n]) == "a\ufffd")
    assert "".join(pieces_of(tiny_tokenizer, whole[:cut], whole[cut:])) == "\u4e16 cat"
    assert "".join(pieces_of(tiny_tokenizer, whole[:cut], [])) == ""
    replaced = tiny_tokenizer.encode("a\ufffd")
    assert "".join(pieces_of(tiny_tokenizer, replaced, tiny_tokenizer.encode(" cat"))) == " cat"


@pytest.mark.parametrize("seed", range(20))
def test_random_bytes_behind_random_bytes_join_to_what_decoding_adds(tiny_tokenizer, seed):
    ids = random.Random(seed).choices(range(1, len(tiny_tokenizer)), k=40)
    prompt, whole = tiny_tokenizer.decode(ids[:20]), tiny_tokenizer.decode(ids)
    kept = prompt if whole.startswith(prompt) else prompt.rstrip("\ufffd")
    assert "".join(pieces_of(tiny_tokenizer, ids[:20], ids[20:])) == whole.removeprefix(kept)


def test_special_tokens_are_not_written(tiny_tokenizer):
    assert "".join(pieces_of(tiny_tokenizer, [0], [*tiny_tokenizer.encode("cat"), 0])) == "cat"


def test_word_start_marks_keep_their_space_after_a_prompt():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "\u2581the": 1, "\u2581cat": 2}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    assert "".join(pieces_of(wrapped, [1], [2, 1])) == " cat the"


def test_streamer_leaves_the_prompt_out(tiny_tokenizer):
    pieces = []
    prompt = tiny_tokenizer.encode("the cat")
    streamer = TextStreamer(TextWriter(tiny_tokenizer, prompt, pieces.append))
    streamer.put(torch.tensor([prompt]))
    for token_id in tiny_tokenizer.encode(" sat \u4e16"):
        streamer.put(torch.tensor([token_id]))
    streamer.end()
    assert "".join(pieces) == " sat \u4e16"


def test_streamed_generation_equals_its_completion(loaded):
    pieces = []
    settings = GenerationSettings(max_length=60, min_length=60, temperature=1.5, top_k=0, top_p=1.0, seed=5)
    completion = generate(*loaded, ["the"], settings, on_text=pieces.append)[0]
    assert "".join(pieces) == completion.text == generate(*loaded, ["the"], settings)[0].text
    assert len(pieces) > 10


def test_stopping_says_the_same_for_every_row():
    interruption = Interruption()
    stop = StopWhenInterrupted(interruption)
    ids = torch.zeros(3, 4, dtype=torch.long)
    assert not stop(ids, None).any()
    interruption.request()
    assert stop(ids, None).tolist() == [True] * 3


def test_first_interrupt_requests_and_the_second_raises():
    before = signal.getsignal(signal.SIGINT)
    with interruptible() as interruption:
        os.kill(os.getpid(), signal.SIGINT)
        assert interruption.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_interruptible_works_outside_the_main_thread():
    seen = []

    def work():
        with interruptible() as interruption:
            seen.append(interruption.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]


class OneText:
    """Stands for the engine of ggml: the next token follows from all those that it was given since it began."""

    def __init__(self, file, model, threads=None, num_steps=None):
        self.model, self.texts, self.ids, self.owners = model, 0, [], []

    def begin(self, streams, positions, keep=0):
        self.texts, self.ids = self.texts + 1, []
        return 0

    def forward(self, tokens, every=False):
        self.owners.append(threading.get_ident())
        logits = []
        for token in tokens[0]:
            self.ids.append(token)
            logits.append(np.random.default_rng(self.ids).standard_normal(self.model.vocab_size, dtype=np.float32))
        time.sleep(0.001)  # so that others would come in between
        return [np.stack(logits if every else logits[-1:])]


@pytest.fixture(params=["torch", "ggml"])
def model_and_owners(request, saved_model, loaded, monkeypatch):
    """A model, and which thread was at each of its steps."""
    if request.param == "ggml":
        monkeypatch.setattr(ggml_model, "Engine", OneText)
        model = ggml_model.GgmlModel(export(saved_model), threads=1)
        yield model, model.engine.owners
        return
    model, owners = TorchModel(*loaded), []
    handle = model.model.register_forward_pre_hook(lambda *_: owners.append(threading.get_ident()))
    yield model, owners
    handle.remove()


@pytest.mark.parametrize("how", ["generate while a stream is half read", "score meanwhile", "two streams", "threads"])
def test_texts_at_a_time_are_what_each_alone_gives(model_and_owners, how):
    model, owners = model_and_owners
    prompts, settings = ("the cat", "a small dog"), {"max_length": 15, "min_length": 15, "seed": 3}
    alone = [model.generate(prompt, **settings) for prompt in prompts]
    likely = model.score(prompts[1])
    owners.clear()
    stream = model.stream(prompts[0], **settings)
    if how == "two streams":
        pairs = itertools.zip_longest(stream, model.stream(prompts[1], **settings), fillvalue="")
        assert ["".join(pieces) for pieces in zip(*pairs, strict=True)] == alone
    elif how == "threads":
        found = {}
        writers = [
            threading.Thread(target=lambda one=one: found.update({one: model.generate(one, **settings)}))
            for one in prompts
        ]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        assert [found[prompt] for prompt in prompts] == alone
    else:
        first = next(stream)
        if how == "score meanwhile":
            assert model.score(prompts[1]) == likely
        else:
            assert model.generate(prompts[1], **settings) == alone[1]
        assert first + "".join(stream) == alone[0]
    assert len(list(itertools.groupby(owners))) == 2  # one text, and then the other


def test_a_stream_that_nobody_reads_on_holds_nobody_up_for_ever(model_and_owners):
    model, _ = model_and_owners
    expected = model.generate("a", max_length=5, seed=1)
    kept, dropped = (model.stream("the cat", max_length=40, min_length=40) for _ in range(2))
    next(kept)
    next(dropped)
    del dropped
    assert model.generate("a", max_length=5, seed=1) == expected


def test_asking_a_model_from_within_its_text_is_refused(model_and_owners):
    model, _ = model_and_owners
    with pytest.raises(ConfigError, match="must not be asked while it writes, got a call from `on_text`: ask after"):
        list(model.complete(["the cat"], GenerationSettings(max_length=5), lambda text: model.score("x")))
    assert model.generate("the cat", max_length=5)
