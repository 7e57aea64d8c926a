"""A volunteer's stay: a host that is away is waited for where it was known, and updates are to arrive in time."""

import socket

import pytest

pytest.importorskip("cryptography", reason="needs the extra `community` (cryptography)")

from fanformer.community.flower.joining import CERTIFICATE_FILE, Stay, join
from fanformer.community.identity import make_member_key
from fanformer.community.invitation import Invitation, UnreachableError
from fanformer.community.volunteering import Own, training_seconds
from tests.training.conftest import Notebook


@pytest.fixture
def stay(tmp_path):
    """Join a host that is away, for a moment."""
    private, _ = make_member_key("alice", tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    invitation, notebook = Invitation("127.0.0.1", port, "0" * 32, "0" * 32), Notebook()
    folder = tmp_path / "joined"
    return folder, notebook, lambda: join(invitation, private, folder, Own(), 0.2, notebook)


def test_a_host_that_never_answered_is_one_line(stay):
    _, _, begin = stay
    with pytest.raises(UnreachableError, match="no host answers at "):
        begin()


def test_a_host_that_answered_before_is_waited_for(stay):
    """Host and member start again after the same power cut, the member first."""
    folder, notebook, begin = stay
    folder.mkdir()
    (folder / CERTIFICATE_FILE).write_text("of an earlier stay")
    assert begin() == Stay(0, 0, "time")
    assert ["trying again until it answers" in note for note in notebook.notes] == [True]


def test_a_share_ends_early_enough_for_its_update_to_arrive():
    assert training_seconds(100.0, 0.0, 0.0) == 90.0
    assert training_seconds(100.0, 30.0, 0.0) == 60.0  # fetching the base, and preparing the data
    assert training_seconds(100.0, 10.0, 4.0) == 80.0
    assert training_seconds(100.0, 10.0, 24.0) == 60.0  # what sending took, and a quarter
    assert training_seconds(100.0, 10.0, 900.0) == 40.0  # one slow hour does not end a stay
    assert training_seconds(100.0, 200.0, 0.0) == 0.0
