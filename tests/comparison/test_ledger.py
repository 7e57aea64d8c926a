"""The ledger: entries come back as written, malformed files are named, and intervals are what tables of t say."""

import dataclasses
import json
import math
import subprocess
import sys

import pytest

from fanformer.comparison.ledger import (
    EXACT,
    Entry,
    Figure,
    interval_over_seeds,
    range_of,
    read_entry,
    read_ledger,
    t_quantile,
    write_entry,
)
from fanformer.errors import ConfigError, DataError
from fanformer.machine.versions import command_line, hardware, versions


def entry(**fields):
    values = {
        "name": "run-1",
        "what": "a run",
        "kind": "training",
        "command": "fanformer train --seed 1",
        "date": "2026-11-25",
        "seeds": [1],
        "configuration": {"learning_rate": 0.01},
        "data": {"source": "stdlib", "fingerprint": "abc"},
        "hardware": {"cpu": "a processor", "cores": 2},
        "versions": {"torch": "2.13.0"},
        "result": {"loss": Figure(2.5, "nats per token", 2.25, 2.75, "95% t-interval over 3 seeds")},
        "curve": [{"tokens": 10, "loss": 3.0}],
    }
    return Entry(**{**values, **fields})


def test_entry_comes_back_as_it_was_written(tmp_path):
    written = entry(result={"parameters": Figure(92203744, "parameters", interval=EXACT), "loss": Figure(2.5, "nats")})
    path = write_entry(tmp_path / "new" / "folder", written)
    assert path == tmp_path / "new" / "folder" / "run-1.json"
    assert read_entry(path) == written
    assert isinstance(read_entry(path).result["parameters"].value, int)
    assert [file.name for file in path.parent.iterdir()] == ["run-1.json"]  # nothing is left of the file put aside


def test_ledger_is_read_from_all_folders_in_the_order_of_names(tmp_path):
    for folder, name in (("b", "z"), ("", "m"), ("a/deep", "a")):
        write_entry(tmp_path / folder, entry(name=name))
    assert [read.name for read in read_ledger(tmp_path)] == ["a", "m", "z"]


def test_two_files_of_one_name_are_both_named(tmp_path):
    for folder in ("a", "b"):
        write_entry(tmp_path / folder, entry())
    with pytest.raises(DataError, match=r"b/run-1\.json and .*a/run-1\.json have the same name: rename one"):
        read_ledger(tmp_path)


