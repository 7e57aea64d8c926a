"""The page of runs: their figures, what they wrote, how they differ; read while a run is under way as well."""

import json
import shutil

import pytest

from fanformer.cli.main import main
from fanformer.errors import CheckpointError, ConfigError
from fanformer.report.live import LiveServer
from fanformer.training.folder import read_records
from fanformer.training.pages.curves import run_charts
from fanformer.training.pages.report import run_page, write_run_page
from fanformer.training.pages.runs import changes, read_runs
from fanformer.training.run import train
from tests.pages import Reader
from tests.training.conftest import tiny_run


@pytest.fixture(scope="module")
def runs(corpus, tmp_path_factory):
    """Two finished runs of other lengths and rates."""
    folder = tmp_path_factory.mktemp("runs")
    for name, fields in (("one", {}), ("two", {"max_steps": 4, "learning_rate": 0.02})):
        train(tiny_run(corpus, folder / name, eval_steps=2, log_steps=1, save_steps=4, **fields))
    return [folder / "one", folder / "two"]


def test_what_the_model_wrote_stands_in_its_records(runs):
    records = read_records(runs[0])
    assert [record["step"] for record in records if "sample" in record] == [2, 4, 6]
    assert all(record["sample"].startswith("zq" * 14) for record in records if "sample" in record)


def test_page_of_two_runs_has_their_figures_and_needs_no_other_file(runs, tmp_path):
    path = tmp_path / "page.html"
    written = write_run_page(runs, path)
    page = Reader(path.read_text())
    assert [link for link in page.links if not link.startswith("#")] == []
    assert len(set(page.ids)) == len(page.ids)
    kept = json.loads(page.record)
    for run in runs:
        records = read_records(run)
        assert kept[run.name]["records"] == records
        assert f"{records[-1]['val_loss']:.4f}" in page.text
        assert records[-1]["sample"] in "".join(page.words)
    assert "How the runs differ setting one two" in page.text
    assert "max_steps 6 4" in page.text
    assert "learning_rate 0.01 0.02" in page.text
    assert "batch_size" not in page.text.partition("How the runs differ")[2].partition("Configuration")[0]
    names = ["loss-tokens", "loss-time", "bits-per-byte", "learning-rate", "gradient-norm", "throughput"]
    assert [one.name for one in written] == ["page.html", *(f"{name}.png" for name in names)]
    assert all(one.read_bytes().startswith(b"\x89PNG") for one in written[1:])
    for title in ("Loss over tokens", "Loss over time", "Held-out bits per byte", "Learning rate", "Throughput"):
        assert title in page.text


def test_a_single_run_is_set_beside_its_preset(runs):
    text = Reader(run_page(read_runs(runs[:1]))).text
    assert "How the run differs from preset nano setting one preset nano" in text
    assert "model.hidden_size 32 192" in text


def test_evaluations_and_quantized_copies_in_the_folder_are_shown(runs, tmp_path):
    folder = shutil.copytree(runs[0], tmp_path / "run")
    figures = {"loss": 2.125, "bits_per_byte": 1.0625, "perplexity": 8.375, "tokens": 1234}
    entry = {"acc": 0.4375, "acc_stderr": 0.03125, "documents": 9, "num_fewshot": 0}
    (folder / "eval.json").write_text(
        json.dumps({"model": "run", "files": {"a/held.txt": figures}, "tasks": {"arc_easy": entry}})
    )
    layers = [{"output_error": 0.25, "bits": 4}, {"output_error": 0.5, "bits": 4}, {"output_error": 9.0, "bits": None}]
    (folder / "gptq").mkdir()
    report = {"method": "gptq", "bits": 4, "group_size": 64, "bytes": 2_500_000, "bytes_before": 9_000_000}
    (folder / "gptq" / "quantization.json").write_text(json.dumps({**report, "layers": layers}))
    (folder / "other.json").write_text("[1, 2]")
    text = Reader(run_page(read_runs([folder]))).text
    assert "run eval.json held.txt 2.1250 1.0625 8.3750 1,234" in text
    assert "run eval.json arc_easy acc 0.4375 0.0312" in text
    assert "run gptq gptq 4 64 2.5 9.0 0.3750" in text


