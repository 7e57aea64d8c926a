"""`fanformer train`: a real small run, its bad input, and the machine it decides for."""

import json
import os
import signal
import time

import pytest

TINY = [
    "--batch-size=4", "--sequence-length=32", "--vocab-size=320",
    *[f"--set=model.{field}" for field in (
        "hidden_size=32", "intermediate_size=48", "num_hidden_layers=2", "num_attention_heads=2",
        "num_key_value_heads=1", "head_dim=16",
    )],
]  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "mine.txt"
    path.write_text(
        "".join(f"line {number} of a plain text file, {number * number} in all.\n" for number in range(400))
    )
    return path


def test_train_then_generate_on_any_text_file(command, text, tmp_path):
    folder = tmp_path / "out"
    trained = command("train", "--data", str(text), "--output-dir", str(folder), "--max-steps", "20", *TINY)
    assert trained.code == 0, trained
    assert "bits per byte" in trained.out
    assert f"model: {folder}" in trained.out
    assert "held out" in trained.err
    written = command("generate", str(folder), "line 7", "--max-length", "5", "--seed", "1")
    assert written.code == 0, written
    assert written.out.startswith("line 7")


@pytest.mark.parametrize(
    ("flag", "value"),
    [("precision", "bfloat16"), ("precision", "float32"), ("compile", "on"), ("device", "cpu"), ("optimizer", "muon"),
     ("schedule", "cosine")],
)  # fmt: skip
def test_a_flag_of_few_values_takes_them(command, flag, value):
    outcome = command("train", f"--{flag}", value, "--max-steps", "2", "--epochs", "1")
    assert "the length of a run is set once" in outcome.err, outcome  # so nothing was said against the value
    assert value in command("train", "--help").out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--preset", "nanoo"], "did you mean `nano`?"),
        (["--lerning-rate", "1"], "did you mean `--learning-rate`?"),
        (["--set", "lerning_rate=1"], "did you mean `learning_rate`?"),
        (["--set", "model.hidden_sise=1"], "did you mean `hidden_size`?"),
        (["--p", "0.7"], "`fan_ratio` must be in [0, 0.5], got 0.7"),
        (["--set", "model.num_key_value_heads=4"], "must be a multiple of `num_key_value_heads`, got 6 and 4"),
        (["--optimizer", "sgd"], "`optimizer` must be one of adamw, muon, got 'sgd'"),
        (["--max-time", "soon"], "a duration must look like 90s, 5m, 2h30m or 1d, got 'soon'"),
        (["--tokens", "many"], "a count must look like"),
        (["--max-steps", "2", "--epochs", "1"], "the length of a run is set once"),
        (["--device", "tpu"], "`device` must be one of auto, cpu, cuda, mps, got 'tpu'"),
        (["--config", "none.yaml"], "configuration file not found"),
        (["--data", "none.txt"], "none.txt"),
        (["--sequence-length", "1000000"], "one row needs 1000001"),
        (["--tokenizer", "none/tokenizer"], "none/tokenizer"),
        (["--init-from", "none"], "none"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_leaves_nothing(command, text, tmp_path, words, message):
    data = [] if "--data" in words else ["--data", str(text)]
    folder = tmp_path / "out"
    outcome = command("train", "--output-dir", str(folder), "--max-steps", "2", *data, *words)
    if words[0] in ("--max-steps",):
        outcome = command("train", "--output-dir", str(folder), *data, *words)
    assert message in outcome.refusal()
    assert not folder.exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "empty.txt"),
        ("picture.txt", b"\x89PNG\r\n\x00\x00\x01\x02" * 50, "picture.txt"),
        ("short.txt", b"too short", "one row needs"),
        ("broken.jsonl", b'{"text": "a"}\n{oops\n', "broken.jsonl"),
    ],
    ids=["empty", "binary", "short", "broken jsonl"],
)
def test_bad_data_is_one_line_and_leaves_nothing(command, tmp_path, name, content, message):
    path, folder = tmp_path / name, tmp_path / "out"
    path.write_bytes(content)
    outcome = command("train", "--data", str(path), "--output-dir", str(folder), "--max-steps", "2")
    assert message in outcome.refusal()
    assert not folder.exists()


def test_a_folder_with_a_run_needs_resume_or_overwrite(command, text, tmp_path):
    words = ["train", "--data", str(text), "--output-dir", str(tmp_path / "out"), "--max-steps", "2", *TINY]
    assert command(*words).code == 0
    assert "go on with --resume, replace it with --overwrite" in command(*words).refusal()
    resumed = command("train", "--output-dir", str(tmp_path / "out"), "--resume")
    assert resumed.code == 0, resumed
    assert "resuming from" in resumed.err


def test_the_hub_unreachable_says_how_to_go_on(command, tmp_path):
    started = time.monotonic()
    outcome = command("train", "--preset", "92m", "--output-dir", str(tmp_path / "out"))
    assert "--data" in outcome.refusal()
    assert time.monotonic() - started < 20
    assert not (tmp_path / "out").exists()


