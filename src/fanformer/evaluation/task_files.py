"""Local files of benchmark tasks, in the form their authors released them, as the fields that upstream's YAML reads.

The layout of the folder is described in docs/evaluation.md. No task is defined here: each YAML that is written includes
upstream's own by absolute path and replaces only where the data comes from.
"""

import csv
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fanformer.errors import DataError

Row = dict[str, Any]


@dataclass(frozen=True)
class LocalTask:
    """How one task of upstream is fed from local files.

    Attributes:
        name: upstream's name of the task.
        definition: upstream's YAML, relative to its folder of tasks.
        evaluated: the split that is measured, and the names its file may have.
        examples: the split that few-shot examples come from, and its file; None where upstream takes none.
        read: yields the rows of a file.
    """

    name: str
    definition: str
    evaluated: tuple[str, tuple[str, ...]]
    examples: tuple[str, str] | None
    read: Callable[[Path], Iterable[Row]]


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with path.open(encoding="utf-8") as file:
        yield from ((number, line) for number, line in enumerate(file, start=1) if line.strip())


def _json_lines(path: Path) -> Iterator[Row]:
    for number, line in _lines(path):
        try:
            yield json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{number}: expected a JSON object on every line, got {error}") from error


def _ai2_questions(path: Path) -> Iterator[Row]:
    """ARC and OpenBookQA: {"question": {"stem", "choices": [{"text", "label"}]}, "answerKey"}."""
    for row in _json_lines(path):
        stem, choices = row["question"]["stem"], row["question"]["choices"]
        columns = {name: [choice[name] for choice in choices] for name in ("text", "label")}
        yield {"question": stem, "question_stem": stem, "choices": columns, "answerKey": row["answerKey"]}


def _piqa(path: Path) -> Iterator[Row]:
    """{"goal", "sol1", "sol2"}, with the labels in NAME-labels.lst beside it."""
    labels_path = path.with_name(f"{path.stem}-labels.lst")
    _require(labels_path, "piqa")
    labels = []
    for number, line in _lines(labels_path):
        if (got := line.strip()) not in ("0", "1"):
            raise DataError(f"{labels_path}:{number}: expected 0 or 1, got `{got[:20]}`: fetch the file again.")
        labels.append(int(got))
    rows = list(_json_lines(path))
    if len(labels) != len(rows):
        raise DataError(
            f"{labels_path} has {len(labels)} labels and {path} has {len(rows)} questions: fetch both again."
        )
    for row, label in zip(rows, labels, strict=True):
        yield {"goal": row["goal"], "sol1": row["sol1"], "sol2": row["sol2"], "label": label}


def _hellaswag(path: Path) -> Iterator[Row]:
    names = ("activity_label", "ctx_a", "ctx_b", "endings")
    for row in _json_lines(path):
        yield {**{name: row[name] for name in names}, "label": str(row["label"])}


def _lambada(path: Path) -> Iterator[Row]:
    """{"context", "continuation"}, or upstream's {"text"}; upstream cuts the text at its last space."""
    for number, row in enumerate(_json_lines(path), start=1):
        if "text" not in row and " " in row["continuation"]:
            raise DataError(f"{path}:{number}: `continuation` must be one word, got {row['continuation']!r}.")
        yield {"text": row["text"] if "text" in row else f"{row['context']} {row['continuation']}"}


def _mmlu(path: Path) -> Iterator[Row]:
    """Rows of question, four choices and the letter of the right one, without a header."""
    with path.open(encoding="utf-8", newline="") as file:
        for number, cells in enumerate(csv.reader(file), start=1):
            if len(cells) != 6 or cells[5] not in ("A", "B", "C", "D"):
                raise DataError(
                    f"{path}:{number}: expected question, four choices and a letter A to D, got {len(cells)} cells."
                )
            yield {"question": cells[0], "choices": cells[1:5], "answer": "ABCD".index(cells[5])}


def _sciq(path: Path) -> Iterator[Row]:
    names = ("question", "support", "correct_answer", "distractor1", "distractor2", "distractor3")
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: expected a JSON list of questions, got {error}") from error
    for row in rows:
        yield {name: row[name] for name in names}


def _fields(*names: str) -> Callable[[Path], Iterable[Row]]:
    """Return what yields these fields of every line of a file."""
    return lambda path: ({name: row[name] for name in names} for row in _json_lines(path))


_HELLASWAG = ("hellaswag/hellaswag_val.jsonl", "hellaswag/hellaswag_val_1000.jsonl")
LOCAL_TASKS = {
    name: LocalTask(name, f"{definition}.yaml", (split, files), ("train", shown) if shown else None, read)
    for name, definition, split, files, shown, read in (
        ("arc_easy", "arc/arc_easy", "test", ("arc/ARC-Easy-Test.jsonl",), "arc/ARC-Easy-Train.jsonl", _ai2_questions),
        ("arc_challenge", "arc/arc_challenge", "test", ("arc/ARC-Challenge-Test.jsonl",),
         "arc/ARC-Challenge-Train.jsonl", _ai2_questions),
        ("sciq", "sciq/sciq", "test", ("sciq/test.json",), "sciq/train.json", _sciq),
        ("piqa", "piqa/piqa", "validation", ("piqa/valid.jsonl",), "piqa/train.jsonl", _piqa),
        ("hellaswag", "hellaswag/hellaswag", "validation", _HELLASWAG, "hellaswag/hellaswag_train.jsonl", _hellaswag),
        ("winogrande", "winogrande/default", "validation", ("winogrande/dev.jsonl",), "winogrande/train_xl.jsonl",
         _fields("sentence", "option1", "option2", "answer")),
        ("openbookqa", "openbookqa/openbookqa", "test", ("openbookqa/test.jsonl",), "openbookqa/train.jsonl",
         _ai2_questions),
        ("lambada_openai", "lambada/lambada_openai", "test", ("lambada/lambada_openai.jsonl",), None, _lambada),
    )
}  # fmt: skip
"""Tasks of one file by upstream's name; the groups are read from upstream's YAML."""

