"""The extra `community`: it resolves in an empty environment, and all that needs it passes in one that has it."""

import subprocess
import sys
import venv

import pytest

pytestmark = pytest.mark.ci

FILES = (
    "tests/community/test_identity.py",
    "tests/community/test_release.py",
    "tests/community/test_offers.py",
    "tests/community/test_guard.py",
    "tests/community/test_joining.py",
    "tests/community/test_node.py",
    "tests/community/test_replies.py",
    "tests/community/test_doors.py",
    "tests/community/test_flower.py",
)


@pytest.fixture(scope="module")
def python(tmp_path_factory, repository):
    """An interpreter that has the extra, with all that it needs in its versions, in front of what this one has."""
    folder = tmp_path_factory.mktemp("environment") / "env"
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    pins = repository / "requirements-community.txt"
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", "-r", str(pins)], check=True, timeout=600)
    [site] = (folder / "lib").glob("python*/site-packages")
    borrowed = next(path for path in sys.path if path.endswith("site-packages"))
    (site / "borrowed.pth").write_text(borrowed + "\n")
    return python


@pytest.mark.timeout(900)
def test_everything_that_needs_the_extra_passes_and_nothing_is_skipped(fanformer, repository):
    words = ["-q", "-p", "no:cacheprovider", "-rs", *FILES]
    assert "SKIPPED" not in fanformer(*words, program=("-m", "pytest"), folder=repository, timeout=850)


@pytest.mark.timeout(900)
def test_the_extra_resolves_in_an_empty_environment(repository, tmp_path):
    """pip finds versions of everything that go together; nothing is installed."""
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    words = ["-m", "pip", "install", "--dry-run", "--quiet", "--disable-pip-version-check", f"{repository}[community]"]
    done = subprocess.run([str(python), *words], capture_output=True, text=True, timeout=880)
    assert done.returncode == 0, done.stderr[-3000:]
