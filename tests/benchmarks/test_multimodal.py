"""The measurement of pictures and sound: scores, probes, costs, tables of the ledger, and rows of real data."""

import base64
import io
import json
import subprocess
import sys
import wave
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from fanformer.comparison.ledger import EXACT, measured_today, read_ledger
from fanformer.generation.media_model import load_media_model
from tests.multimodal_files import save_with_towers, write_rows
from tests.saved_models import saved_model, tiny_tokenizer  # noqa: F401


@pytest.fixture
def quality(repository, monkeypatch):
    """The program's modules."""
    monkeypatch.syspath_prepend(str(repository / "benchmarks" / "quality"))
    import multimodal
    import multimodal_data
    import multimodal_measures
    import multimodal_tables

    return SimpleNamespace(run=multimodal, data=multimodal_data, measures=multimodal_measures, tables=multimodal_tables)


def test_scores_are_those_of_the_field(quality):
    right = ["1 2 3", "4 5"]
    assert quality.measures.words(["1 2 3", "4 5"], right) == 1
    assert quality.measures.words(["1 3", "4 5 6"], right) == pytest.approx(1 - 2 / 5)  # one lost, one too many
    assert quality.measures.words(["3 2 1", ""], right) == pytest.approx(1 - 4 / 5)
    assert quality.measures.exact(["7", "8"], ["7", "8 "]) == 0.5
    assert quality.measures.keywords(["sky, sun", "cat"], ["sun, moon, sky", "dog"]) == pytest.approx(1 / 3)
    assert quality.measures.keywords_of("sky, , sun,sun") == {"sky", "sun"}


def test_a_moved_picture_is_the_same_picture_elsewhere(quality):
    pixels = np.full((8, 8, 3), 9, dtype=np.uint8)
    pixels[3:5, 3:5] = (200, 100, 50)
    chooser = np.random.default_rng(0)
    places = set()
    for _ in range(60):
        found = quality.data.moved(pixels, chooser)
        assert (found == 9).all(-1).sum() == 60
        rows, columns = np.nonzero((found == (200, 100, 50)).all(-1))
        assert (rows.max() - rows.min(), columns.max() - columns.min()) == (1, 1)
        places.add((rows.min(), columns.min()))
    assert {place[0] for place in places} == {place[1] for place in places} == {1, 2, 3, 4, 5}


@pytest.fixture(scope="module")
def folder(saved_model, tmp_path_factory):  # noqa: F811
    return save_with_towers(saved_model, tmp_path_factory.mktemp("measured") / "model")


def test_a_probe_tells_colours_that_an_untrained_tower_lets_through(quality, folder, tmp_path):
    from fanformer.data.multimodal.messages import read_media_examples

    learnt, held_out = (read_media_examples(write_rows(tmp_path / str(n), n, 0)) for n in (24, 12))
    model = load_media_model(folder, "cpu")
    assert quality.measures.probe_of_one(model, learnt, held_out, []) == 1.0
    one_name = [""] * len(held_out)
    assert quality.measures.probe_of_several(model, learnt, held_out, one_name) == 1.0
    assert quality.measures.probe_of_one(model, learnt[:1], held_out, []) == 0.25  # it knows a single colour


def test_costs_count_every_parameter_once(quality, folder, saved_model):  # noqa: F811
    found = quality.measures.adapter_costs(saved_model, folder, 1)
    whole = load_media_model(folder, "cpu").model
    parts = ("language_model", "towers", "projectors", "adapters")
    sizes = {name: found[f"{name}_parameters"] for name in parts}
    assert sum(one.value for one in sizes.values()) == sum(one.numel() for one in whole.parameters())
    of_adapters = sum(one.numel() for name, one in whole.named_parameters() if ".lora_" in name)
    assert sizes["adapters"].value == of_adapters > 0
    assert all(one.interval == EXACT for one in sizes.values())
    assert found["decode_time_both"].value > 0


def result(quality, right, **more):
    bits = {"base": 2.0, "with_towers": 2.0}
    held_out = dict.fromkeys(right, 100)
    return {
        "scores": right,
        "probes": {},
        "held_out": held_out,
        "tokens_per_picture": 4,
        "text_bits_per_byte": bits,
    } | more


