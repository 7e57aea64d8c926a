"""`train --multimodal`, `generate --image --audio` and `chat` with /image and /audio: what they print and refuse."""

import json

import pytest
from click.testing import CliRunner

from fanformer.cli.chat import chat
from fanformer.cli.eval import evaluate
from fanformer.cli.generate import generate
from fanformer.cli.main import main
from fanformer.errors import ConfigError
from tests.multimodal_files import TINY, save_with_towers, write_picture, write_rows, write_tone
from tests.saved_models import saved_model, tiny_tokenizer  # noqa: F401

WORDS = ["--max-length", "5", "--temperature", "0", "--device", "cpu"]


@pytest.fixture(scope="module")
def folder(saved_model, tmp_path_factory):  # noqa: F811
    return save_with_towers(saved_model, tmp_path_factory.mktemp("cli") / "model")


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    place = tmp_path_factory.mktemp("shown")
    return write_picture(place / "red.png", "red"), write_tone(place / "low.wav", "low")


def said(command, *words, text=None):
    done = CliRunner().invoke(command, [str(word) for word in words], input=text, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done


def test_generate_answers_about_a_picture_and_a_recording(folder, shown):
    from fanformer.generation.media_model import load_media_model

    picture, sound = shown
    expected = load_media_model(folder, "cpu").generate(
        "what?", images=[picture], audio=[sound], max_length=5, temperature=0.0
    )
    done = said(generate, folder, "what?", "--image", picture, "--audio", sound, *WORDS)
    assert done.stdout.rstrip("\n") == expected.rstrip("\n")
    lines = said(generate, folder, "what?", "and?", "--image", picture, "--json", *WORDS).stdout.splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == ["what?", "and?"]


def test_equal_questions_get_answers_of_their_own_that_no_batch_changes(folder, shown):
    from fanformer.generation.media_model import load_media_model, shown_media
    from fanformer.generation.settings import GenerationSettings

    model, settings = load_media_model(folder, "cpu"), GenerationSettings(max_length=6, temperature=1.0, seed=1)
    asked = ["what?"] * 3, [shown_media([shown[0]], [])] * 3, settings
    alone, two, together = ([one.text for one in model.ask(*asked, batch_size=size)] for size in (1, 2, 3))
    assert alone == two == together
    assert len(set(together)) == 3


def test_generate_of_text_is_that_of_the_base(folder, saved_model):  # noqa: F811
    ours, base = (said(generate, one, "the cat", *WORDS).stdout for one in (folder, saved_model))
    assert ours == base


def test_eval_measures_the_language_model(folder, saved_model, tmp_path):  # noqa: F811
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat\n" * 9)
    words = ["--text", text, "--json", "-", "--device", "cpu"]
    ours, base = (json.loads(said(evaluate, one, *words).stdout) for one in (folder, saved_model))
    assert (ours.pop("model"), base.pop("model")) == (str(folder), str(saved_model))
    assert ours == base


def test_chat_shows_with_the_next_message_and_reads_anew_what_changed(folder, shown):
    picture, sound = shown
    lines = ["what?", f"/image {picture}", "what?", "and?", "/reset", f"/audio {sound}", "what?", "/exit"]
    done = said(chat, folder, *WORDS, text="\n".join(lines) + "\n")
    assert f"{picture} goes with the next message." in done.stderr
    alone = said(generate, folder, "what?", "--image", picture, *WORDS).stdout
    heard = said(generate, folder, "what?", "--audio", sound, *WORDS).stdout
    first = said(chat, folder, *WORDS, text=f"/image {picture}\nwhat?\n").stdout
    assert first == alone
    assert done.stdout.endswith(heard)


def test_a_picture_is_what_its_file_held_when_it_was_shown(folder, tmp_path):
    from fanformer.generation.chat import Conversation
    from fanformer.generation.interruption import Interruption
    from fanformer.generation.media_model import load_media_model
    from fanformer.generation.settings import GenerationSettings

    model, words = load_media_model(folder, "cpu"), {"max_length": 6, "temperature": 0.0}
    path, question = write_picture(tmp_path / "a.png", "red"), "what is to be seen here, and where?"
    red = model.generate(question, images=[path], **words)
    write_picture(path, "blue")
    blue = model.generate(question, images=[str(path)], **words)
    assert blue == model.generate(question, images=[path.read_bytes()], **words) != red
    looked = model.look_at("image", str(path))
    path.unlink()
    written = []
    conversation = Conversation(model, GenerationSettings(**words))
    conversation.answer(question, written.append, Interruption(), [looked])
    assert "".join(written) == blue
    with pytest.raises(ConfigError, match=r"`images` must be a list, got str: write \[...\] around it"):
        model.generate(question, images=str(path))
    with pytest.raises(ConfigError, match="must be a path or bytes, got int: save it as a file first"):
        model.generate(question, audio=[3])


def test_a_cache_is_kept_while_the_same_is_shown_and_dropped_when_that_changes(folder, shown):
    from fanformer.generation.chat import Conversation
    from fanformer.generation.interruption import Interruption
    from fanformer.generation.media_model import load_media_model
    from fanformer.generation.settings import GenerationSettings

    settings = GenerationSettings(max_length=4, temperature=0.0)
    model = load_media_model(folder, "cpu")
    read = []
    model.model.model.language_model.register_forward_pre_hook(
        lambda module, given, inputs: read.append(inputs["inputs_embeds"].shape[1]), with_kwargs=True
    )

    def answers(remembering):
        conversation, written = Conversation(model, settings), []
        for message, media in (("what?", []), ("see", [picture]), ("and?", []), ("more", [other])):
            if not remembering:
                conversation._remembered.forget()
            conversation.answer(message, written.append, Interruption(), media)
        return "".join(written)

    picture, other = model.look_at("image", str(shown[0])), model.look_at("audio", str(shown[1]))
    kept = answers(True)
    longest = [width for width in read if width > 1]
    read.clear()
    assert kept == answers(False)
    whole = [width for width in read if width > 1]
    assert [ours < theirs for ours, theirs in zip(longest, whole, strict=True)] == [False, False, True, False]


def test_wrong_input_is_one_line_and_exit_2(folder, saved_model, shown, tmp_path, capsys):  # noqa: F811
    picture, sound = shown
    (tmp_path / "drawing.png").write_text("<svg/>")
    (tmp_path / "cut.wav").write_bytes(sound.read_bytes()[:99])
    long = write_tone(tmp_path / "long.wav", "low", 6)

    def refused(message, *words):
        assert main([str(word) for word in words]) == 2
        error = capsys.readouterr().err
        last = error.rstrip("\n").split("\n")[-1]  # in front of it transformers draws how it loads weights
        assert last.startswith("error: ")
        assert message in last

    refused("holds a model of text only", "generate", saved_model, "a", "--image", picture)
    refused("No such file", "generate", folder, "a", "--image", tmp_path / "none.png")
    refused("got an SVG drawing", "generate", folder, "a", "--image", tmp_path / "drawing.png")
    refused("is truncated", "generate", folder, "a", "--audio", tmp_path / "cut.wav")
    refused("must be whole sound in wav", "generate", folder, "a", "--audio", picture)
    refused("does not go with pictures", "generate", folder, "a", "--image", picture, "--adapter", tmp_path)
    refused("the model has 128 positions", "generate", folder, "a " * 99, "--image", picture)
    refused("long.wav must last at most 5.12 s, got 6: cut it", "generate", folder, "a", "--audio", long)
    refused("`batch_size` must be at least 1, got 0", "generate", folder, "a", "--image", picture, "--batch-size", 0)
    refused(
        "`--data` does not go with `--multimodal`", "train", "--multimodal", "a", "--data", "b", "--init-from", folder
    )
    refused("`init_from` is needed beside `--multimodal`", "train", "--multimodal", "a.jsonl")
    going_on = ("--resume", "--output-dir", tmp_path / "o")
    refused("`init_from` is needed beside `--multimodal`", "train", "--multimodal", "a.jsonl", *going_on)
    refused(
        "no such file",
        "train",
        "--multimodal",
        tmp_path / "a.jsonl",
        "--init-from",
        saved_model,
        "--output-dir",
        tmp_path / "o",
    )
    assert not (tmp_path / "o").exists()


def test_a_text_only_chat_says_that_it_sees_nothing(saved_model, shown):  # noqa: F811
    done = said(chat, saved_model, *WORDS, text=f"/image {shown[0]}\n")
    assert "error: this model takes text only, got /image" in done.stderr


def test_a_chat_with_an_adapter_says_that_it_takes_text_alone(folder, saved_model, shown, tmp_path):  # noqa: F811
    pytest.importorskip("peft")
    from fanformer.generation.media_model import export_adapter, load_media_model

    export_adapter(load_media_model(folder, "cpu").model, "image", saved_model, tmp_path / "adapter")
    lines = f"/image {shown[0]}\n/image ~no-such-user/a.png\nwhat?\n"
    done = said(chat, folder, "--adapter", tmp_path / "adapter", *WORDS, text=lines)
    assert "adapter belongs to the language model alone: without it, pictures and recordings are taken" in done.stderr
    assert "error: this model takes text only, got /image" in done.stderr
    plain = said(chat, folder, *WORDS, text=lines)
    assert "belongs to the language model alone" not in plain.stderr
    assert "error: cannot read ~no-such-user/a.png: No such file" in plain.stderr


def test_train_leaves_a_folder_that_generate_asks(saved_model, shown, tmp_path, capsys):  # noqa: F811
    rows = write_rows(tmp_path / "rows", 8, 0)
    names = ("sequence_length", "batch_size", "device")
    fields = [f"--set={name}={value}" for name, value in TINY.items() if name not in names]
    command = [
        "train",
        "--multimodal",
        rows,
        "--init-from",
        saved_model,
        "--output-dir",
        tmp_path / "run",
        "--max-steps",
        1,
    ]
    assert (
        main([str(word) for word in [*command, "--sequence-length", 64, "--batch-size", 4, "--device", "cpu", *fields]])
        == 0
    )
    assert "answers to the letter" in capsys.readouterr().out
    card = (tmp_path / "run" / "README.md").read_text()
    assert "AutoModelForMultimodalLM" in card
    assert said(generate, tmp_path / "run", "which?", "--image", shown[0], *WORDS).stdout