def test_a_run_under_way_is_shown_as_far_as_it_is(runs, tmp_path):
    folder = tmp_path / "begun"
    folder.mkdir()
    shutil.copy(runs[0] / "run.yaml", folder)
    assert "begun nano" in Reader(run_page(read_runs([folder]))).text
    lines = (runs[0] / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:3]) + lines[3][:20])  # the fourth is being written
    assert "3 of 6" in Reader(run_page(read_runs([folder]))).text


def test_whatever_the_page_reads_counts_as_a_change(runs, tmp_path):
    folder = shutil.copytree(runs[0], tmp_path / "run")
    seen = [changes([folder])]
    assert changes([folder]) == seen[0]
    (folder / "gptq").mkdir()
    for name in ("metrics.jsonl", "run.yaml", "eval.json", "gptq/quantization.json"):
        with (folder / name).open("a") as file:
            file.write("\n")
        assert changes([folder]) not in seen
        seen.append(changes([folder]))


def test_a_file_that_is_being_replaced_ends_no_page_that_follows(runs, tmp_path):
    folder = shutil.copytree(runs[0], tmp_path / "run")
    before = changes([folder])
    (folder / "config.json.lost.json").symlink_to(folder / "none")  # as one that is gone once it was listed
    assert changes([folder]) == before
    assert "run" in Reader(run_page(read_runs([folder]))).text


def test_right_answers_of_a_tuning_have_a_chart(runs, tmp_path):
    folder = shutil.copytree(runs[0], tmp_path / "run")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    told = [line | ({"val_exact": 0.125 * line["step"]} if "val_loss" in line else {}) for line in lines]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in told))
    [chart] = [one for one in run_charts(read_runs([folder])) if one.name == "right-answers"]
    assert "right to the letter. share over tokens. 0.25 at " in chart.in_words()


def test_no_words_of_a_run_become_markup(runs, tmp_path):
    folder = shutil.copytree(runs[0], tmp_path / "<b>run</b>")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    lines[-1]["sample"] = "</pre><script>alert(1)</script>"
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = run_page(read_runs([folder]))
    assert "<script>alert" not in page
    assert "<b>run" not in page
    assert "</pre><script>alert(1)</script>" in "".join(Reader(page).words)


def test_runs_of_one_name_are_told_apart_by_their_parents(runs, tmp_path):
    for parent in ("left", "right"):
        shutil.copytree(runs[0], tmp_path / parent / "run")
    found = read_runs([tmp_path / "left" / "run", tmp_path / "right" / "run"])
    assert [run.name for run in found] == ["left/run", "right/run"]
    with pytest.raises(ConfigError, match=r"each run must be named once, got .*one twice"):
        read_runs([runs[0], runs[0]])
    with pytest.raises(CheckpointError, match="is this the folder of a run"):
        read_runs([tmp_path])


def test_command_writes_into_the_run_and_refuses_what_has_no_effect(runs, tmp_path, capsys):
    folder = shutil.copytree(runs[1], tmp_path / "two")
    assert main(["report", str(folder)]) == 0
    out = capsys.readouterr().out
    assert out == f"report: {folder / 'report.html'}, 6 charts as PNG in {folder / 'report'}\n"
    assert (folder / "report.html").is_file()
    assert main(["report", str(folder), "--live", "--output", "x.html"]) == 2
    assert "`--output` writes a page and --live none, got x.html" in capsys.readouterr().err
    assert main(["report", str(folder), "--port", "1"]) == 2
    assert "`--port` applies to --live, got 1 without" in capsys.readouterr().err
    for wrong in (tmp_path, tmp_path / "page"):
        assert main(["report", str(folder), "--output", str(wrong)]) == 2
        assert f"`--output` must be a file that ends in .html, got {wrong}" in capsys.readouterr().err
    assert not (tmp_path / "page").exists()
    assert main(["report", str(tmp_path / "none"), "--live"]) == 2
    assert "is this the folder of a run" in capsys.readouterr().err


def test_following_ends_well_by_ctrl_c(runs, capsys, monkeypatch):
    def interrupted(server):
        assert "Loss over tokens" in server.page()
        raise KeyboardInterrupt

    monkeypatch.setattr(LiveServer, "serve_forever", interrupted)
    assert main(["report", str(runs[0]), str(runs[1]), "--live", "--no-browser"]) == 0
    assert capsys.readouterr().out.startswith("following 2 runs at http://127.0.0.1:")
