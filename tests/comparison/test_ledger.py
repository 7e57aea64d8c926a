"""The ledger: entries come back as written, malformed files are named, and intervals are what tables of t say."""

import dataclasses
import json
import math
import shutil
import subprocess
import sys

import pytest

from fanformer.comparison.ledger import (
    EXACT,
    Entry,
    Figure,
    interval_over_seeds,
    measured_today,
    range_of,
    read_entry,
    read_ledger,
    t_quantile,
    write_entry,
)
from fanformer.errors import DataError
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


def test_what_is_measured_today_tells_day_machine_and_versions_and_can_be_written(tmp_path):
    measured = measured_today("speed-{date}", what="a speed", configuration={}, result={"rate": Figure(2.0, "1/s")})
    assert measured.name == f"speed-{measured.date}"
    assert (measured.kind, measured.hardware, measured.versions) == ("benchmark", hardware(), versions())
    write_entry(tmp_path, measured)
    assert read_entry(tmp_path, measured.name) == measured
    asked = measured_today("x", command="fanformer compare", what="a rule", kind="rule", configuration={}, result={})
    assert (asked.name, asked.command, asked.kind) == ("x", "fanformer compare", "rule")


def test_entry_comes_back_as_it_was_written(tmp_path):
    written = entry(result={"parameters": Figure(92203744, "parameters", interval=EXACT), "loss": Figure(2.5, "nats")})
    folder = tmp_path / "new" / "folder"
    assert write_entry(folder, written) == folder / "trainings.jsonl"
    assert read_entry(folder, "run-1") == written
    assert isinstance(read_entry(folder, "run-1").result["parameters"].value, int)
    assert read_entry(folder, "run-2") is None
    # nothing is left of the file put aside, nor of the lock
    assert [file.name for file in folder.iterdir()] == ["trainings.jsonl"]


def test_ledger_is_two_files_with_a_line_for_each_entry_in_the_order_of_names(tmp_path):
    for name, kind in (("z", "training"), ("m", "rule"), ("a", "training"), ("b", "benchmark"), ("z", "training")):
        write_entry(tmp_path, entry(name=name, kind=kind, what=f"{kind} {name}"))
    assert [read.name for read in read_ledger(tmp_path)] == ["a", "b", "m", "z"]
    for file, expected in (("trainings.jsonl", ["a", "z"]), ("measurements.jsonl", ["b", "m"])):
        assert [json.loads(line)["name"] for line in (tmp_path / file).read_text().splitlines()] == expected
    before = (tmp_path / "trainings.jsonl").read_text().splitlines()
    write_entry(tmp_path, entry(name="a", what="another"))
    after = (tmp_path / "trainings.jsonl").read_text().splitlines()
    assert after[0] != before[0]
    assert after[1] == before[1]