def test_help_names_defaults_and_an_example(command):
    shown = command("train", "--help").out
    assert "fanformer train --preset nano" in shown
    assert "[default: nano]" in shown
    assert "0.15" in shown


def test_a_killed_run_resumes_to_the_same_weights(warm, text, tmp_path):
    """SIGKILL in the middle, then --resume: the same weights as without the kill.

    Precision and compilation are given: left to a measurement, two runs on a busy machine may decide otherwise.
    """
    words = ["train", "--data", text, "--max-steps", "200", "--save-steps", "20", "--eval-steps", "200",
             "--precision", "float32", "--compile", "off", "--set", "model.dropout=0.1", *TINY]  # fmt: skip
    whole = warm.start([*words, "--output-dir", "whole"], tmp_path)
    assert whole.wait() == 0, whole.stderr.read_text()
    killed = warm.start([*words, "--output-dir", "killed"], tmp_path)
    while not list((tmp_path / "killed").glob("checkpoint-*")):
        assert killed.poll() is None
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    again = warm.start(["train", "--output-dir", "killed", "--resume"], tmp_path)
    assert again.wait() == 0, again.stderr.read_text()
    read = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "killed")]
    assert read[0] == read[1]
    steps = [json.loads(line)["step"] for line in (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_ends_a_run_with_one_line_and_a_checkpoint(warm, text, tmp_path, number):
    words = ["train", "--data", text, "--max-steps", "100000", "--save-steps", "100000", "--compile", "off",
             "--output-dir", "out", *TINY]  # fmt: skip
    running = warm.start(words, tmp_path)
    metrics = tmp_path / "out" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text()):
        assert running.poll() is None
        time.sleep(0.05)
    asked = time.monotonic()
    running.kill(number)
    code, err = running.wait(60), running.stderr.read_text()
    assert time.monotonic() - asked < 30
    assert code == 128 + number, err
    [line] = running.stdout.read_text().splitlines()
    assert line.startswith(f"stopped by {number.name} after step ")
    assert line.endswith("which is saved: go on with --resume")
    step = line.split()[5].rstrip(",")
    assert (tmp_path / "out" / f"checkpoint-{step}" / "manifest.json").is_file()
    assert "Traceback" not in err


@pytest.mark.ci
@pytest.mark.timeout(900)
def test_prove_resume_prints_a_table_of_equal_bits_at_preset_nano(process, tmp_path):
    """With all cores, since the order of sums is what a resumed process may get wrong."""
    small = ["--preset", "nano", "--max-steps", "6", "--set", "eval_tokens=2048", "--output-dir", tmp_path / "proof"]
    threads = {"OMP_NUM_THREADS": str(os.cpu_count())}
    proof = process("train", "--prove-resume", *map(str, small), timeout=800, environment=threads)
    assert proof.code == 0, proof
    rows = {line[:29].strip(): line[29:].split() for line in proof.out.splitlines()[1:5]}
    assert rows["killed once, resumed"] == ["1", *["yes"] * 5, "0.0e+00", "yes"]
    assert rows["killed twice, resumed twice"] == ["2", *["yes"] * 5, "0.0e+00", "yes"]
    assert rows["two processes"][1] == rows["two processes"][-1] == "yes"
    assert rows["two processes, one killed"] == ["1", *["yes"] * 5, "0.0e+00", "yes"]
    findings = json.loads((tmp_path / "proof" / "proof.json").read_text())
    assert all(finding["holds"] for finding in findings)
    assert "must be a new folder" in process("train", "--prove-resume", *map(str, small)).refusal()


@pytest.mark.ci
@pytest.mark.timeout(600)
def test_accelerate_launch_trains_with_fsdp2_and_resumes_alone(text, process, tmp_path):
    launch = ["-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1",
              "--mixed_precision", "no", "--dynamo_backend", "no", "--use_fsdp", "--fsdp_version", "2"]  # fmt: skip
    words = ["train", "--data", str(text), "--output-dir", str(tmp_path / "out"), "--set", "log_steps=1", *TINY]
    done = process(*words, "--max-steps", "4", program=(*launch, "-m", "fanformer.cli.main"), timeout=300)
    assert done.code == 0, done
    assert "2 processes (fsdp2)" in done.err
    assert done.out.count("held-out loss") == 1
    alone = process("train", "--output-dir", str(tmp_path / "out"), "--resume", "--max-steps", "6")
    assert alone.code == 0, alone
    steps = [json.loads(line)["step"] for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]


@pytest.mark.ci
@pytest.mark.timeout(300)
def test_bad_input_to_several_processes_is_one_line_from_the_first(process, tmp_path):
    program = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "fanformer.cli.main")
    done = process("train", "--data", "none.txt", "--output-dir", str(tmp_path / "out"), program=program, timeout=200)
    assert done.code != 0
    assert [line for line in done.err.splitlines() if line.startswith("error: ")] == [
        line for line in done.err.splitlines() if "no file" in line
    ][:1]
    assert not (tmp_path / "out").exists()
