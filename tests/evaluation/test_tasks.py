"""Benchmark tasks: the numbers of lm-evaluation-harness itself, with our answers' likelihood beside them."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from fanformer.errors import ConfigError, DataError, DependencyError
from fanformer.evaluation import tasks
from fanformer.evaluation.scoring import Scorer
from fanformer.evaluation.tasks import TASKS, check_tasks, evaluate_tasks, parse_tasks
from tests.evaluation.released_files import write_released_files

ONE_FILE = [name for name in TASKS if name not in ("blimp", "mmlu")]


@pytest.fixture(scope="module")
def harness():
    """Our module that needs lm-evaluation-harness."""
    pytest.importorskip("lm_eval", reason="needs the extra `eval` (lm-evaluation-harness)")
    from fanformer.evaluation import harness

    return harness


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """Folder of tiny files of all tasks of one file."""
    return write_released_files(tmp_path_factory.mktemp("released"))


def by_upstream(harness, model, tokenizer, names, data_dir, limit, batch_size, folder):
    """Figures of lm-evaluation-harness's own model class on the same definitions and files."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    lm = HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=batch_size,
        max_length=model.config.max_position_embeddings,
        device="cpu",
    )
    manager = harness.local_task_manager([TASKS[name] for name in names], data_dir, folder, False)
    wanted = [TASKS[name] for name in names]
    return simple_evaluate(lm, tasks=wanted, task_manager=manager, limit=limit, log_samples=True)


def assert_same_as_upstream(harness, model, tokenizer, names, data_dir, limit, batch_size, folder):
    """Compare every log-likelihood and every figure; return how many figures there were."""
    adapter = harness.CausalAdapter(Scorer(model), tokenizer)
    ours = harness.run_tasks(adapter, [TASKS[name] for name in names], data_dir, limit, None)
    theirs = by_upstream(harness, model, tokenizer, names, data_dir, limit, batch_size, folder)
    for task, samples in theirs["samples"].items():
        found = {(request.doc_id, request.idx): nats for request, nats in adapter.answers[task]}
        expected = {
            (sample["doc_id"], index): score[0]
            for sample in samples
            for index, score in enumerate(sample["filtered_resps"])
        }
        # float32 in rows of other widths: hundreds of nats that agree to seven digits
        assert found == pytest.approx(expected, abs=1e-4, rel=1e-6), task
    compared = 0
    for task, values in {**theirs["results"], **theirs.get("groups", {})}.items():
        for key, value in values.items():
            metric, _, rest = key.partition(",")
            if rest == "none" and isinstance(value, float):
                # accuracies are counts; perplexity is exp of a mean of log-likelihoods
                tolerance = {"rel": 1e-3} if metric.startswith("perplexity") else {"abs": 1e-12}
                assert ours[task][metric] == pytest.approx(value, **tolerance), (task, metric)
                compared += 1
    return compared


@pytest.mark.parametrize("kind", ["fanformer", "llama", "gpt2"])
def test_figures_equal_those_of_upstream(harness, make_model, tiny_tokenizer, released, tmp_path, kind):
    model = make_model(kind)
    compared = assert_same_as_upstream(harness, model, tiny_tokenizer, ONE_FILE, released, None, 3, tmp_path)
    assert compared >= 2 * len(ONE_FILE)


def test_figures_equal_those_of_upstream_where_the_tokenizer_adds_a_start(
    harness, make_model, tiny_tokenizer, released, tmp_path
):
    import copy

    from tokenizers.processors import TemplateProcessing

    tokenizer, start = copy.deepcopy(tiny_tokenizer), tiny_tokenizer.convert_ids_to_tokens(0)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(f"{start} $A", special_tokens=[(start, 0)])
    assert tokenizer.encode("a")[0] == 0
    names = ["piqa", "lambada", "winogrande"]
    assert assert_same_as_upstream(harness, make_model("llama"), tokenizer, names, released, None, 4, tmp_path) >= 8


