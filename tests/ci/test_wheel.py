"""The wheel holds all that the package needs, and names all that it imports."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

IMPORT_NAMES = {"pyyaml": "yaml", "ggml-python": "ggml", "pillow": "PIL"}


def requirement_names(requirements):
    names = [re.match(r"[A-Za-z0-9_.-]+", requirement)[0].lower() for requirement in requirements]
    return {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in names}


def test_every_imported_package_is_declared(repository):
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    extras = requirement_names([item for extra in project["optional-dependencies"].values() for item in extra])
    declared = requirement_names(project["dependencies"]) | extras | set(sys.stdlib_module_names) | {"fanformer"}
    imported = {}
    for path in (repository / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            imported.update({name.split(".")[0]: path.name for name in names})
    assert {name: file for name, file in imported.items() if name not in declared} == {}


@pytest.fixture
def source(repository, tmp_path):
    """What a wheel is built of, apart from the clone, where building leaves files."""
    place = tmp_path / "source"
    shutil.copytree(repository / "src", place / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(repository / name, place)
    return place


@pytest.mark.ci
@pytest.mark.timeout(600)
def test_the_wheel_trains_and_writes_in_an_environment_without_this_checkout(source, tmp_path):
    """Only the wheel's own files and the declared packages are there; those are borrowed from this environment."""
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "-w", str(tmp_path), str(source)]
    subprocess.run(build, check=True, timeout=300)
    [wheel] = tmp_path.glob("fanformer-*.whl")
    folders = [source / "src/fanformer/server/playground", source / "src/fanformer/box"]
    shipped = {str(path.relative_to(source / "src")) for folder in folders for path in folder.iterdir()}
    assert len(shipped) > 15
    assert shipped <= set(zipfile.ZipFile(wheel).namelist())
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", str(wheel)]
    subprocess.run(install, check=True, timeout=300)
    [site] = (tmp_path / "env" / "lib").glob("python*/site-packages")
    # A plain path in a .pth file is searched, but .pth files inside it are not: the editable install stays out.
    borrowed = next(path for path in sys.path if path.endswith("site-packages"))
    (site / "borrowed.pth").write_text(borrowed + "\n")

    program, environment = str(python.with_name("fanformer")), {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}

    def fanformer(*words, said=""):
        done = subprocess.run([program, *words], cwd=tmp_path, env=environment, capture_output=True, text=True,
                              timeout=300, input=said)  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = subprocess.run([str(python), "-c", "import fanformer; print(fanformer.__file__)"], capture_output=True,
                           text=True, check=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": ""})  # fmt: skip
    assert Path(where.stdout.strip()).is_relative_to(tmp_path)
    assert '"total": 92230144' in fanformer("info", "92m", "--json")
    (tmp_path / "mine.txt").write_text("a line of text, number one and two and three.\n" * 200)
    shape = ["hidden_size=32", "intermediate_size=48", "num_hidden_layers=2"]
    settings = [f"--set=model.{item}" for item in shape]
    fanformer("train", "--data", "mine.txt", "--output-dir", "out", "--max-steps=3", "--sequence-length=32", *settings)
    assert fanformer("generate", "out", "a line", "--max-length", "3").startswith("a line")
    # the model in the box
    assert fanformer("generate", "a line", "--max-length", "3").startswith("a line")
    assert fanformer("chat", "--max-length", "3", "--min-length", "3", "--seed", "1", said="Hello\n").strip()
    assert fanformer("info").startswith("# The model in the box")
    with subprocess.Popen([program, "serve", "--port", "0"], cwd=tmp_path, env=environment, stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL, text=True) as server:  # fmt: skip
        assert server.stdout.readline().startswith("serving box")
        server.terminate()
