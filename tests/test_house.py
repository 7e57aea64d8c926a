"""The rules of CONTRIBUTING.md that a machine can check, checked."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.saved_models import saved_model, tiny_tokenizer  # noqa: F401

ROOT = Path(__file__).parents[1]
PYTHON = sorted(path for name in ("src", "tests", "benchmarks", "release") for path in (ROOT / name).rglob("*.py"))
LONGEST_FILE, LONGEST_MODEL_FILE, LONGEST_FUNCTION = 500, 700, 60
LONGEST_PARAGRAPH, LONGEST_EXPERIMENT_PARAGRAPH = 100, 80
"""Words of a paragraph or list item."""
EXPERIMENT_LABELS = {"Tried", "Result", "Decision"}
LARGE_FILES = {
    "benchmarks/results/trainings.jsonl": "every training that was measured, with its curve",
    "src/fanformer/box/model.safetensors": "the model in the box, committed once",
    "src/fanformer/box/tokenizer.json": "of the model in the box",
}
"""Tracked files above 500 KB, with the reason."""
OWN_MODULES = """
import sys
from fanformer.cli.main import main
main({words!r})
own = [name for name, module in sys.modules.items() if name.startswith("fanformer.")]
own = [name for name in own if not hasattr(sys.modules[name], "__path__") and not name.startswith("fanformer.cli.")]
print(*sorted(own))
"""


def tracked():
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("needs a git checkout")
    return [ROOT / name for name in done.stdout.split("\0") if name]


def lines_of_code(function):
    """Lines of a function without its docstring."""
    docstring = ast.get_docstring(function, clean=False)
    lines = function.end_lineno - function.lineno + 1
    return lines if docstring is None else lines - (function.body[0].end_lineno - function.body[0].lineno + 1)


def test_files_and_functions_are_short():
    wrong = []
    for path in PYTHON:
        text = path.read_text(encoding="utf-8")
        limit = LONGEST_MODEL_FILE if path.name.startswith("modeling_fanformer") else LONGEST_FILE
        if text.count("\n") > limit:
            wrong.append(f"{path.relative_to(ROOT)}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if lines_of_code(node) > LONGEST_FUNCTION:
                wrong.append(f"{path.relative_to(ROOT)}: `{node.name}` has {lines_of_code(node)} lines")
    assert wrong == []


def test_readers_pages_are_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


def paragraphs(text):
    """Return (line, words) of every paragraph and list item, without headings, tables and code blocks."""
    found, is_code, is_open = [], False, False
    for number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if line.startswith("```"):
            is_code, is_open = not is_code, False
        elif is_code or not line or line.startswith(("#", "|", "![")):
            is_open = False
        else:
            if not is_open or re.match(r"([-*+]|\d+\.) ", line):
                found.append((number, []))
            found[-1][1].extend(line.split())
            is_open = True
    return found


def test_paragraphs_are_counted_item_by_item_without_tables_and_code():
    text = "# a b\none two\nthree\n\n| a | b |\n\n- four\n  five\n- six\n\n```bash\nx y\n\nz\n```\n1. seven\n"
    assert [(number, len(words)) for number, words in paragraphs(text)] == [(2, 3), (7, 3), (9, 2), (16, 2)]


def test_paragraphs_of_the_documents_are_short():
    wrong = []
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        limit = LONGEST_EXPERIMENT_PARAGRAPH if path.name == "experiments.md" else LONGEST_PARAGRAPH
        for number, words in paragraphs(path.read_text(encoding="utf-8")):
            if len(words) > limit:
                wrong.append(f"{path.relative_to(ROOT)}:{number}: {len(words)} words, at most {limit}")
    assert wrong == []


def test_experiments_say_what_was_tried_what_came_of_it_and_what_was_decided():
    entries = re.split(r"^## ", (ROOT / "docs/experiments.md").read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    assert len(entries) >= 27
    wrong = []
    for entry in entries:
        title, _, text = entry.partition("\n")
        labels = "".join(words[0][0] for _, words in paragraphs(text) if words[0].strip(":,") in EXPERIMENT_LABELS)
        if not re.match(r"\d{4}-\d\d-\d\d: ", title) or not re.fullmatch("((T+R+)+D)+", labels):
            wrong.append(f"{title}: {labels}")
    assert wrong == []


def test_files_that_the_documents_name_are_there():
    """Targets of links, and files of code by name or with a part of their path; experiments tell of the past."""
    tree = [str(path.relative_to(ROOT)) for path in tracked()]
    wrong = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        text = path.read_text(encoding="utf-8")
        for target in re.findall(r"\]\((?!https?:|mailto:|#)([^)#\s]+)", text):
            if not (path.parent / target).exists():
                wrong.append(f"{path.relative_to(ROOT)}: {target}")
        for name in re.findall(r"`([\w/]+\.py)`", text) if path.name != "experiments.md" else ():
            if not any(f"/{known}".endswith(f"/{name}") for known in tree):
                wrong.append(f"{path.relative_to(ROOT)}: {name}")
    assert wrong == []


def test_no_file_names_a_folder_of_somebody_s_machine():
    own = re.compile(r"(?<![\w.])/(?:work|root|home|Users)/[\w.-]+")
    wrong = []
    for path in tracked():
        if path.suffix in (".py", ".md", ".json", ".jsonl", ".yaml", ".toml", ".svg", ".html", "") and path.is_file():
            found = own.search(path.read_text(encoding="utf-8", errors="replace"))
            if found and path != Path(__file__):
                wrong.append(f"{path.relative_to(ROOT)}: {found.group()}")
    assert wrong == []


def test_no_tracked_file_is_large_without_a_reason():
    large = {str(path.relative_to(ROOT)) for path in tracked() if path.is_file() and path.stat().st_size > 500_000}
    assert large <= LARGE_FILES.keys()


def test_public_functions_that_take_tensors_say_their_shapes():
    wrong = []
    for path in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
                continue
            annotations = [ast.unparse(one.annotation) for one in node.args.args if one.annotation is not None]
            docstring = ast.get_docstring(node)
            if (
                docstring is not None
                and "Tensor" in annotations
                and not re.search(r"\([^)]*\)|shape|Do what", docstring)
            ):
                wrong.append(f"{path.relative_to(ROOT)}: `{node.name}`")
    assert wrong == []


@pytest.mark.ci
def test_commands_load_few_modules_of_ours(saved_model, tmp_path):  # noqa: F811
    def own(*words):
        code = OWN_MODULES.format(words=[str(word) for word in words])
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()[-1].split()

    generating = own("generate", saved_model, "the cat", "--max-length", 2)
    assert len(generating) <= 14, generating
    assert not [name for name in generating if ".gguf" in name]
    text = tmp_path / "text.txt"
    text.write_text("a line of text\n" * 2000)
    sizes = ("--vocab-size", 300, "--sequence-length", 32, "--batch-size", 2, "--set", "model.vocab_size=300")
    training = own("train", "--data", text, "--output-dir", "run", "--max-steps", 1, "--compile", "off", *sizes)
    assert len(training) <= 51, training