def test_accuracies_equal_a_count_of_our_own(harness, make_model, tiny_tokenizer, released):
    model = make_model("fanformer")
    hits = normed = 0
    lines = (released / "arc/ARC-Easy-Test.jsonl").read_text().splitlines()
    bits, num_bytes = 0.0, 0
    for row in map(json.loads, lines):
        prompt = f"Question: {row['question']['stem']}\nAnswer:"
        texts = [choice["text"] for choice in row["question"]["choices"]]
        found = []
        for text in texts:
            start = len(tiny_tokenizer.encode(prompt))
            ids = torch.tensor([tiny_tokenizer.encode(f"{prompt} {text}")])
            with torch.no_grad():
                logits = model(ids, use_cache=False).logits[0, start - 1 : -1].double().log_softmax(-1)
            found.append(float(logits.gather(1, ids[0, start:, None]).sum()))
        gold = "ABCD".index(row["answerKey"])
        hits += max(range(4), key=lambda k: found[k]) == gold
        normed += max(range(4), key=lambda k: found[k] / len(texts[k])) == gold
        bits -= found[gold] / math.log(2)
        num_bytes += len(f" {texts[gold]}".encode())
    result = evaluate_tasks(model, tiny_tokenizer, ["arc_easy"], data_dir=released)["arc_easy"]
    assert (result["acc"], result["acc_norm"]) == (hits / len(lines), normed / len(lines))
    assert result["answer_bits_per_byte"] == pytest.approx(bits / num_bytes, rel=1e-5)
    assert result["answer_bits_per_byte_stderr"] > 0


def test_groups_are_upstreams_with_all_their_members(harness, make_model, tiny_tokenizer, tmp_path):
    folder = harness.definitions_folder()
    blimp = [harness_file(path) for path in (folder / "blimp").glob("[!_]*.yaml")]
    mmlu = [harness_file(path) for path in (folder / "mmlu/default").glob("[!_]*.yaml")]
    data = write_released_files(tmp_path / "data", number=2, blimp=blimp, mmlu=mmlu)
    result = evaluate_tasks(make_model("llama"), tiny_tokenizer, ["blimp", "mmlu"], data_dir=data)
    members = [entry for name, entry in result.items() if name.startswith("blimp_")]
    assert len(members) == 67
    assert result["blimp"]["acc"] == pytest.approx(sum(entry["acc"] for entry in members) / 67)
    assert result["blimp"]["documents"] == 134
    assert result["mmlu"]["documents"] == 2 * 57
    assert result["mmlu_stem"]["acc_stderr"] >= 0


def harness_file(path):
    from fanformer.evaluation.task_files import yaml_value

    return yaml_value(path, "dataset_name")


def test_examples_come_from_the_training_file(harness, make_model, tiny_tokenizer, released):
    model = make_model("llama")
    none = evaluate_tasks(model, tiny_tokenizer, ["arc_easy"], data_dir=released, limit=3)["arc_easy"]
    two = evaluate_tasks(model, tiny_tokenizer, ["arc_easy"], data_dir=released, limit=3, num_fewshot=2)["arc_easy"]
    assert (none["num_fewshot"], two["num_fewshot"], two["documents"]) == (0, 2, 3)
    assert none["answer_bits_per_byte"] != two["answer_bits_per_byte"]
    with pytest.raises(DataError, match=r"`arc_challenge` needs .*/arc/ARC-Challenge-Train.jsonl, which is not there"):
        evaluate_tasks(model, tiny_tokenizer, ["arc_challenge"], data_dir=released, num_fewshot=2)


@pytest.mark.parametrize(
    ("file", "task"),
    [
        ("sciq/test.json", "sciq"),
        ("winogrande/dev.jsonl", "winogrande"),
        ("openbookqa/test.jsonl", "openbookqa"),
        ("piqa/valid-labels.lst", "piqa"),
        ("blimp/adjunct_island.jsonl", "blimp"),
        ("mmlu/test/abstract_algebra_test.csv", "mmlu"),
    ],
)
def test_missing_file_is_named(harness, make_model, tiny_tokenizer, released, tmp_path, file, task):
    import shutil

    data = shutil.copytree(released, tmp_path / "data")
    (data / file).unlink(missing_ok=True)
    with pytest.raises(DataError, match=rf"needs {data / file}, which is not there: put the released file there"):
        evaluate_tasks(make_model("llama"), tiny_tokenizer, [task], data_dir=data)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("arc/ARC-Easy-Test.jsonl", '{"query": 1}\n', "is not in the form that `arc_easy` was released in: no field"),
        ("arc/ARC-Easy-Test.jsonl", "{\n", "ARC-Easy-Test.jsonl:1: expected a JSON object on every line"),
        ("piqa/valid-labels.lst", "1\n", "has 1 labels and"),
        ("piqa/valid-labels.lst", "1\nyes\n", "valid-labels.lst:2: expected 0 or 1, got `yes`"),
        ("sciq/test.json", "[]", "sciq/test.json holds nothing, expected questions of `sciq`: fetch it again."),
        ("hellaswag/hellaswag_val.jsonl", "\n", "hellaswag_val.jsonl holds nothing, expected questions of `hellaswag`"),
        (
            "lambada/lambada_openai.jsonl",
            '{"context": "a", "continuation": "b c"}\n',
            "`continuation` must be one word",
        ),
        ("sciq/test.json", "[", "expected a JSON list of questions"),
    ],
)
def test_file_of_another_form_is_refused(
    harness, make_model, tiny_tokenizer, released, tmp_path, file, content, message
):
    import shutil

    data = shutil.copytree(released, tmp_path / "data")
    (data / file).write_text(content)
    task = {"arc": "arc_easy"}.get(name := file.partition("/")[0], name)
    with pytest.raises(DataError, match=message):
        evaluate_tasks(make_model("llama"), tiny_tokenizer, [task], data_dir=data)


