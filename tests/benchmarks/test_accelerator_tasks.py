"""Tasks scored on another machine: the same figures as by `fanformer eval`, and two models side by side."""

import math
import sys

import pytest

from fanformer.comparison.ledger import read_entry
from fanformer.evaluation.tasks import evaluate_tasks
from tests.evaluation.released_files import write_released_files

TASKS = "arc_easy,arc_challenge,piqa"


@pytest.fixture
def accelerator_tasks(repository, monkeypatch):
    pytest.importorskip("lm_eval", reason="needs the extra `eval` (lm-evaluation-harness)")
    monkeypatch.syspath_prepend(str(repository / "benchmarks" / "accelerator"))
    import tasks as accelerator_tasks

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["benchmarks/accelerator/tasks.py", *map(str, words)])
        return accelerator_tasks.main()

    accelerator_tasks.run = run
    return accelerator_tasks


@pytest.mark.ci
def test_scores_of_another_machine_give_the_figures_of_eval(accelerator_tasks, tiny_model, tiny_tokenizer, tmp_path):
    run = accelerator_tasks.run
    files = write_released_files(tmp_path / "files")
    where = ("--tasks", TASKS, "--data-dir", files)
    tiny_tokenizer.save_pretrained(tmp_path / "tokenizer")
    assert run("requests", tmp_path / "tokenizer", tmp_path / "requests.json.xz", *where) == 0
    models = {name: tiny_model(seed=seed, vocab_size=len(tiny_tokenizer)) for seed, name in enumerate(("one", "two"))}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
        command = (
            "score",
            tmp_path / name,
            tmp_path / "requests.json.xz",
            tmp_path / f"{name}.json",
            "--device",
            "cpu",
        )
        assert run(*command) == 0
    assert run("figures", tmp_path / "tokenizer", tmp_path / "one.json", tmp_path / "figures.json", *where) == 0
    found = accelerator_tasks.read_json(tmp_path / "figures.json")["tasks"]
    expected = {
        name: evaluate_tasks(model, tiny_tokenizer, TASKS.split(","), data_dir=files) for name, model in models.items()
    }
    for task, values in expected["one"].items():
        assert found[task].keys() == values.keys()
        for metric, value in values.items():
            assert found[task][metric] == (value if isinstance(value, str) else pytest.approx(value, rel=1e-5)), metric

    ledger = ("--name", "tasks-tiny", "--what", "one beside two", "--scale", "tiny")
    paths = (tmp_path / "one.json", tmp_path / "two.json", tmp_path / "ledger")
    assert run("compare", tmp_path / "tokenizer", *paths, *where, *ledger) == 0
    result = read_entry(tmp_path / "ledger", "tasks-tiny").result
    one, two = (expected[name]["piqa"] for name in ("one", "two"))
    difference = result["piqa_answer_bits_per_byte_difference"]
    assert difference.value == pytest.approx(one["answer_bits_per_byte"] - two["answer_bits_per_byte"], rel=1e-4)
    error = math.hypot(*(values["answer_bits_per_byte_stderr"] for values in (one, two)))
    assert difference.high - difference.low == pytest.approx(2 * 1.96 * error, rel=1e-4)
    parts = [expected["one"][task] for task in ("arc_easy", "arc_challenge")]
    both = sum(part["acc"] * part["documents"] for part in parts) / sum(part["documents"] for part in parts)
    assert result["arc_accuracy_of_candidate"].value == pytest.approx(both)


def test_sentences_are_compared_pair_by_pair(accelerator_tasks):
    mine = {"blimp_a": [[-1, 0], [-2, 0], [-3, 0], [-2, 0]], "blimp_b": [[-1, 0], [-2, 0]]}
    theirs = {"blimp_a": [[-1, 0], [-2, 0], [-1, 0], [-2, 0]], "piqa": [[-1, 0]]}
    found = accelerator_tasks.sentences(mine, theirs)
    assert found["blimp_accuracy_of_candidate"].value == 0.5
    assert found["blimp_accuracy_of_baseline"].value == 1.0
    difference = found["blimp_accuracy_difference"]
    assert difference.value == -0.5
    assert difference.high - difference.low == pytest.approx(2 * 1.96 * 0.5 / math.sqrt(2))
    assert difference.interval == "95% interval over 2 pairs of 1 paradigms"
    assert accelerator_tasks.sentences(mine, {"piqa": [[-1, 0]]}) == {}


def test_scores_of_two_kinds_of_machine_are_refused(accelerator_tasks, tmp_path):
    for name, device in (("one", "cpu"), ("two", "NVIDIA H200")):
        accelerator_tasks.write_json(tmp_path / f"{name}.json", {"device": device, "dtype": "torch.bfloat16"})
    paths = (tmp_path / "one.json", tmp_path / "two.json", tmp_path / "ledger")
    words = ("--tasks", TASKS, "--data-dir", tmp_path, "--name", "x", "--what", "y")
    with pytest.raises(SystemExit, match="score both alike"):
        accelerator_tasks.run("compare", tmp_path, *paths, *words)
