import os
import subprocess

import pytest

from fanformer.training.folder import METRICS_FILE, RecordFile, read_records


def test_losses_keep_all_their_digits_and_times_do_not(tmp_path):
    loss = 5.768321990966797
    RecordFile(tmp_path).append({"step": 1, "loss": loss, "elapsed_seconds": 1.23456789, "rows": "0a"})
    assert read_records(tmp_path) == [{"step": 1, "loss": loss, "elapsed_seconds": 1.23457, "rows": "0a"}]


def test_a_line_that_a_kill_left_half_written_is_passed_over_and_replaced(tmp_path):
    records = RecordFile(tmp_path)
    for step in (1, 2, 3):
        records.append({"step": step, "loss": 1.0})
    path = tmp_path / METRICS_FILE
    path.write_bytes(path.read_bytes()[:-5])
    assert [record["step"] for record in read_records(tmp_path)] == [1, 2]
    records.forget_after(1)
    records.append({"step": 2, "loss": 2.0})
    assert [record["step"] for record in read_records(tmp_path)] == [1, 2]
    assert path.read_text().endswith("\n")


def test_lines_that_a_full_disk_refuses_wait_until_there_is_room(mount_disk):
    disk = mount_disk("size=8k")
    records = RecordFile(disk)
    records.append({"step": 1})
    records.sync()
    ballast = disk / "ballast"
    subprocess.run(["dd", "if=/dev/zero", f"of={ballast}", "bs=512"], capture_output=True)  # until it is full
    for step in range(2, 400):
        records.append({"step": step, "loss": 1.0})
    with pytest.raises(OSError, match="No space left"):
        records.sync()
    written = [record["step"] for record in read_records(disk)]
    assert written == list(range(1, len(written) + 1))
    assert len(written) < 399
    ballast.unlink()
    subprocess.run(["mount", "-o", "remount,size=64k", str(disk)], check=True)
    records.sync()
    assert [record["step"] for record in read_records(disk)] == list(range(1, 400))


def test_no_records_yet_is_no_error(tmp_path):
    assert read_records(tmp_path) == []
    RecordFile(tmp_path).forget_after(5)
    assert os.listdir(tmp_path) == [METRICS_FILE]
