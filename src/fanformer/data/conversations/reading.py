"""Examples from jsonl files: a wrong row costs one line that names it, and never the run."""

import glob
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fanformer.data.conversations.examples import Example, example_of
from fanformer.data.sources.decompression import require_regular
from fanformer.data.sources.file_patterns import matching_files
from fanformer.data.sources.readers import file_kind, jsonl_lines, parse_object
from fanformer.errors import DataError


@dataclass(frozen=True)
class ReadExamples:
    """What files hold.

    Attributes:
        examples: the rows that are conversations, in the order of files and lines.
        wrong: how many rows are not, and were left out.
    """

    examples: tuple[Example, ...]
    wrong: int


def read_examples(spec: str, note: Callable[[str], None], *, preference: bool = False) -> ReadExamples:
    """Read the rows of one or several files, each in any form that `example_of` knows.

    Args:
        spec: a .jsonl file, or a pattern of such, plain or compressed.
        note: is told of each wrong row in one line, with its file and number.
        preference: whether every row must have a chosen and a rejected answer.

    Raises:
        DataError: if there is no such file, one cannot be read, or no row is right.
    """
    found: list[Example] = []
    wrong = 0
    for path in _files(spec):
        for number, line in jsonl_lines(path):
            place = f"{path}:{number}"
            try:
                row = parse_object(line, place)
            except DataError as error:
                wrong += 1
                note(f"{error}; left out")
                continue
            try:
                found.append(example_of(row, preference=preference, place=place))
            except DataError as error:
                wrong += 1
                note(f"{place}: {error}; left out")
    if not found:
        raise DataError(f"data `{spec}` holds no row to learn from, got {wrong} wrong ones: expected jsonl of messages")
    return ReadExamples(tuple(found), wrong)


def _files(spec: str) -> list[Path]:
    path = Path(spec).expanduser().absolute()
    files = [path]
    if not path.exists():
        files = matching_files(path) if glob.has_magic(spec) else []
        if not files:
            raise DataError(f"data `{spec}`: no file {path}: expected a .jsonl file or a pattern of such")
    for file in files:
        require_regular(file)
        if file_kind(file) != "jsonl":
            raise DataError(f"data `{file}`: expected a .jsonl file (.xz, .gz and .zst too), got {file.name}")
    return files
