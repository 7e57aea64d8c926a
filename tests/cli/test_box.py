"""The model in the box: every verb that takes it where no DIR is named, and what each says where there is none."""

import json
import shutil

import pytest

import fanformer
from fanformer import loading
from fanformer.cli.generate import model_and_prompts
from fanformer.cli.serve import named_models
from fanformer.errors import CheckpointError, ConfigError

FIXED = ("--seed", "1", "--max-length", "6", "--min-length", "6", "--device", "cpu")
CARD = "---\nlicense: mit\n---\n\n# A small model\n\nIt read fairy tales. Licence: MIT.\n\n## Data\n\nMuch.\n"


@pytest.fixture
def box(saved_model, tmp_path, monkeypatch):
    """A tiny model, with a card, where the package looks for the one that came with it."""
    folder = shutil.copytree(saved_model, tmp_path / "box")
    (folder / "README.md").write_text(CARD)
    monkeypatch.setattr(loading, "BOX", folder)
    return folder


@pytest.fixture
def no_box(tmp_path, monkeypatch):
    """An installation without one, and a working folder without runs."""
    monkeypatch.setattr(loading, "BOX", tmp_path / "box")
    monkeypatch.chdir(tmp_path)


def test_it_lies_in_the_package(monkeypatch):
    assert loading.BOX.parent == loading.Path(fanformer.__file__).parent


def test_chat_and_generate_take_it(command, saved_model, box):
    for words, text in ((["chat"], "the cat\n"), (["generate", "the cat"], ""), (["generate"], "")):
        verb, *prompts = words
        without, named = command(verb, *prompts, *FIXED, text=text), command(verb, box, *prompts, *FIXED, text=text)
        assert (without.code, without.out) == (0, named.out)
        assert len(without.out) > 6
    assert "the model in the box is a base model" in command("chat", *FIXED).err


def test_info_says_what_it_is_and_where(command, box):
    outcome = command("info")
    assert outcome.code == 0
    assert outcome.out.startswith("# A small model\n\nIt read fairy tales. Licence: MIT.\n\n")
    assert "Much." not in outcome.out
    assert "box" in outcome.out.split("parameters")[0]
    found = json.loads(command("info", "--json").out)
    assert found.pop("about") == "# A small model\n\nIt read fairy tales. Licence: MIT."
    assert found == json.loads(command("info", box, "--json").out)


def test_the_server_calls_it_box(box):
    assert named_models(()) == {"box": str(box)}
    assert named_models((str(box), "other=elsewhere")) == {"box": str(box), "other": "elsewhere"}


def test_python_takes_it(saved_model, box):
    assert fanformer.load().generate("the cat", seed=1) == fanformer.load(saved_model).generate("the cat", seed=1)


@pytest.mark.parametrize(
    "words", [["chat"], ["generate"], ["generate", "the cat"], ["info"], ["serve"], ["playground"]]
)
def test_an_installation_without_one_says_so(command, no_box, words):
    message = command(*words).refusal()
    assert message.startswith("error: no model came with this installation, expected one in ")
    assert message.endswith("or install fanformer from a clone in which `make release-model` has run.")


def test_python_without_one_raises(no_box):
    with pytest.raises(CheckpointError, match="no model came with this installation"):
        fanformer.load()


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A working folder with `nano` and `my runs/nano`."""
    for name in ("nano", "my runs/nano"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("words", "model", "prompts"),
    [
        ((), None, ()),
        (("Once upon a time",), None, ("Once upon a time",)),
        (("Once upon a time", "nano"), None, ("Once upon a time", "nano")),
        (("def ",), None, ("def ",)),
        (("one and/or two",), None, ("one and/or two",)),
        (("",), None, ("",)),
        (("a " * 3000,), None, ("a " * 3000,)),  # longer than a name of a file may be
        (("nano",), "nano", ()),
        (("nano", "nano"), "nano", ("nano",)),
        (("my runs/nano", "a", "b"), "my runs/nano", ("a", "b")),
        # slips in a path are not prompts
        (("runs/nano",), "runs/nano", ()),
        (("runs/nano", "the cat"), "runs/nano", ("the cat",)),
        (("my runs/nnao", "the cat"), "my runs/nnao", ("the cat",)),
        (("a model.gguf",), "a model.gguf", ()),
    ],
)
def test_the_first_word_is_a_model_or_a_prompt(folders, words, model, prompts):
    assert model_and_prompts(words) == (model, prompts)


@pytest.mark.parametrize("words", [("nnao",), ("Hello",), ("Hello", "world")])
def test_a_single_word_that_is_no_folder_is_neither(folders, words):
    with pytest.raises(
        ConfigError, match=f"no model folder or .gguf file '{words[0]}'.* prompt of one word by --prompts"
    ):
        model_and_prompts(words)


def test_a_prompt_of_one_word_comes_by_a_file(command, box):
    outcome = command("generate", "--prompts-file", "-", *FIXED, text="Hello\n")
    assert (outcome.code, outcome.out[:5]) == (0, "Hello")
