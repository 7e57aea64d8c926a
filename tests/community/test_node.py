"""Offers out of Flower: one that is announced before all of it is there is waited for, one that is gone is not."""

import pytest

pytest.importorskip("flwr", reason="needs the extra `community` (flwr)")

from fanformer.community.flower import node as room
from fanformer.community.flower.content import flower, offer_content
from fanformer.community.invitation import Invitation
from fanformer.community.offers import Sealed
from fanformer.errors import DataError
from tests.community.flower_messages import take_apart

pytestmark = pytest.mark.ci

SEALED = Sealed("an offer", "signed", "a key", {"tokenizer.json": b"a tokenizer"})


class Link:
    """Stands where Flower's SuperLink is: an offer whose objects are there once they were asked for a few times."""

    def __init__(self, asks):
        message = flower("app").Message(offer_content(SEALED, b"weights"), 1, "train", ttl=60.0)
        announced, self.objects = take_apart(message)
        self.announced = [announced]
        self.missing = dict.fromkeys(self.objects, asks)

    def PullMessages(self, request):
        found, self.announced = self.announced, []
        return flower("proto.fleet_pb2").PullMessagesResponse(
            messages_list=[head for head, _ in found], message_object_trees=[tree for _, tree in found]
        )

    def PullObject(self, request):
        there = self.missing.get(request.object_id, 1) == 0
        if not there and request.object_id in self.missing:
            self.missing[request.object_id] -= 1
        return flower("proto.message_pb2").PullObjectResponse(
            object_found=request.object_id in self.objects,
            object_available=there,
            object_content=self.objects[request.object_id] if there else b"",
        )


@pytest.fixture
def connect(process_of_a_run, monkeypatch, tmp_path):
    """Make a member's end of a link."""
    monkeypatch.setattr(room, "_PIECE_SECONDS", 0.01)
    return lambda link: room.Node(link, 1, Invitation("127.0.0.1", 1, "0" * 32, "0" * 32), tmp_path)


def test_an_offer_that_is_not_all_there_yet_is_waited_for(connect):
    """A host's good-bye comes once: whoever looks for it in the middle of its being sent is not to miss it."""
    link = Link(asks=2)
    arrived = connect(link).receive()
    assert (arrived.sealed, arrived.base) == (SEALED, b"weights")
    assert set(link.missing.values()) == {0}


def test_an_offer_that_is_gone_is_not_waited_for(connect):
    link = Link(asks=0)
    link.objects.clear()
    link.missing.clear()
    member = connect(link)
    with pytest.raises(DataError, match="was gone before it was read"):
        member.receive()
    assert member.receive() is None


def test_an_offer_that_never_comes_whole_is_not_waited_for_for_ever(connect, monkeypatch):
    monkeypatch.setattr(room, "_PATIENCE_SECONDS", 0.05)
    with pytest.raises(DataError, match="was gone before it was read"):
        connect(Link(asks=1_000_000)).receive()