GROUP_FOLDERS = {"blimp": "blimp", "mmlu": "mmlu/default"}
"""Groups by upstream's name -> the folder of their YAML."""


def _group_tasks(name: str, definitions: Path) -> list[LocalTask]:
    """Return the tasks of upstream's group `blimp` or `mmlu`."""
    folder = GROUP_FOLDERS[name]
    tasks = []
    for path in sorted((definitions / folder).glob("*.yaml")):
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        if "group" in content:
            continue
        subset, definition = content["dataset_name"], f"{folder}/{path.name}"
        if name == "blimp":
            files = ("train", (f"blimp/{subset}.jsonl",))
            read = _fields("sentence_good", "sentence_bad")
            tasks.append(LocalTask(content["task"], definition, files, None, read))
        else:
            tested, shown = ("test", (f"mmlu/test/{subset}_test.csv",)), ("dev", f"mmlu/dev/{subset}_dev.csv")
            tasks.append(LocalTask(content["task"], definition, tested, shown, _mmlu))
    return tasks


def write_local_tasks(
    names: Iterable[str], data_dir: Path, definitions: Path, folder: Path, with_examples: bool
) -> None:
    """Write YAML and converted data of tasks, for upstream's task manager to read.

    Args:
        names: tasks and groups, by upstream's names.
        data_dir: the local files.
        definitions: upstream's folder of tasks.
        folder: what to fill.
        with_examples: whether few-shot examples are taken.

    Raises:
        DataError: if a file is missing or of another form.
    """
    for name in names:
        if name in LOCAL_TASKS:
            _write_task(LOCAL_TASKS[name], data_dir, definitions, folder, with_examples)
            continue
        for task in _group_tasks(name, definitions):
            # the examples of mmlu have a split of their own, which upstream opens in any case
            _write_task(task, data_dir, definitions, folder, with_examples or name == "mmlu")
        for path in (definitions / GROUP_FOLDERS[name]).glob("_*.yaml"):
            (folder / path.name).write_text(yaml.safe_dump({"include": str(path)}), encoding="utf-8")


def _write_task(task: LocalTask, data_dir: Path, definitions: Path, folder: Path, with_examples: bool) -> None:
    splits = [task.evaluated]
    if with_examples and task.examples is not None:
        splits.append((task.examples[0], task.examples[1:]))
    data_files = {}
    for split, files in splits:
        source = _find(data_dir, files, task.name)
        converted = folder / f"{task.name}-{split}.jsonl"
        with converted.open("w", encoding="utf-8") as out:
            out.writelines(json.dumps(row) + "\n" for row in _rows(task, source))
            if not out.tell():
                raise DataError(f"{source} holds nothing, expected questions of `{task.name}`: fetch it again.")
        data_files[split] = str(converted)
    content: dict[str, Any] = {
        "include": str(definitions / task.definition),
        "task": task.name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": data_files, "cache_dir": str(folder / "datasets")},
    }
    for key in ("training_split", "validation_split", "test_split"):
        # one split is measured, and upstream prefers the test split
        named = yaml_value(definitions / task.definition, key)
        if named is not None and named not in data_files:
            content[key] = None
    (folder / f"{task.name}.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")


def yaml_value(definition: Path, key: str) -> str | None:
    """Return what upstream's YAML, or the one it includes, gives for a key that holds a plain word."""
    included = None
    for line in definition.read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        word = value.strip().strip('"')
        if name.strip('"') == key:
            return None if word in ("null", "") else word
        if name.strip('"') == "include":
            included = word
    return None if included is None else yaml_value(definition.parent / included, key)


def _rows(task: LocalTask, source: Path) -> Iterator[Row]:
    try:
        yield from task.read(source)
    except (KeyError, TypeError) as error:
        wanted = f"no field {error}" if isinstance(error, KeyError) else f"fields of another kind ({error})"
        raise DataError(
            f"{source} is not in the form that `{task.name}` was released in: {wanted}; docs/evaluation.md shows it."
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{source}: expected UTF-8 text, got byte {error.start} that is none.") from error


def _find(data_dir: Path, files: tuple[str, ...], task: str) -> Path:
    found = [data_dir / file for file in files if (data_dir / file).is_file()]
    if not found:
        _require(data_dir / files[0], task)
    return found[0]


def _require(path: Path, task: str) -> None:
    if not path.is_file():
        raise DataError(f"`{task}` needs {path.absolute()}, which is not there: put the released file there.")
