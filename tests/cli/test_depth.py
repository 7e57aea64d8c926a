"""`--num-steps` and `--exit-threshold` of `generate`, `chat` and `eval`."""

import json

import pytest

from fanformer.errors import ConfigError
from tests.gguf_models import export
from tests.saved_models import recurrent_model  # noqa: F401

SHORT = ("--max-length", "12", "--temperature", "0", "--device", "cpu")
MEAN = "recurrent depth: 4 steps, the mean that the model was trained with (--num-steps 1 to 8 takes others)."


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("the cat sat on the mat. a small model speaks of small things. ")
    return path


def test_generate_takes_the_mean_and_says_so_or_what_is_asked_for(command, recurrent_model):  # noqa: F811
    default = command("generate", recurrent_model, "the cat", *SHORT)
    assert default.err.splitlines() == [MEAN]
    four, one = (command("generate", recurrent_model, "the cat", *SHORT, "--num-steps", n) for n in (4, 1))
    assert four.err == one.err == ""
    assert default.out == four.out != one.out
    drafted = command("generate", recurrent_model, "the cat", *SHORT, "--num-steps", "4", "--draft-tokens", "3")
    assert drafted.out == four.out
    refused = command("generate", recurrent_model, "the cat", "--temperature", "0.7", "--draft-tokens", "3")
    assert "`draft_tokens` needs greedy decoding, got temperature 0.7: add --temperature 0" in refused.refusal()
    assert refused.out == ""


def test_chat_takes_steps_too(command, recurrent_model):  # noqa: F811
    words = ("chat", recurrent_model, "--max-length", "4", "--device", "cpu")
    assert MEAN in command(*words, text="the cat\n").err
    assert MEAN not in command(*words, "--num-steps", "2", "--exit-threshold", "0.1", text="the cat\n").err


def test_a_gguf_file_takes_steps_and_says_its_mean(command, recurrent_model, tmp_path):  # noqa: F811
    pytest.importorskip("ggml", reason="needs the extra `gguf` (ggml-python)")
    path = export(recurrent_model, output=tmp_path / "model.gguf")
    words = ("generate", path, "the cat", *SHORT)
    default, four, one = command(*words), command(*words, "--num-steps", "4"), command(*words, "--num-steps", "1")
    assert default.err.splitlines() == [MEAN]
    assert default.out == four.out == command("generate", recurrent_model, "the cat", *SHORT).out
    assert one.out == command("generate", recurrent_model, "the cat", *SHORT, "--num-steps", "1").out != four.out
    refusal = command(*words, "--exit-threshold", "0.1").refusal()
    assert f"`exit_threshold` is for model folders, got 0.1 for {path}: ggml takes --num-steps only." in refusal
    refusal = command(*words, "--num-steps", "9").refusal()
    assert "`num_steps` must be in [1, 8], got 9: the file says how large it may be." in refusal


def test_eval_measures_every_number_of_steps(command, recurrent_model, text, tmp_path):  # noqa: F811
    words = ("eval", recurrent_model, "--text", text, "--device", "cpu")
    result = json.loads(command(*words, "--num-steps", "1,2,8", "--json", "-").out)
    assert list(result["by_num_steps"]) == ["1", "2", "8"]
    assert result["num_steps"] == 1
    assert result["loss"] == result["by_num_steps"]["1"]["loss"]
    losses = {steps: figures["loss"] for steps, figures in result["by_num_steps"].items()}
    assert len(set(losses.values())) == 3
    for steps, loss in losses.items():
        alone = json.loads(command(*words, "--num-steps", steps, "--json", "-").out)
        assert alone["loss"] == loss
    default = command(*words, "--json", "-")
    assert MEAN in default.err
    assert json.loads(default.out)["num_steps"] == 4
    shown = command(*words, "--num-steps", "1,8").out
    assert "8 steps:" in shown
    curve = shown[shown.index("steps bits_per_byte") :].splitlines()
    assert [line.split()[0] for line in curve[1:]] == ["1", "8"]
    assert f"{result['by_num_steps']['8']['bits_per_byte']:.4f}" in curve[2]


def test_what_ends_early_keeps_each_depth_s_figures(command, recurrent_model, text, tmp_path, monkeypatch):  # noqa: F811
    from fanformer.evaluation.files import MeasuredFiles

    second, out = tmp_path / "b.txt", tmp_path / "out.json"
    second.write_text("another text of a cat. ")
    words = ("eval", recurrent_model, "--text", text, second, "--device", "cpu", "--num-steps", "1,4")
    whole = json.loads(command(*words, "--json", "-").out)
    measure, measured = MeasuredFiles.measure, []

    def stopped(self, path):
        if len(measured) == 3:  # within the second depth
            raise ConfigError("stopped here")
        measured.append(path)
        measure(self, path)

    monkeypatch.setattr(MeasuredFiles, "measure", stopped)
    outcome = command(*words, "--json", out)
    assert outcome.code == 2
    told = json.loads(out.read_text())
    assert told["incomplete"]
    assert (told["num_steps"], told["loss"]) == (1, whole["loss"])
    assert told["by_num_steps"]["1"] == whole["by_num_steps"]["1"]
    partial = told["by_num_steps"]["4"]
    assert partial["incomplete"]
    assert partial["files"] == {str(text): whole["by_num_steps"]["4"]["files"][str(text)]}
    assert "1 step:" in outcome.out
    assert "4 steps:" in outcome.out
    assert "#" not in outcome.out  # no curve of one point


def test_eval_tells_how_many_steps_exit_saves(command, recurrent_model, text):  # noqa: F811
    words = ("eval", recurrent_model, "--text", text, "--device", "cpu", "--num-steps", "8", "--exit-threshold", "0.3")
    figures = json.loads(command(*words, "--json", "-").out)
    assert 1 < figures["mean_steps"] < 8
    assert f"{figures['mean_steps']:.2f} steps a token on average, " in command(*words).out


def test_a_plain_model_refuses_steps(command, saved_model, text):
    for words in (("generate", saved_model, "x"), ("eval", saved_model, "--text", text)):
        refusal = command(*words, "--device", "cpu", "--num-steps", "2").refusal()
        assert "`num_steps` needs a model with recurrent depth, got 2 for one whose blocks run once" in refusal
    assert "by_num_steps" not in json.loads(
        command("eval", saved_model, "--text", text, "--device", "cpu", "--json", "-").out
    )


def test_evaluate_of_python_takes_several_numbers(recurrent_model, text):  # noqa: F811
    import fanformer

    result = fanformer.evaluate(recurrent_model, [text], device="cpu", num_steps=[2, 4])
    assert list(result["by_num_steps"]) == [2, 4]
    assert result["loss"] == result["by_num_steps"][2]["loss"]
    assert result["by_num_steps"][4]["loss"] == fanformer.evaluate(recurrent_model, [text], device="cpu")["loss"]
    for words in ({"texts": str(text)}, {"texts": text}, {"tasks": "piqa"}, {"texts": [text], "num_steps": "1,2"}):
        with pytest.raises(ConfigError, match=r"must be a list, got \w+: write \[...\] around it"):
            fanformer.evaluate(recurrent_model, **words)
    with pytest.raises(ConfigError, match="`num_steps` must hold at least one number, got none"):
        fanformer.evaluate(recurrent_model, [text], device="cpu", num_steps=[])