def test_unknown_task_names_the_nearest():
    with pytest.raises(ConfigError, match="no task `arc_esy`: did you mean `arc_easy`"):
        parse_tasks("piqa,arc_esy")
    with pytest.raises(ConfigError, match="`--tasks` must name each task once, got `piqa,piqa`"):
        parse_tasks("piqa,piqa")


def test_what_has_no_effect_or_is_missing_is_refused(tmp_path, monkeypatch):
    for words, message in (
        ((["piqa"], tmp_path, 0, None), "`limit` must be at least 1, got 0"),
        ((["piqa"], tmp_path, None, -1), "`num_fewshot` must be at least 0, got -1"),
        ((["blimp"], tmp_path, None, 2), "`num_fewshot` has no effect on `blimp`"),
        ((["lambada"], tmp_path, None, 2), "`num_fewshot` must be 0 for `lambada`"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_tasks(*words)
    monkeypatch.setattr(tasks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DependencyError, match=r"`--tasks` needs the package `lm_eval`.*fanformer\[eval\]"):
        check_tasks(["piqa"], tmp_path, None, None)
    monkeypatch.setattr(tasks.importlib.util, "find_spec", lambda name: name)
    with pytest.raises(DataError, match=r"`--data-dir`: no folder .*none"):
        check_tasks(["piqa"], tmp_path / "none", None, None)
    with pytest.raises(DataError, match="task `piqa` without `--data-dir` needs the hub"):
        check_tasks(["piqa"], None, None, None)


def run_eval(*words, wait=True):
    process = subprocess.Popen(
        [sys.executable, "-m", "fanformer.cli.main", "eval", *map(str, words), "--device", "cpu"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    if wait:
        output = process.communicate(timeout=120)[0]
        assert process.returncode == 0, output
    return process


@pytest.mark.slow
def test_killed_command_goes_on_and_batch_size_changes_no_bit(harness, saved_model, tmp_path):
    data = write_released_files(tmp_path / "data", number=600)
    words = [saved_model, "--tasks", "hellaswag", "--data-dir", data]
    run_eval(*words, "--cache-dir", tmp_path / "whole", "--batch-size", 1, "--json", tmp_path / "whole.json")
    killed = run_eval(*words, "--cache-dir", tmp_path / "cache", "--json", tmp_path / "again.json", wait=False)
    deadline = time.monotonic() + 60
    while sum(len(path.read_bytes()) for path in (tmp_path / "cache").glob("*/*.jsonl")) < 500:
        assert time.monotonic() < deadline
        assert killed.poll() is None
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    (file,) = (tmp_path / "cache").glob("*/*.jsonl")
    left = file.read_bytes()
    run_eval(*words, "--cache-dir", tmp_path / "cache", "--batch-size", 3, "--json", tmp_path / "again.json")
    assert (tmp_path / "again.json").read_text() == (tmp_path / "whole.json").read_text()
    assert file.read_bytes().startswith(left[: left.rfind(b"\n") + 1])


@pytest.mark.timeout(900)
@pytest.mark.ci
@pytest.mark.parametrize("kind", ["nano", "llama", "gpt2"])
def test_real_files_give_the_figures_of_upstream(harness, make_model, tiny_tokenizer, shared, tmp_path, kind):
    """A nano model of 100 steps, and other architectures, on ARC, PIQA, HellaSwag, LAMBADA and BLiMP."""
    if kind == "nano":
        from fanformer.loading import load

        command = [sys.executable, "-m", "fanformer.cli.main", "train", "--preset", "nano", "--max-steps", "100"]
        text = shared / "data" / "tinyshakespeare" / "input.txt"
        # one thread: two that share their cores with something else wait for each other most of the time
        alone = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([*command, "--data", text, "--output-dir", tmp_path / "run"], check=True, env=alone)
        model, tokenizer = load(tmp_path / "run", "cpu", "float32")
    else:
        model, tokenizer = make_model(kind, positions=512), tiny_tokenizer
    names = ["arc_easy", "arc_challenge", "piqa", "hellaswag", "lambada", "blimp"]
    data = shared / "data" / "eval"
    (tmp_path / "yaml").mkdir()
    assert assert_same_as_upstream(harness, model, tokenizer, names, data, 40, 7, tmp_path / "yaml") > 140