def test_missing_ledger_is_named(tmp_path):
    with pytest.raises(DataError, match=r"no ledger at .*/nowhere: expected a folder of \.json files"):
        read_ledger(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"kind": "trial"},
            "`kind` must be one of comparison, ablation, rule, training, evaluation, benchmark, got 'trial'",
        ),
        ({"command": " "}, "`command` must be a text that is not empty, got ' '"),
        ({"name": "a b"}, "`name` must be letters, digits, dots, dashes and underscores, got 'a b'"),
        ({"name": "other"}, "`name` must be the file's name without .json, 'run-1', got 'other'"),
        ({"date": "20261125"}, "`date` must be a day as YYYY-MM-DD, got '20261125'"),
        ({"seeds": 1}, "`seeds` must be a list of whole numbers, got 1"),
        ({"seeds": [True]}, "`seeds` must be a list of whole numbers, got [True]"),
        ({"hardware": {}}, "`hardware` must be an object that is not empty, got {}"),
        ({"configuration": []}, "`configuration` must be an object, got []"),
        ({"data": {"source": "x"}}, "`data.fingerprint` is missing: expected source, fingerprint"),
        ({"curve": [1]}, "`curve` must be a list of objects, got [1]"),
        ({"comand": "x"}, "`comand` is not a field: did you mean `command`?"),
        ({"details": {"rows": [1.0, float("nan")]}}, "`details.rows.1` must be a finite number, got nan"),
        ({"result": {"loss": 2.5}}, "`result.loss` must be an object with value, unit, got 2.5"),
        ({"result": {"loss": {"value": "2", "unit": "nats"}}}, "`result.loss.value` must be a number, got '2'"),
        ({"result": {"loss": {"value": True, "unit": "nats"}}}, "`result.loss.value` must be a number, got True"),
        ({"result": {"loss": {"value": 2, "unit": ""}}}, "`result.loss.unit` must be a text that is not empty"),
        ({"result": {"loss": {"value": 2}}}, "`result.loss.unit` is missing: expected value, unit"),
        ({"result": {"loss": {"value": 2, "unit": "nats", "hi": 3}}}, "`result.loss.hi` is not a field"),
        (
            {"result": {"loss": {"value": 2, "unit": "nats", "low": 1}}},
            "`result.loss.interval` must be both ends with what they are, or neither with null or 'exact'",
        ),
        (
            {"result": {"loss": {"value": 2, "unit": "nats", "low": 1, "high": 3}}},
            "`result.loss.interval` must be what its ends are, such as 'range of 3 repetitions', got None",
        ),
        (
            {"result": {"loss": {"value": 4, "unit": "nats", "low": 1, "high": 3, "interval": "range"}}},
            "`result.loss.value` must be between its ends 1 and 3, got 4",
        ),
    ],
)
def test_malformed_file_is_named_with_its_field(tmp_path, changes, message):
    path = tmp_path / "run-1.json"
    path.write_text(json.dumps({**dataclasses.asdict(entry()), **changes}))
    with pytest.raises(DataError) as caught:
        read_entry(path)
    assert str(caught.value).startswith(f"{path}: {message}")


def test_missing_field_and_broken_json_are_named(tmp_path):
    path = tmp_path / "run-1.json"
    path.write_text(json.dumps({key: value for key, value in dataclasses.asdict(entry()).items() if key != "seeds"}))
    with pytest.raises(DataError, match=r"run-1\.json: `seeds` is missing: expected name, what, kind"):
        read_entry(path)
    path.write_text("{")
    with pytest.raises(DataError, match=r"cannot read .*/run-1\.json \(JSONDecodeError: .*expected an entry"):
        read_entry(path)
    path.write_text("[]")
    with pytest.raises(DataError, match=r"run-1\.json: `the file` must be an object with name, what"):
        read_entry(path)


def test_nothing_is_written_that_could_not_be_read(tmp_path):
    with pytest.raises(DataError, match=r"`result\.loss\.value` must be a finite number, got inf"):
        write_entry(tmp_path, entry(result={"loss": Figure(float("inf"), "nats")}))
    with pytest.raises(DataError, match=r"`configuration\.folder` must be a text, number, .* got .*PosixPath"):
        write_entry(tmp_path, entry(configuration={"folder": tmp_path}))
    with pytest.raises(DataError, match=r"`details\.rows` must be an object whose names are texts, got \{1: 2\}"):
        write_entry(tmp_path, entry(details={"rows": {1: 2}}))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("confidence", "degrees", "expected"),
    [
        (0.95, 1, 12.706),
        (0.95, 2, 4.303),
        (0.95, 3, 3.182),
        (0.95, 4, 2.776),
        (0.95, 7, 2.365),
        (0.95, 10, 2.228),
        (0.95, 30, 2.042),
        (0.95, 120, 1.980),
        (0.99, 5, 4.032),
        (0.9, 9, 1.833),
        (0.999, 2, 31.599),
    ],
)
def test_t_quantile_is_that_of_printed_tables(confidence, degrees, expected):
    assert t_quantile(confidence, degrees) == pytest.approx(expected, abs=5e-4)


@pytest.mark.parametrize("confidence", [0.1, 0.5, 0.9, 0.95, 0.999])
def test_t_quantile_equals_its_closed_forms(confidence):
    assert t_quantile(confidence, 1) == pytest.approx(math.tan(math.pi * confidence / 2), rel=1e-9)
    assert t_quantile(confidence, 2) == pytest.approx(confidence * math.sqrt(2 / (1 - confidence**2)), rel=1e-9)


