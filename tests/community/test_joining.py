"""A volunteer's stay: a host that is away is waited for where it was known, and updates are to arrive in time."""

import socket
import time

import pytest

from fanformer.errors import ConfigError

pytest.importorskip("cryptography", reason="needs the extra `community` (cryptography)")

from fanformer.community.flower import joining
from fanformer.community.flower.joining import CERTIFICATE_FILE, Stay, _Patience, join
from fanformer.community.flower.server import _FAREWELL_SECONDS
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


def test_a_host_that_stays_away_is_not_waited_for_for_ever(monkeypatch):
    assert joining._AWAY_SECONDS == 86400  # a day, as the page and the last line of `join` say
    monkeypatch.setattr(joining, "_WAIT_SECONDS", 0.01)
    patience = _Patience(None, Notebook())
    assert [patience.wait("no answer:"), patience.wait("no answer:")] == ["", ""]
    patience._since -= joining._AWAY_SECONDS
    assert patience.wait("no answer:") == "gone"
    patience.over()
    assert patience.wait("no answer:") == ""
    assert _Patience(time.monotonic(), Notebook()).wait("no answer:") == "time"


def test_the_page_says_how_long_a_host_says_good_bye(repository):
    text = " ".join((repository / "docs" / "community.md").read_text(encoding="utf-8").split())
    assert f"it says good-bye for {_FAREWELL_SECONDS:.0f} seconds after the last round" in text


@pytest.mark.parametrize("licence", ["", "x" * 201, "CC0\nMIT"], ids=["empty", "long", "two lines"])
def test_a_licence_that_no_host_takes_is_refused_before_anything_is_trained(licence):
    with pytest.raises(ConfigError, match="`--licence` must be 1 to 200 printable characters, got") as caught:
        Own(licence=licence)
    assert "\n" not in str(caught.value)


def test_a_share_ends_early_enough_for_its_update_to_arrive():
    assert training_seconds(100.0, 0.0, 0.0) == 90.0
    assert training_seconds(100.0, 30.0, 0.0) == 60.0  # fetching the base, and preparing the data
    assert training_seconds(100.0, 10.0, 4.0) == 80.0
    assert training_seconds(100.0, 10.0, 24.0) == 60.0  # what sending took, and a quarter
    assert training_seconds(100.0, 10.0, 900.0) == 40.0  # one slow hour does not end a stay
    assert training_seconds(100.0, 200.0, 0.0) == 0.0
