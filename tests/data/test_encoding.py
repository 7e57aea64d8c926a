import json
import pickle
import random

import numpy as np
import pytest

from fanformer.data.preparation import encoding
from fanformer.data.preparation.encoding import AnyEncoder, BackendEncoder, PieceEncoder, document_encoder
from fanformer.data.tokenizer import encode_documents, train_tokenizer

SAMPLE = (
    "It's the model's 1234567 things:\n\n\tdef f(x):\n        return x  \n "
    "— “naïve” don't, DON'T 漢字 हिन्दी <|endoftext|>"
)
ALPHABETS = {
    "ascii": [chr(code) for code in range(1, 128)],
    "latin and marks": [chr(code) for code in range(0x20, 0x400)],
    "basic plane": [chr(code) for code in range(1, 0xD800)],
    "everything": [chr(code) for code in range(1, 0x110000) if not 0xD800 <= code < 0xE000],
    "borders": list(" \n\r\t\x0b\x85\xa0\u2028\u3000'sdmtlreve_a1٣Ⅷ!.\u0301\u200d漢🙂"),
}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([SAMPLE, "the model and the things of others " * 5] * 9, 500)


@pytest.fixture(scope="module")
def gpt2_tokenizer():
    """As GPT-2's: a ByteLevel pre-tokenizer that cuts by itself."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        [SAMPLE] * 9,
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


@pytest.mark.parametrize("name", ["tokenizer", "gpt2_tokenizer"])
@pytest.mark.parametrize("alphabet", ALPHABETS)
def test_ids_are_those_of_the_tokenizer(request, name, alphabet):
    tokenizer, chance = request.getfixturevalue(name), random.Random(alphabet)
    encoder = document_encoder(tokenizer)
    assert isinstance(encoder, PieceEncoder)
    for _ in range(5):
        texts = ["".join(chance.choices(ALPHABETS[alphabet], k=chance.randrange(200))) for _ in range(60)]
        texts += [SAMPLE, "", "x" * 3000, " " * 50 + "\n" * 50]
        assert [ids.tolist() for ids in encoder.encode(texts)] == encode_documents(tokenizer, texts)


def test_ids_of_real_text_are_those_of_the_tokenizer(tokenizer):
    from fanformer.data.sources.documents import StdlibSource

    texts = [document.text for document in StdlibSource()][::8]
    ids = document_encoder(tokenizer).encode(texts)
    assert [part.tolist() for part in ids] == encode_documents(tokenizer, texts)


def test_text_with_a_character_that_the_engines_class_differently_goes_to_the_tokenizer(tokenizer):
    encoder = document_encoder(tokenizer)
    encoder._compare("".join(map(chr, range(0x300, 0x1000))))
    disputed = np.flatnonzero(encoder._status == encoding._DISPUTED)
    if not len(disputed):
        pytest.skip("these versions of the engines have the same Unicode there")
    texts = [f"a {chr(code)}b" for code in disputed]
    assert [ids.tolist() for ids in encoder.encode(texts)] == encode_documents(tokenizer, texts)


def test_pieces_are_forgotten_so_that_memory_stays_bounded(tokenizer, monkeypatch):
    monkeypatch.setattr(encoding, "_MOST_PIECES", 50)
    encoder = document_encoder(tokenizer)
    for start in range(0, 500, 20):
        texts = [f" {'z' * 101} word{number}" for number in range(start, start + 20)]
        assert [ids.tolist() for ids in encoder.encode(texts)] == encode_documents(tokenizer, texts)
        assert len(encoder._ids) <= 50
        assert len(encoder._older_ids) <= 50 + 60
        assert all(len(piece) <= 100 for piece in encoder._ids)


def changed(tokenizer, **state):
    from tokenizers import Tokenizer

    content = json.loads(tokenizer.backend_tokenizer.to_str()) | state
    return type(tokenizer)(tokenizer_object=Tokenizer.from_str(json.dumps(content)), eos_token="<|endoftext|>")


def test_other_tokenizers_are_encoded_by_their_own_code(tokenizer):
    from transformers import ByT5Tokenizer

    lower = changed(tokenizer, normalizer={"type": "Lowercase"})
    added = changed(tokenizer)
    added.add_tokens(["thing"])
    digits = changed(tokenizer, pre_tokenizer={"type": "Digits", "individual_digits": True})
    for other, kind in ((lower, BackendEncoder), (added, BackendEncoder), (digits, BackendEncoder)):
        encoder = document_encoder(other)
        assert type(encoder) is kind
        assert [ids.tolist() for ids in encoder.encode([SAMPLE])] == encode_documents(other, [SAMPLE])
    other = ByT5Tokenizer()
    encoder = document_encoder(other)
    assert type(encoder) is AnyEncoder
    assert [ids.tolist() for ids in encoder.encode([SAMPLE])] == encode_documents(other, [SAMPLE])


def test_settings_left_on_a_tokenizer_do_not_cut_or_pad(tokenizer):
    other = changed(tokenizer)
    other.backend_tokenizer.enable_truncation(4)
    other.backend_tokenizer.enable_padding()
    expected = encode_documents(tokenizer, [SAMPLE, "a"])
    assert [ids.tolist() for ids in document_encoder(other).encode([SAMPLE, "a"])] == expected


@pytest.mark.parametrize("name", ["tokenizer", "gpt2_tokenizer"])
def test_encoder_travels_to_another_process(request, name):
    encoder = document_encoder(request.getfixturevalue(name))
    expected = [ids.tolist() for ids in encoder.encode([SAMPLE])]
    copy = pickle.loads(pickle.dumps(encoder))
    assert type(copy) is type(encoder)
    assert [ids.tolist() for ids in copy.encode([SAMPLE])] == expected
