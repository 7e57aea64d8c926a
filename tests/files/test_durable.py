"""What is written is on the disk, on every system."""

import os
import sys

import pytest

from fanformer.files import durable


@pytest.mark.parametrize(
    ("platform", "flags"),
    [("linux", [os.O_RDONLY, os.O_RDONLY]), ("darwin", [os.O_RDONLY] * 2), ("win32", [os.O_RDWR])],
)
def test_file_and_its_folder_are_waited_for_as_far_as_the_system_can(tmp_path, monkeypatch, platform, flags):
    asked, synced, real = [], [], os.open
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(os, "open", lambda path, flags: asked.append(flags) or real(path, flags))
    monkeypatch.setattr(os, "fsync", synced.append)
    durable.replace_text(tmp_path / "file", "text")
    assert (tmp_path / "file").read_text() == "text"
    assert asked == flags
    assert len(synced) == len(flags)
