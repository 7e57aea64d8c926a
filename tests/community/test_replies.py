"""Replies out of Flower, and the host's loop: nobody waits for whoever was cut off, and no reply ends the process."""

import json
import time
from types import SimpleNamespace

import pytest

pytest.importorskip("flwr", reason="needs the extra `community` (flwr)")

from fanformer.community.flower.content import flower, read_reply, refusal_content, update_content
from fanformer.community.flower.outcome import NODES_FILE
from fanformer.community.flower.replies import Replies
from fanformer.community.flower.server import Rounds
from fanformer.community.plan import Plan
from tests.community.flower_messages import take_apart
from tests.community.test_doors import Meeting
from tests.training.conftest import corpus  # noqa: F401

pytestmark = pytest.mark.ci

PAYLOAD = b"an update " * 99


class Link:
    """Stands where Flower's SuperLink is: replies that were announced, and those of their pieces that are there."""

    def __init__(self):
        self.announced, self.pieces, self.confirmed = [], {}, []

    def announce(self, message, content):
        """Announce a reply as a member does, and return its pieces, of which none is there yet."""
        announced, pieces = take_apart(flower("app").Message(content, reply_to=message))
        self.announced.append(announced)
        self.pieces |= dict.fromkeys(pieces)
        return pieces

    def answer(self, message, content):
        """Announce a reply that is there as a whole."""
        self.pieces |= self.announce(message, content)

    def PullMessages(self, request):
        found = [one for one in self.announced if one[0].metadata.reply_to_message_id in request.message_ids]
        self.announced = [one for one in self.announced if one not in found]
        return flower("proto.runtime_pb2").PullAppMessagesResponse(
            messages_list=[head for head, _ in found], message_object_trees=[tree for _, tree in found]
        )

    def PullObject(self, request):
        content = self.pieces.get(request.object_id)
        return flower("proto.message_pb2").PullObjectResponse(
            object_found=request.object_id in self.pieces, object_available=content is not None, object_content=content
        )

    def ConfirmMessageReceived(self, request):
        self.confirmed.append(request.message_object_id)


class Grid:
    """Flower's way to the members, of whom those of `numbers` are connected."""

    def __init__(self, numbers=(1,)):
        self._runtime_client, self.numbers, self.sent = Link(), list(numbers), []
        self.node = flower("proto.node_pb2").Node(node_id=1)
        self.run = SimpleNamespace(run_id=7)

    def get_node_ids(self):
        return self.numbers

    def push_messages(self, messages):
        for message in messages:
            message.metadata.__dict__["_message_id"] = f"message-{len(self.sent)}"
            self.sent.append(message)
        return [message.metadata.message_id for message in messages]


@pytest.fixture
def grid(process_of_a_run):
    """A grid in a process of run 7."""
    return Grid()


def asked(grid):
    """A message that a member got."""
    app = flower("app")
    [number] = grid.push_messages([app.Message(app.RecordDict({}), 1, "train", ttl=60.0)])
    return grid.sent[-1], number


def test_a_reply_is_taken_once_it_is_whole_and_others_meanwhile(grid):
    link, replies = grid._runtime_client, Replies(grid)
    (slow, first), (quick, second) = asked(grid), asked(grid)
    pieces = link.announce(slow, update_content(PAYLOAD))
    link.answer(quick, refusal_content("no time"))
    [found] = replies.take([first, second])
    assert (found.message, read_reply(found.content)) == (second, (None, "'no time'"))
    for name, content in pieces.items():
        assert replies.take([first]) == []
        assert replies.is_arriving(first)
        link.pieces[name] = content
    [found] = replies.take([first])
    assert (found.message, read_reply(found.content), found.is_lost) == (first, (PAYLOAD, ""), False)
    assert replies.take([first]) == []
    assert len(link.confirmed) == 2


def test_a_member_that_was_cut_off_while_it_sent_may_be_asked_again(grid):
    link, replies = grid._runtime_client, Replies(grid)
    message, number = asked(grid)
    pieces = link.announce(message, update_content(PAYLOAD))
    assert replies.take([number]) == []
    for name in pieces:
        del link.pieces[name]  # Flower forgets a reply that does not come
    [found] = replies.take([number])
    assert (found.content, found.is_lost, found.problem) == (None, True, "it was cut off while it sent")


@pytest.mark.parametrize("spoil", [lambda body: b"", lambda body: body[:9], lambda body: b"Array \x00"],
                         ids=["empty", "cut", "another"])  # fmt: skip
def test_a_reply_that_cannot_be_read_ends_nothing(grid, spoil):
    link, replies = grid._runtime_client, Replies(grid)
    message, number = asked(grid)
    link.pieces |= {name: spoil(body) for name, body in link.announce(message, update_content(PAYLOAD)).items()}
    [found] = replies.take([number])
    assert found.content is None
    assert found.problem.startswith("a reply must be a message of Flower, got none (")
    assert not found.is_lost


@pytest.fixture
def rounds(grid, tmp_path, corpus):  # noqa: F811
    """Make the loop of a host for alice, whose rounds take a minute by the meeting's clock."""
    plan = Plan(rounds=3, round_steps=2, batch_size=2, sequence_length=32, round_seconds=60.0)
    met = Meeting(tmp_path, corpus, names=("alice",), plan=plan).open()
    nodes = [{"number": 1, "name": "alice", "fingerprint": "a"}]
    (met.hosted.folder / "flower").mkdir()

    def register(**fields):
        content = json.dumps([{**node, **fields} for node in nodes])
        (met.hosted.folder / "flower" / NODES_FILE).write_text(content)

    register()
    yield lambda seconds: (Rounds(grid, met.reception, Replies(grid), met.hosted.folder, seconds), met, register)
    met.close()


def test_who_is_too_late_is_asked_again_where_the_round_has_nobody_else(grid, rounds):
    loop, _, _ = rounds(0.01)
    loop.look()
    time.sleep(0.05)  # beyond the time of the message
    loop.look()
    loop.look()
    assert len(grid.sent) == 2


def test_who_had_nothing_to_hand_in_is_asked_again_when_the_time_of_the_round_is_over(grid, rounds):
    loop, met, _ = rounds(60.0)
    loop.look()
    grid._runtime_client.answer(grid.sent[0], refusal_content("not a single step"))
    for _ in range(3):
        loop.look()
    assert len(grid.sent) == 1
    met.clock.now = 61.0
    for _ in range(3):
        loop.look()
    assert len(grid.sent) == 2


def test_whose_key_was_taken_away_gets_no_share_and_is_not_heard(grid, rounds):
    loop, met, register = rounds(60.0)
    loop.look()
    register(is_out=True)
    grid._runtime_client.answer(grid.sent[0], update_content(PAYLOAD))
    loop.look()
    assert met.host._refused == {}
    met.clock.now = 61.0
    for _ in range(3):
        loop.look()
    assert len(grid.sent) == 1
    register(is_out=False)
    loop.look()
    assert len(grid.sent) == 2
