"""What members answer, taken out of Flower as it comes: nobody waits for a reply that is still on its way.

Flower's own way to take replies waits for every piece of each, for minutes where a member was cut off while it sent,
and ends the process where one was not made as it is to be. Here what is not whole yet is looked at again the next time,
and what cannot be read is told apart.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from fanformer.community.flower.content import flower

_MOST_PIECES = 4096
"""Of a reply; Flower divides arrays into pieces of 20 MB."""


@dataclass(frozen=True)
class Reply:
    """What became of a message.

    Attributes:
        message: identifier of the one that was answered.
        content: of the answer, None where there is none.
        problem: why there is none.
        is_lost: whether the message or its answer got lost, so that another one is worth while.
    """

    message: str
    content: Any = None
    problem: str = ""
    is_lost: bool = False


@dataclass
class _Arriving:
    """A reply of which not all pieces are here."""

    identifier: str
    missing: list[str]
    contents: dict[str, bytes] = field(default_factory=dict)


class Replies:
    """Takes the replies to a host's messages."""

    def __init__(self, grid: Any) -> None:
        """Set up.

        Args:
            grid: Flower's way to the members.
        """
        self._client, self._self, self._run = grid._runtime_client, grid.node, grid.run.run_id
        self._arriving: dict[str, _Arriving] = {}

    def is_arriving(self, message: str) -> bool:
        """Return whether a reply was announced, of which not all is here."""
        return message in self._arriving

    def take(self, asked: Collection[str]) -> list[Reply]:
        """Return the replies that are whole now, each once, without waiting for others.

        Args:
            asked: identifiers of messages; answers to others are left out.
        """
        for message in self._arriving.keys() - set(asked):
            del self._arriving[message]
        self._hear([message for message in asked if message not in self._arriving])
        found = []
        for message, arriving in list(self._arriving.items()):
            reply = self._look(message, arriving)
            if reply is not None:
                del self._arriving[message]
                found.append(reply)
        return found

    def _hear(self, waiting: list[str]) -> None:
        """Note what was announced since the last time."""
        if not waiting:
            return
        request = flower("proto.runtime_pb2").PullAppMessagesRequest(message_ids=waiting)
        announced = self._client.PullMessages(request)
        walk = flower("supercore.inflatable.inflatable_object").iterate_object_tree
        for head, tree in zip(announced.messages_list, announced.message_object_trees, strict=True):
            message = head.metadata.reply_to_message_id
            if message in waiting:
                pieces = dict.fromkeys(one.object_id for one in walk(tree))
                self._arriving[message] = _Arriving(head.metadata.message_id, list(pieces))

    def _look(self, message: str, arriving: _Arriving) -> Reply | None:
        """Take the pieces that are there, and return the reply where it is whole, or will never be."""
        if len(arriving.missing) > _MOST_PIECES:
            return Reply(message, problem=f"a reply must have at most {_MOST_PIECES} pieces")
        kinds = flower("proto.message_pb2")
        while arriving.missing:
            asked = kinds.PullObjectRequest(node=self._self, run_id=self._run, object_id=arriving.missing[-1])
            found = self._client.PullObject(asked)
            if not found.object_found:
                return Reply(message, problem="it was cut off while it sent", is_lost=True)
            if not found.object_available:
                return None
            arriving.contents[arriving.missing.pop()] = found.object_content
        confirmed = kinds.ConfirmMessageReceivedRequest(
            node=self._self, run_id=self._run, message_object_id=arriving.identifier
        )
        self._client.ConfirmMessageReceived(confirmed)
        return _read(message, arriving)


def _read(message: str, arriving: _Arriving) -> Reply:
    """Return the reply that pieces are of; whatever is wrong with them, a stranger made them."""
    inflate = flower("supercore.inflatable.inflatable_utils").inflate_object_from_contents
    try:
        made = inflate(arriving.identifier, arriving.contents)
        if not made.has_error():
            return Reply(message, made.content)
        return Reply(message, problem=f"no reply ({ascii(str(made.error.reason))[:200]})", is_lost=True)
    except Exception as error:  # of Flower's readers, which have no common one
        return Reply(message, problem=f"a reply must be a message of Flower, got none ({type(error).__name__}).")
