"""Fixtures: a tiny model saved with a byte-level tokenizer, and spoilt copies of it."""

import json
import shutil

import pytest

SENTENCES = ["the cat sat on the mat. ", "def add(a, b):\n    return a + b\n", "a small model speaks of small things. "]


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """A byte-level BPE tokenizer of 300 tokens with a start and end token in one, trained here."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 20, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory, tiny_model, tiny_tokenizer):
    """Folder of a tiny model; its vocabulary is padded to 320, 20 more than the tokenizer has.

    Its ranks fill groups of 16, as those of every preset do.
    """
    folder = tmp_path_factory.mktemp("models") / "tiny"
    ranks = {"qkv_rank": 48, "o_rank": 32, "gate_up_rank": 32, "down_rank": 48}
    model = tiny_model(vocab_size=320, eos_token_id=0, bos_token_id=0, **ranks)
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def recurrent_model(tmp_path_factory, tiny_model, tiny_tokenizer):
    """Folder of a tiny model whose second of three blocks runs up to 8 times, 4 by default."""
    folder = tmp_path_factory.mktemp("models") / "recurrent"
    parts = {"num_hidden_layers": 3, "prelude_layers": 1, "core_layers": 1, "coda_layers": 1}
    tiny_model(vocab_size=320, eos_token_id=0, bos_token_id=0, **parts).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def model_copy(saved_model, tmp_path):
    """A copy of the saved model to spoil."""
    return shutil.copytree(saved_model, tmp_path / "copy")


@pytest.fixture
def asking(model_copy):
    """Return a function that gives a folder whose generation settings hold some more."""

    def make(**fields):
        file = model_copy / "generation_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | fields))
        return model_copy

    return make


@pytest.fixture(scope="session")
def loaded(saved_model):
    """The saved model and its tokenizer, loaded on the CPU."""
    from fanformer.loading import load

    return load(saved_model, device="cpu")


def complete_on_torch(model, tokenizer, prompts, settings, on_text=None, *, compiled=False, **arguments):
    """Return the completions of a model of `transformers`."""
    from fanformer.generation.torch_model import TorchModel

    return list(TorchModel(model, tokenizer, compiled).complete(prompts, settings, on_text, **arguments))
