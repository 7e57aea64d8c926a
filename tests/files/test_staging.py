"""Outputs written aside: what is there under a name is whole, at whatever moment the process is killed."""

import json
import os
import subprocess
import sys

import pytest

from fanformer.files import staging

REPLACE_UNTIL_KILLED = """
import json, os, shutil, signal, sys
from pathlib import Path
from transformers import PreTrainedTokenizerFast
from fanformer.files import staging
from fanformer.quantization.quantized_folder import Settings, write_folder
from tests.warm_processes import Strike, strike_at_change

source, work = Path(sys.argv[1]), Path(sys.argv[2])
tokenizer = PreTrainedTokenizerFast.from_pretrained(source)
target, found = work / "out", []

def write_model(name):
    def write(folder):
        folder.mkdir()
        for number in range(3):
            (folder / f"part-{number}").write_text(name)
        return ()
    write_folder(source, target, Settings("gptq"), tokenizer, 0, (), write, "")

def content():
    parts = [file.read_text() for file in sorted(target.glob("part-*"))] if target.is_dir() else []
    return parts[0] if len(set(parts)) == 1 and len(parts) == 3 and (target / "README.md").exists() else "lost"

for change in range(1, 200):
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    write_model("old")
    child = os.fork()
    if child == 0:
        strike_at_change(Strike(signal.SIGKILL, change), work)
        write_model("new")
        os._exit(0)
    ended = os.waitpid(child, 0)[1]
    found.append(content())
    write_model("next")
    assert content() == "next" and sorted(os.listdir(work)) == ["out"], os.listdir(work)
    if ended == 0:
        break
print(json.dumps(found))
"""


@pytest.mark.ci
def test_folder_is_old_or_new_whenever_the_process_is_killed(saved_model, tmp_path, repository):
    words = [sys.executable, "-c", REPLACE_UNTIL_KILLED, str(saved_model), str(tmp_path / "work")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(repository), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found) == {"old", "new"}
    assert found == sorted(found, reverse=True)  # once it is new, it stays so
    assert found.count("old") > 5


@pytest.mark.parametrize("place", ["linux", "a file system that cannot", "darwin", "win32"])
def test_folder_takes_the_place_of_another(tmp_path, monkeypatch, place):
    if place == "linux" != sys.platform:
        pytest.skip("only Linux exchanges two names")
    if place == "a file system that cannot":
        monkeypatch.setattr(staging, "_exchange", lambda first, second: False)
    else:
        monkeypatch.setattr(sys, "platform", place)
    for name in ("new", "place"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    staging.replace_folder(tmp_path / "new", tmp_path / "place")
    assert [path.name for path in tmp_path.iterdir()] == ["place"]
    assert (tmp_path / "place/file").read_text() == "new"
