"""HybridFun.py: the mission's two commands, through the same functions as `fanformer`."""

import importlib.util
import io
import sys

import pytest

from fanformer.cli.failure import run_command
from tests.saved_models import recurrent_model  # noqa: F401


@pytest.fixture
def door(repository, tmp_path, monkeypatch, capfd):
    """The script as a module, its folders moved to a temporary place, and a function that runs it."""
    spec = importlib.util.spec_from_file_location("HybridFun", repository / "HybridFun.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "LAST_TRAINING", tmp_path / "runs" / "hybridfun-last.txt")

    def run(*words, text=""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
        capfd.readouterr()
        code = run_command(module.hybridfun, [str(word) for word in words], "python HybridFun.py")
        return (code, *capfd.readouterr())

    return run


def refusal(outcome):
    code, _, err = outcome
    assert code == 2, err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.ci
def test_training_then_inference_without_naming_the_folder(door, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("".join(f"the cat number {n} sat on mat {n * n}.\n" for n in range(700)))
    code, out, err = door(
        *("--mode", "train", "--preset", "nano", "--data", text, "--epochs_text", "1", "--batch_size", "8"),
        *("--p", "0.25", "--device", "cpu"),
    )
    assert code == 0, err
    folder = tmp_path / "runs" / "hybridfun-nano"
    assert str(folder) in out
    from fanformer.loading import load_config

    assert load_config(folder).fan_ratio == 0.25
    settings = ("--max_length", "5", "--min_length", "5", "--top_k", "50", "--top_p", "0.9", "--temperature", "0.7")
    code, out, err = door("--mode", "inference", *settings, "--device", "cpu", text="the cat\nexit\nnever read\n")
    assert code == 0, err
    assert out.strip() != ""
    assert str(folder) in err
    assert "go on with --resume" in refusal(door("--mode", "train", "--preset", "nano", "--data", text))


def test_training_without_a_hub_says_within_seconds_to_give_data(door, tmp_path):
    message = refusal(door("--mode", "train", "--epochs_text", "2", "--batch_size", "16", "--p", "0.15"))
    assert "--data FILE" in message
    assert not (tmp_path / "runs" / "hybridfun-92m").exists()


def test_p_out_of_range_is_refused_and_nothing_written(door, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat\n" * 1000)
    code, _, err = door("--mode", "train", "--preset", "nano", "--data", text, "--p", "0.7")
    expected = "error: `fan_ratio` must be in [0, 0.5], got 0.7: cos and sin each take this share of the output."
    assert (code, err.splitlines()[-1]) == (2, expected)
    assert [path.name for path in tmp_path.iterdir() if path.name != "runs"] == ["text.txt"]
    assert not (tmp_path / "runs" / "hybridfun-nano").exists()


def test_inference_before_any_training_says_how_to_train(door):
    message = refusal(door("--mode", "inference"))
    assert "give one with --model DIR, or train one first with `python HybridFun.py --mode train" in message


def test_inference_continues_lines_until_exit(door, saved_model):
    words = ("--mode", "inference", "--model", saved_model, "--max_length", "4", "--device", "cpu", "--seed", "1")
    code, out, _ = door(*words, text="exit\nthe cat\n")
    assert (code, out) == (0, "")
    assert door(*words, text="the cat\nexit\n")[1] != ""


def test_inference_says_how_deep_a_recurrent_model_thinks(door, recurrent_model):  # noqa: F811
    words = ("--mode", "inference", "--model", recurrent_model, "--max_length", "2", "--device", "cpu")
    code, _, err = door(*words, text="exit\n")
    assert code == 0
    assert "recurrent depth: 4 steps, the mean that the model was trained with" in err


def test_flags_of_the_other_mode_and_unknown_ones_are_refused(door):
    assert "`--p` has no effect with --mode inference" in refusal(door("--mode", "inference", "--p", "0.2"))
    assert "`--top_k` has no effect with --mode train" in refusal(door("--mode", "train", "--top_k", "5"))
    assert "did you mean `--max_length`?" in refusal(door("--mode", "inference", "--max-length", "5"))
    assert "'talk' is not one of 'train', 'inference'" in refusal(door("--mode", "talk"))
    assert "missing option '--mode'" in refusal(door())


def test_help_has_the_missions_flags_and_their_defaults(door):
    code, out, _ = door("--help")
    text = " ".join(out.split())
    assert code == 0
    for words in ("--epochs_text", "--batch_size", "--p FLOAT", "Example: python HybridFun.py --mode train"):
        assert words in text
    for default in ("100", "1", "0.85", "0.7", "92m"):
        assert f"[default: {default}]" in text


def test_script_works_from_another_directory(process, repository, tmp_path):
    outcome = process("--mode", "train", "--preset", "nanoo", program=(repository / "HybridFun.py",), cwd=tmp_path)
    assert "did you mean `nano`?" in outcome.refusal()
    assert list(tmp_path.iterdir()) == []
