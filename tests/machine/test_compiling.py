import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from fanformer.machine.compiling import keep_compiled_code

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
COMPILE = """
import torch
from torch._dynamo.utils import counters
from fanformer.machine.compiling import keep_compiled_code
import torch._inductor.codecache  # names a folder of its own
keep_compiled_code(1)
torch.compile(lambda x: (x.sin() + 1).cos(), options={"cpp.threads": 1})(torch.ones(8))
print(counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"])
"""


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    forget(monkeypatch)
    return tmp_path


def forget(monkeypatch):
    """Unset the variable until the end of the test, whatever sets it in between."""
    monkeypatch.setenv(VARIABLE, "any")
    monkeypatch.delenv(VARIABLE)


def test_compiled_code_lies_in_the_users_cache_and_is_his_alone(cache):
    folder = keep_compiled_code(2)
    assert folder.parent == cache / "fanformer" / "compiled"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert os.environ[VARIABLE] == str(folder)


def test_another_number_of_threads_has_another_folder(monkeypatch):
    first = keep_compiled_code(1)
    forget(monkeypatch)
    assert keep_compiled_code(2) != first


def test_a_folder_that_torch_named_by_itself_is_replaced(monkeypatch, cache):
    monkeypatch.setenv(VARIABLE, str(Path(tempfile.gettempdir()) / "torchinductor_somebody"))
    assert cache in keep_compiled_code(1).parents


def test_a_folder_that_the_user_named_stays(monkeypatch, tmp_path):
    monkeypatch.setenv(VARIABLE, str(tmp_path / "mine"))
    assert keep_compiled_code(1) == tmp_path / "mine"
    assert os.environ[VARIABLE] == str(tmp_path / "mine")


def test_where_no_folder_can_be_made_torch_has_its_own(cache):
    (cache / "fanformer").write_text("a file")
    assert keep_compiled_code(1) is None
    assert VARIABLE not in os.environ


@pytest.mark.slow
def test_the_next_process_finds_what_one_compiled(cache):
    found = []
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, check=True)
        found.append(done.stdout.split())
    assert found == [["0", "1"], ["1", "0"]]