def entry(quality, task, tasks, results, **fields):
    held_out = {
        name: {"bar": one.bar, "chance": one.chance, "score": one.score}
        for name, one in next(iter(tasks.values())).held_out.items()
    }
    configuration = {"task": task, "base": "nano", "scale": "small"}
    return measured_today(
        f"multimodal-{task}-nano", what="a test", kind="evaluation", seeds=[0, 1, 2], configuration=configuration,
        result=quality.tables.figures(tasks, results), details={"held_out": held_out, "results": results},
        date="2026-11-29", hardware={"cpu": "a processor", "cores": 2}, **fields,
    )  # fmt: skip


def test_figures_are_means_over_seeds_and_their_table_says_what_was_met(quality):
    held_out = {
        "right": quality.data.HeldOut("a", bar=0.8),
        "without_picture": quality.data.HeldOut("b", chance=0.1),
        "without_recording": quality.data.HeldOut("c", chance=0.11),
    }
    task = {"both": quality.data.Task([], held_out)}
    seeds = [{"right": right, "without_picture": 0.12, "without_recording": 0.1} for right in (0.9, 0.92, 0.94)]
    results = {
        "both": {
            "model": [result(quality, one) for one in seeds],
            "blind": [result(quality, {"right": 0.1}) for _ in seeds],
        }
    }
    found = quality.tables.figures(task, results)
    assert found["right"].value == pytest.approx(0.92)
    assert found["right"].low < 0.9 < 0.94 < found["right"].high
    assert found["right_over_blind"].value == pytest.approx(0.82)
    assert found["over_blind"].value == found["right_over_blind"].value
    assert found["without_picture_over_chance"].value == found["blank_over_chance"].value == pytest.approx(0.02)
    assert found["without_recording_over_chance"].value == pytest.approx(-0.01)
    assert found["text_bits_per_byte_difference"].value == 0
    table = quality.tables.tables([entry(quality, "both", task, results)])
    assert "| add a digit seen and one heard | at least 80%: met | 92.0% (87.0% to 97.0%) | 10.0% (10.0% to" in table
    assert "picture blank | at most 15.0%: met | 12.0%" in table
    assert "| 100 | 4 a picture |" in table
    results["both"]["model"][0]["text_bits_per_byte"]["with_towers"] = 2.25
    results["both"]["model"][1]["scores"]["without_picture"] = 0.3
    table = quality.tables.tables([entry(quality, "both", task, results)])
    assert "at most 15.0%: missed" in table
    assert "change by 0.25 at most" in table


def test_a_task_is_met_only_above_the_blind_twin_by_more_than_the_interval(quality):
    task = {"emoji": quality.data.Task([], {"category": quality.data.HeldOut("a", probed=True)})}

    def table(blind):
        results = {
            "emoji": {
                "model": [result(quality, {"category": 0.7}, probes={"category": 0.6}) for _ in range(3)],
                "blind": [result(quality, {"category": one}) for one in blind],
            }
        }
        return quality.tables.tables([entry(quality, "emoji", task, results)])

    assert "| emoji: category | at least a linear probe's 60.0% (60.0% to 60.0%): met |" in table([0.3, 0.31, 0.32])
    assert ": missed |" in table([0.3, 0.5, 0.9])


def test_what_is_told_of_several_tasks_is_their_mean(quality):
    tasks = {f"unheard-{name}": quality.data.Task([], {"right": quality.data.HeldOut("a", bar=0.85)}) for name in "ab"}
    results = {
        f"unheard-{name}": {
            "model": [result(quality, {"right": right + more}) for more in (0, 0.01, 0.02)],
            "blind": [result(quality, {"right": 0.1}) for _ in range(3)],
        }
        for name, right in (("a", 0.9), ("b", 0.8))
    }
    found = quality.tables.figures(tasks, results)
    assert found["right"].value == pytest.approx(0.86)
    assert (found["right_a"].value, found["right_b"].value) == (pytest.approx(0.91), pytest.approx(0.81))
    assert "at least 85%: met | 86.0%" in quality.tables.tables([entry(quality, "unheard", tasks, results)])