@pytest.mark.parametrize("degrees", [*range(1, 12), 99, 100])
def test_density_of_t_up_to_the_quantile_is_the_confidence(degrees):
    quantile, pieces = t_quantile(0.95, degrees), 2000
    logarithm = math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2) - math.log(degrees * math.pi) / 2
    points = [quantile * number / pieces for number in range(pieces + 1)]
    heights = [math.exp(logarithm - (degrees + 1) / 2 * math.log1p(point**2 / degrees)) for point in points]
    simpson = heights[0] + heights[-1] + 4 * sum(heights[1:-1:2]) + 2 * sum(heights[2:-1:2])
    assert 2 * simpson * quantile / pieces / 3 == pytest.approx(0.95, abs=1e-9)


def test_interval_over_seeds_is_the_mean_with_students_t():
    figure = interval_over_seeds([1.0, 2.0, 3.0], "bits per byte")
    # standard deviation 1, t of 2 degrees 4.302653
    assert (figure.value, figure.unit, figure.interval) == (2, "bits per byte", "95% t-interval over 3 seeds")
    assert figure.high - 2 == pytest.approx(4.302653 / 3**0.5, rel=1e-6)
    assert 2 - figure.low == pytest.approx(figure.high - 2, rel=1e-12)
    assert interval_over_seeds([1, 3], "x", 0.5).interval == "50% t-interval over 2 seeds"
    assert interval_over_seeds([1, 3], "x", 0.5).high == pytest.approx(3)  # t of 1 degree at 0.5 is 1


def test_one_value_has_no_interval_and_none_is_an_error():
    assert interval_over_seeds([1.5], "nats") == Figure(1.5, "nats")
    assert range_of([1.5], "s") == Figure(1.5, "s")
    for function in (interval_over_seeds, range_of):
        with pytest.raises(DataError, match="`values` must hold at least one measurement, got none"):
            function([], "s")
    with pytest.raises(ConfigError, match=r"`confidence` must be between 0 and 1, got 95: 0\.95 is usual"):
        interval_over_seeds([1, 2], "s", 95)


def test_range_is_the_median_with_its_extremes():
    assert range_of([5.0, 1.0, 2.0], "s") == Figure(2.0, "s", 1.0, 5.0, "range of 3 repetitions")


def test_hardware_and_versions_describe_this_machine():
    import torch

    machine = hardware()
    assert list(machine) == ["cpu", "cores", "memory_bytes", "bfloat16_units", "gpus", "os"]
    assert machine["cpu"]
    assert machine["cores"] >= 1
    assert machine["memory_bytes"] is None or machine["memory_bytes"] > 2**28
    assert len(machine["gpus"]) == (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    assert versions()["torch"] == torch.__version__.partition("+")[0] or versions()["torch"] == torch.__version__


def test_command_line_names_no_folder_of_this_machine(tmp_path, monkeypatch):
    (tmp_path / "beside").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    words = [sys.executable, "benchmarks/x.py", str(tmp_path / "here" / "runs" / "a"), f"--data={tmp_path}/beside/a b"]
    assert command_line(words) == "python benchmarks/x.py runs/a '--data=../beside/a b'"
    assert (
        command_line(["/usr/bin/fanformer", "train", "--data", "/mnt/disk/x.txt"])
        == "fanformer train --data PATH/x.txt"
    )
    assert command_line(["fanformer", "eval", "*.txt"]) == "fanformer eval '*.txt'"


def test_reading_the_ledger_imports_neither_torch_nor_transformers():
    code = (
        "import sys, fanformer.comparison.ledger, fanformer.machine.versions as here; here.hardware(); here.versions();"
        + ("print([name for name in ('torch', 'transformers') if name in sys.modules])")
    )
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == "[]"