def test_processes_that_write_at_once_lose_no_entry(tmp_path):
    code = (
        "import dataclasses, sys; from pathlib import Path; from tests.comparison.test_ledger import *\n"
        + "for number in range(10): write_entry(Path(sys.argv[1]), entry(name=f'{sys.argv[2]}-{number}'))"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    writing = [subprocess.Popen([*command, name]) for name in ("a", "b", "c", "d")]
    assert [process.wait() for process in writing] == [0] * 4
    assert [read.name for read in read_ledger(tmp_path)] == [f"{name}-{n}" for name in "abcd" for n in range(10)]


def test_two_entries_of_one_name_are_both_named(tmp_path):
    path = write_entry(tmp_path, entry())
    path.write_text(path.read_text() * 2)
    with pytest.raises(DataError, match=r"trainings\.jsonl, line 1 and line 2 have the same name 'run-1': delete one"):
        read_ledger(tmp_path)
    path.rename(tmp_path / "measurements.jsonl")
    write_entry(tmp_path / "other", entry()).rename(path)
    (tmp_path / "measurements.jsonl").write_text(path.read_text())
    with pytest.raises(DataError, match=r"trainings.jsonl, line 1 and .*measurements.jsonl, line 1 have the same name"):
        read_ledger(tmp_path)


def test_missing_ledger_and_one_of_single_files_are_refused_with_what_to_do(tmp_path):
    with pytest.raises(DataError, match=r"no ledger at .*/nowhere: expected a folder with trainings\.jsonl or meas"):
        read_ledger(tmp_path / "nowhere")
    (tmp_path / "trainings").mkdir()
    (tmp_path / "trainings" / "run-1.json").write_text("{}")
    with pytest.raises(
        DataError, match=r"older versions wrote them: .*`python benchmarks/import_results\.py .*, and d"
    ):
        read_entry(tmp_path, "run-1")


def test_entries_of_single_files_are_taken_over_in_place_of_those_of_their_names(tmp_path, repository):
    for folder, name in (("", "b"), ("trainings", "a")):
        (tmp_path / "old" / folder).mkdir(exist_ok=True, parents=True)
        kind = "training" if folder else "rule"
        content = json.dumps(dataclasses.asdict(entry(name=name, kind=kind)))
        (tmp_path / "old" / folder / f"{name}.json").write_text(content)
    write_entry(tmp_path / "new", entry(name="a", what="older"), entry(name="c"))
    moved = dataclasses.replace(entry(name="b", kind="rule"), command="another place")
    write_entry(tmp_path / "new", moved)
    program = repository / "benchmarks" / "import_results.py"
    for ledger in ("new", "old"):  # beside what is there, and in the place of the files
        command = [sys.executable, program, tmp_path / "old", tmp_path / ledger]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        assert "1 entries taken over into" in said
    assert [(read.name, read.what) for read in read_ledger(tmp_path / "new")] == [(n, "a run") for n in "abc"]
    assert read_entry(tmp_path / "new", "b") == moved  # differs in its command alone
    shutil.rmtree(tmp_path / "old" / "trainings")
    assert [read.name for read in read_ledger(tmp_path / "old")] == ["a", "b"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"kind": "trial"},
            "`kind` must be one of comparison, ablation, rule, training, evaluation, benchmark, got 'trial'",
        ),
        ({"command": " "}, "`command` must be a text that is not empty, got ' '"),
        ({"name": "a b"}, "`name` must be letters, digits, dots, dashes and underscores, got 'a b'"),
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
def test_malformed_line_is_named_with_its_field(tmp_path, changes, message):
    path = tmp_path / "trainings.jsonl"
    path.write_text(json.dumps({**dataclasses.asdict(entry()), **changes}))
    with pytest.raises(DataError) as caught:
        read_ledger(tmp_path)
    assert str(caught.value).startswith(f"{path}, line 1: {message}")


def test_missing_field_and_broken_json_are_named(tmp_path):
    path = tmp_path / "measurements.jsonl"
    path.write_text(json.dumps({key: value for key, value in dataclasses.asdict(entry()).items() if key != "seeds"}))
    with pytest.raises(DataError, match=r"measurements\.jsonl, line 1: `seeds` is missing: expected name, what, kind"):
        read_ledger(tmp_path)
    path.write_text("{")
    with pytest.raises(DataError, match=r"cannot read .*/measurements\.jsonl, line 1 \(JSONDecodeError: .*an entry"):
        read_ledger(tmp_path)
    for text in ("[]", "{}"):
        path.write_text(text)
        with pytest.raises(DataError, match=r"measurements\.jsonl, line 1: `(the line|name)` (must|is) .*name, what"):
            read_ledger(tmp_path)


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
    # t of 1 degree, at a standard deviation over sqrt(2) of 1
    assert interval_over_seeds([1, 3], "x").high == pytest.approx(2 + 12.7062, rel=1e-5)


def test_one_value_has_no_interval_and_none_is_an_error():
    assert interval_over_seeds([1.5], "nats") == Figure(1.5, "nats")
    assert range_of([1.5], "s") == Figure(1.5, "s")
    for function in (interval_over_seeds, range_of):
        with pytest.raises(DataError, match="`values` must hold at least one measurement, got none"):
            function([], "s")


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