def test_the_document_has_the_tables_of_the_ledger(quality, repository, tmp_path):
    page = tmp_path / "multimodal.md"
    page.write_text((repository / "docs" / "multimodal.md").read_text())
    before = page.read_text()
    entries = read_ledger(repository / "benchmarks" / "results")
    quality.tables.write_page(page, entries)
    assert page.read_text() == before, "run python benchmarks/quality/multimodal.py --tables"
    quality.tables.write_page(page, [])
    assert "Not measured yet." in page.read_text()
    quality.tables.write_page(page, entries)
    assert page.read_text() == before


def test_a_work_folder_of_another_base_is_refused(quality, saved_model, folder, tmp_path, monkeypatch):  # noqa: F811
    def begin(base):
        monkeypatch.setattr(sys, "argv", ["multimodal.py", "--base", str(base), "--work", str(tmp_path)])
        quality.run.Work(tmp_path).begin(quality.run.settings(quality.run.parse()))

    begin(saved_model)
    begin(saved_model)
    with pytest.raises(SystemExit, match=r"was begun with base .*, got .*: give another --work"):
        begin(folder)


def test_a_task_that_fails_keeps_no_other_waiting(quality, saved_model, tmp_path, monkeypatch, capsys):  # noqa: F811
    for name in quality.run.DATA:
        (tmp_path / "data" / name).mkdir(parents=True)
    words = ["multimodal.py", "--base", saved_model, "--data", tmp_path / "data", "--work", tmp_path / "work"]
    monkeypatch.setattr(sys, "argv", [*map(str, words), "--dry-run", "--task", "naming", "--task", "emoji"])
    tasks = {"emoji": quality.data.Task([], {"category": quality.data.HeldOut("a", bar=0.5)})}
    twins = {"model": [result(quality, {"category": 0.7})], "blind": [result(quality, {"category": 0.1})]}

    def do_group(asked, name):
        if name == "naming":
            sys.exit("a cell failed, as it says above: the same command goes on")
        return [entry(quality, name, tasks, {"emoji": twins})]

    monkeypatch.setattr(quality.run, "do_group", do_group)
    with pytest.raises(SystemExit, match=r"not done: naming: the same command goes on"):
        quality.run.main()
    assert "emoji: category" in capsys.readouterr().out
    assert [one.name for one in read_ledger(tmp_path / "work" / "ledger")] == ["multimodal-emoji-nano"]
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--jobs", "1"])  # what fails there is this process, which is to stop
    with pytest.raises(SystemExit, match="a cell failed"):
        quality.run.main()
    (tmp_path / "data" / "mnist-test").rmdir()
    with pytest.raises(SystemExit, match=r"--data must have mnist-test, .* without mnist-test"):
        quality.run.main()


