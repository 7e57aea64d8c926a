"""Streamed text: whole characters, and in the end the very text that decoding all tokens at once gives."""

import os
import random
import signal
import threading

import pytest
import torch

from fanformer.generation.decoding import TextDecoder, TextWriter
from fanformer.generation.interruption import Interruption, interruptible
from fanformer.generation.settings import GenerationSettings
from fanformer.generation.torch_model import StopWhenInterrupted, TextStreamer
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
