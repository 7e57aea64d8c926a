"""Which files a pattern names: those of `glob`, and each once, however many ways lead to it."""

import glob
import os
import time

import pytest

from fanformer.data.sources.documents import open_source
from fanformer.errors import DataError

FILES = (
    *("one.txt", "two.md", ".hidden.txt", "a/one.txt", "a/.hid", "a/b/three.txt", "a/b/c/four.txt", "[x]/five.txt"),
    *(".dot/six.txt", "a/.dot/seven.txt", "b1/one.txt", "b2/one.txt", "b2/txt"),
)
PATTERNS = (
    *("*", "*.txt", "**", "**/*.txt", "**/b/*", "a/**", "a/**/*.txt", "**/**/one*", "b[12]/*.txt", "b?/one.txt"),
    *(".*", "**/.*", ".dot/*", "**/.dot/*", "[[]x]/*", "*/one.txt", "a/b/../*.txt", "a**/*.txt", "[!a]*/*"),
    *("**/a/**/c/*.txt", "none*/**"),
)


@pytest.fixture
def tree(tmp_path):
    root = tmp_path / "tree"
    for name in FILES:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"text of {name}")
    return root


def names(spec):
    return [document.name for document in open_source(str(spec))]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_tree_without_links_gives_the_files_of_glob(tree, pattern):
    found = {path for path in glob.glob(f"{tree}/{pattern}", recursive=True) if os.path.isfile(path)}
    if not found:
        with pytest.raises(DataError, match="no file matches"):
            open_source(f"{tree}/{pattern}")
        return
    source = open_source(f"{tree}/{pattern}")
    assert {str(path) for _, path in source._files} == found
    assert len(source.parts) == len(found)


def test_a_loop_of_links_gives_every_file_once_under_its_own_name(tree):
    expected = names(tree / "**" / "*.txt")
    (tree / "loop").symlink_to(tree)
    (tree / "a" / "up").symlink_to("..")
    (tree / "a" / "b" / "self").symlink_to("self")
    started = time.monotonic()
    assert names(tree / "**" / "*.txt") == expected
    assert time.monotonic() - started < 5  # `glob` goes round until the system refuses names of 40 links
    description = open_source(str(tree / "**" / "*.txt")).describe()
    assert [entry["name"] for entry in description["files"]] == expected


def test_text_is_not_trained_on_and_held_out_at_once_because_of_links(tmp_path):
    from fanformer.data.preparation.selection import choose_split

    folder = tmp_path / "dir"
    folder.mkdir()
    for number in range(60):
        (folder / f"{number}.txt").write_text(f"text number {number} of a small collection\n" * 3)
    (folder / "loop").symlink_to(folder)
    source = open_source(f"{folder}/**/*.txt")
    sides = {False: set(), True: set()}
    for held_out, document in choose_split(source, 0.2).assign(source):
        sides[held_out].add(document.text)
    assert not sides[False] & sides[True]
    assert len(sides[False]) + len(sides[True]) == 60


def test_a_folder_reached_by_several_links_is_read_once_and_in_the_name_with_fewest(tree, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "deep").mkdir(parents=True)
    (elsewhere / "deep" / "far.txt").write_text("far")
    (tree / "z").symlink_to(elsewhere)
    (tree / "k").symlink_to(elsewhere)
    (tree / "b1" / "k").symlink_to(tree / "k")
    assert [name for name in names(tree / "**" / "*.txt") if "far" in name] == ["k/deep/far.txt"]
    assert names(tree / "*" / "deep" / "*.txt") == ["k/deep/far.txt"]


def test_a_file_with_several_names_is_read_once(tree):
    (tree / "a" / "again.txt").symlink_to(tree / "one.txt")
    (tree / "0.txt").symlink_to(tree / "a" / "b" / "three.txt")
    os.link(tree / "one.txt", tree / "a" / "b" / "hard.txt")
    os.link(tree / "b1" / "one.txt", tree / "b1" / "another.txt")
    found = names(tree / "**" / "*.txt")
    assert "one.txt" in found
    assert "a/b/three.txt" in found
    assert "b1/another.txt" in found
    assert not {"a/again.txt", "0.txt", "a/b/hard.txt", "b1/one.txt"} & set(found)
    assert names(tree / "0*.txt") == ["0.txt"]  # a link that only one way leads to is read