@pytest.mark.ci
def test_a_stage_that_was_killed_after_its_end_is_not_trained_again(quality, saved_model, tmp_path, monkeypatch):  # noqa: F811
    work = tmp_path / "work"
    write_rows(work / "rows" / "naming", 8, 0)
    words = ["multimodal.py", "--base", saved_model, "--work", work, "--dry-run"]
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    asked, cell = quality.run.parse(), quality.run.Cell("naming", "model", 0)
    held_out = {"right": quality.data.HeldOut("rows.jsonl")}
    task = quality.data.Task([quality.data.Stage("rows.jsonl", 1)], held_out, {"image_size": 16, "patch_size": 4})

    def killed(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(quality.run, "shutil", SimpleNamespace(rmtree=killed))
        with pytest.raises(KeyboardInterrupt):
            quality.run.train_stages(asked, cell, task)
    trained = []
    folder = quality.run.train_stages(asked, cell, task, listener=trained.append)
    assert (folder / "model.safetensors").is_file()
    assert trained == []


def shown(row, place):
    """The bytes of a part of a row."""
    return base64.b64decode(row["messages"][0]["content"][place]["base64"])


def samples(content):
    with wave.open(io.BytesIO(content)) as file:
        return np.frombuffer(file.readframes(file.getnframes()), "<i2")


@pytest.mark.ci
def test_rows_of_real_data_hold_out_what_they_say_and_blank_what_they_say(quality, shared, tmp_path):
    def written(name, limit=40):
        place = tmp_path / name
        place.mkdir()
        task = quality.data.TASKS[name](quality.data.Sources(shared / "data", place, limit))
        quality.data.write_task(place, task)
        assert quality.data.read_task(place) == task
        files = {path.stem: [json.loads(line) for line in path.open()] for path in place.glob("*.jsonl")}
        return task, files

    task, files = written("both")
    picture = np.asarray(Image.open(io.BytesIO(shown(files["without-picture"][0], 0))))
    assert picture.shape == (28, 28)
    assert not picture.any()
    assert not samples(shown(files["without-recording"][0], 1)).any()
    assert shown(files["without-recording"][0], 0) == shown(files["right"][0], 0)
    assert len(samples(shown(files["without-recording"][0], 1))) == len(samples(shown(files["right"][0], 1)))
    assert [one["messages"][1] for one in files["without-picture"]] == [one["messages"][1] for one in files["right"]]
    assert 0.1 <= task.held_out["without_picture"].chance < 0.4  # of 40 rows
    kinds = [one["messages"][0]["content"][0]["type"] for one in files["align"]]
    assert set(kinds) == {"image", "audio"}

    _, files = written("emoji", None)
    learnt, asked = ({shown(one, 0) for one in files[name]} for name in ("align", "category"))
    assert learnt.isdisjoint(asked)
    assert {one["messages"][0]["content"][1]["text"] for one in files["align"]} == {
        "Which category?",
        "Which keywords?",
    }
    for name in ("spoken", "unheard-theo"):
        _, files = written(name, None)
        learnt, asked = ({shown(one, 0) for one in files[name]} for name in ("align", "right"))
        assert learnt.isdisjoint(asked)
        assert len(learnt) + len(asked) == 3000
    _, files = written("two-pictures")
    assert shown(files["without-first"][3], 1) == shown(files["right"][3], 1) != shown(files["without-first"][3], 0)
    _, files = written("connected")
    lengths = {len(one["messages"][1]["content"].split()) for one in files["align"]}
    assert lengths == {2, 3, 4, 5}


@pytest.mark.ci
@pytest.mark.timeout(900)
def test_the_measurement_does_every_task_once_and_gives_every_claim_its_figure(
    repository,
    saved_model,  # noqa: F811
    shared,
    tmp_path,
    monkeypatch,
):
    work = tmp_path / "work"
    words = ["--dry-run", "--base", saved_model, "--data", shared / "data", "--work", work, "--jobs", 1]
    for name in ("naming", "reading", "emoji", "spoken", "unheard", "connected", "both", "two-pictures"):
        words += ["--task", name]

    def run():
        command = [sys.executable, "benchmarks/quality/multimodal.py", *map(str, words)]
        return subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=900)

    done = run()
    assert done.returncode == 0, done.stderr[-2000:]
    results = {path.name: path.stat().st_mtime_ns for path in (work / "results").iterdir()}
    assert len(results) == 2 * 9  # of the six speakers two are enough here
    entries = read_ledger(work / "ledger")
    assert len(entries) == 9
    assert {one.result["text_bits_per_byte_difference"].value for one in entries if one.seeds} == {0.0}
    monkeypatch.syspath_prepend(str(repository / "benchmarks" / "evidence"))
    import claims

    ours = [one for one in claims.load_claims(repository / "benchmarks/claims.yaml") if "multimodal-" in one.entry]
    assert len(ours) >= 12
    assert [row.claim.id for row in claims.judge(ours, entries) if row.verdict == claims.NOT_MEASURED] == []
    again = run()
    assert {path.name: path.stat().st_mtime_ns for path in (work / "results").iterdir()} == results
    tables = [line for line in done.stdout.splitlines() if line.startswith("| ") and "x 64 tokens" not in line]
    assert set(tables) - set(again.stdout.splitlines()) <= {line for line in tables if line.count("|") == 4}  # times
