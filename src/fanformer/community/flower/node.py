"""A volunteer's end of Flower: the connection of a registered node, without the part that runs a host's code.

Flower's own node fetches an app from its SuperLink and starts it in a process for every message. This one uses the same
connection (TLS, a signature on every call, heartbeats, patience with a broken link), never asks for an app, and hands
the messages to the fanformer that the volunteer installed.
"""

import contextlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from fanformer.community.flower.content import flower, read_offer, refusal_content, update_content
from fanformer.community.invitation import Invitation, UnreachableError, unreachable
from fanformer.community.offers import Sealed
from fanformer.community.volunteering import Answer
from fanformer.errors import ConfigError, DataError, FANformerError
from fanformer.files.durable import read_json, replace_json

INBOX_FILE, NODE_FILE = "message.json", "node.json"
_PATIENCE_SECONDS = 60.0
"""How long a call tries to get through before the caller is told that the link is down."""
_KEPT_BYTES = 8 << 20
"""Objects of a message up to this size are kept, as the next message has the same: the tokenizer, above all."""
_LONGEST_WAIT_SECONDS = 10.0
_PIECE_SECONDS = 0.2
"""Between two looks for an object of a message that was announced, and is not there yet."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Arrived:
    """A message of the host.

    Attributes:
        message: Flower's, to be answered.
        sealed: the offer in it, unopened.
        base: the weights beside it.
        age_seconds: since it was sent, by the clocks of both machines.
    """

    message: Any
    sealed: Sealed
    base: bytes | None
    age_seconds: float


class Node:
    """A connection to a host; made by `connected`."""

    def __init__(self, client: Any, number: int, invitation: Invitation, folder: Path) -> None:
        """Set up.

        Args:
            client: Flower's, of its calls for nodes.
            number: that Flower gave the member's key.
            invitation: to the host.
            folder: of the volunteer, for the message that is in work.
        """
        self._client, self._invitation, self._inbox = client, invitation, folder / INBOX_FILE
        self._self = flower("proto.node_pb2").Node(node_id=number)
        self._kept: dict[str, bytes] = {}

    def receive(self) -> Arrived | None:
        """Return the newest message of the host, None where there is none; older ones are answered as overtaken.

        The message that was in work when an earlier process ended comes again, unless there is a newer one.

        Raises:
            UnreachableError: if the host does not answer.
            DataError: if the message is none of a community run, or was gone before it was read.
        """
        newest = self._remembered()
        while (got := self._next()) is not None:
            if newest is not None:
                self._send(newest[0], refusal_content("a newer offer came before this one was answered"))
            newest = got
        if newest is None:
            return None
        self._remember(*newest)
        try:
            message = self._fetch(*newest)
            sealed, base = read_offer(message.content)
        except DataError:
            self._forget()
            raise
        return Arrived(message, sealed, base, max(0.0, time.time() - message.metadata.created_at))

    def answer(self, arrived: Arrived, answer: Answer) -> None:
        """Send what a message is answered with; what the host does not want any more is dropped.

        Raises:
            UnreachableError: if the host does not answer; it may be sent again.
        """
        told = refusal_content(answer.reason or "heard") if answer.payload is None else update_content(answer.payload)
        self._send(arrived.message, told)

    def _next(self) -> tuple[Any, Any] | None:
        """Return head and object tree of a message that waits, or None."""
        request = flower("proto.fleet_pb2").PullMessagesRequest(node=self._self)
        found = self._through(self._client.PullMessages, request)
        if not found.messages_list:
            return None
        return flower("common.serde").message_from_proto(found.messages_list[0]), found.message_object_trees[0]

    def _fetch(self, head: Any, tree: Any) -> Any:
        """Return a whole message, of which Flower has told the head and the objects that it is made of."""
        utils = flower("supercore.inflatable.inflatable_utils")
        objects = flower("supercore.inflatable.inflatable_object")
        run, number = head.metadata.run_id, head.metadata.message_id
        request = flower("proto.message_pb2").PullObjectRequest
        contents: dict[str, bytes] = {}
        for one in [one.object_id for one in objects.iterate_object_tree(tree)]:
            if one in self._kept:
                contents[one] = self._kept[one]
                continue
            contents[one] = self._pull(request(node=self._self, run_id=run, object_id=one))
        self._kept = {one: body for one, body in contents.items() if len(body) <= _KEPT_BYTES}
        message = utils.inflate_object_from_contents(number, dict(contents))
        message.metadata.__dict__["_message_id"] = number
        return message

    def _pull(self, request: Any) -> bytes:
        """Return an object of a message; the host announces a message before all of its objects are there."""
        until = time.monotonic() + _PATIENCE_SECONDS
        while not (found := self._through(self._client.PullObject, request)).object_available:
            if not found.object_found or time.monotonic() >= until:
                raise DataError("a message of the host was gone before it was read: the next one will come.")
            time.sleep(_PIECE_SECONDS)
        return bytes(found.object_content)

    def _send(self, message: Any, content: Any) -> None:
        """Answer a message; only then may the host forget what it is made of."""
        objects, kinds = flower("supercore.inflatable.inflatable_object"), flower("proto.message_pb2")
        run, number = message.metadata.run_id, message.metadata.message_id
        reply = flower("app").Message(content, reply_to=message)
        try:
            confirmed = kinds.ConfirmMessageReceivedRequest(node=self._self, run_id=run, message_object_id=number)
            self._through(self._client.ConfirmMessageReceived, confirmed)
            with objects.no_object_id_recompute():
                reply.metadata.__dict__["_message_id"] = reply.object_id
                tree, parts = objects.get_object_tree(reply), objects.get_all_nested_objects(reply)
                accepted = self._announce(reply, tree)
                for one in accepted.objects_to_push:
                    pushed = kinds.PushObjectRequest(
                        node=self._self, run_id=run, object_id=one, object_content=parts[one].deflate(),
                        session_id=accepted.session_id,
                    )  # fmt: skip
                    self._through(self._client.PushObject, pushed)
        except DataError as error:
            if isinstance(error, UnreachableError):
                raise
            _log.info("the host does not want an answer any more: %s", error)
        self._forget()

    def _announce(self, reply: Any, tree: Any) -> Any:
        """Tell the host that an answer comes, and return which of its objects it wants."""
        head = flower("app.message").remove_content_from_message(reply)
        request = flower("proto.fleet_pb2").PushMessagesRequest(
            node=self._self,
            messages_list=[flower("common.serde").message_to_proto(head)],
            message_object_trees=[tree],
        )
        return self._through(self._client.PushMessages, request)

    def _through(self, call: Callable[[Any], Any], request: Any) -> Any:
        return through(self._invitation, call, request)

    def _remember(self, head: Any, tree: Any) -> None:
        """Write down which message is in work; its objects stay with the host until it is answered."""
        aside = self._inbox.with_name(INBOX_FILE + ".new")
        words = [flower("common.serde").message_to_proto(head).SerializeToString(), tree.SerializeToString()]
        aside.write_text(json.dumps([word.hex() for word in words]), encoding="ascii")
        aside.replace(self._inbox)

    def _remembered(self) -> tuple[Any, Any] | None:
        try:
            head, tree = (bytes.fromhex(word) for word in read_json(self._inbox))
        except (OSError, ValueError):
            return None
        kinds = flower("proto.message_pb2")
        message = flower("common.serde").message_from_proto(kinds.Message.FromString(head))
        return message, kinds.ObjectTree.FromString(tree)

    def _forget(self) -> None:
        self._inbox.unlink(missing_ok=True)


def through(invitation: Invitation, call: Callable[[Any], Any], request: Any) -> Any:
    """Return what a call of Flower's returns, tried again for a while where the link is broken.

    Raises:
        UnreachableError: if it does not get through.
        ConfigError: if the host refuses this member, or its clock.
        DataError: if the host wants no more of what the call is about.
    """
    httpx = flower("supercore.protobuf.client").httpx
    until, wait = time.monotonic() + _PATIENCE_SECONDS, 0.5
    while True:
        try:
            return call(request)
        except httpx.HTTPStatusError as error:
            status = error.response.status_code
            if status < 500 and status != httpx.codes.TOO_MANY_REQUESTS:
                raise _refused(invitation, error.response) from error
            reason: Exception = error
        except httpx.TransportError as error:
            reason = error
        if time.monotonic() + wait >= until:
            raise unreachable(invitation, reason) from reason
        time.sleep(wait)
        wait = min(2 * wait, _LONGEST_WAIT_SECONDS)


def _refused(invitation: Invitation, response: Any) -> FANformerError:
    """Return the error for a call that the host refused."""
    known = flower("supercore.error").FlowerError.from_json(response.text)
    reason = ascii(" ".join(known.message.split()))[1:-1] if known is not None else f"status {response.status_code}"
    date = response.headers.get("date")
    if response.status_code == 401 and not _agrees(date):
        return ConfigError(
            f"{invitation.address} does not accept this machine's signature, and says that it is {date}: set this "
            "machine's clock."
        )
    if response.status_code == 401 or response.url.path.endswith("/activate-node"):
        return ConfigError(
            f"{invitation.address} does not know `--key`, or another process joined with it: have the host put its "
            f".pub file into its folder of members ({reason})."
        )
    return DataError(f"{invitation.address} refuses {response.url.path}: {reason}.")


def _agrees(date: str | None) -> bool:
    """Return whether the clock that signs calls tells the same time as a host's date, to within what Flower takes."""
    known = flower("common.constant")
    try:
        ahead = (
            flower("supernode.node_auth_http_interceptor").now() - parsedate_to_datetime(date or "")
        ).total_seconds()
    except (TypeError, ValueError):
        return False
    return bool(-known.TIMESTAMP_TOLERANCE < ahead < known.SYSTEM_TIME_TOLERANCE)


@contextmanager
def connected(invitation: Invitation, certificate: Path, key: Any, folder: Path) -> Iterator[Node]:
    """Connect a registered node to its host, and say good-bye after the block.

    Args:
        invitation: to the host.
        certificate: file of the host's certificate.
        key: the member's private key.
        folder: of the volunteer.

    Raises:
        ConfigError: if the host does not know the key, or this machine's clock is wrong.
        UnreachableError: if the host does not answer.
    """
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    logging.getLogger("flwr").setLevel(logging.CRITICAL)
    calls, public = flower("proto.fleet_pb2"), key.public_key()
    interceptors = [
        flower("supercore.interceptors.http.runtime_version").RuntimeVersionHttpInterceptor(component_name="SuperNode"),
        flower("supernode.node_auth_http_interceptor").NodeAuthHttpInterceptor(key, public),
    ]
    opened = flower("supernode.fleet_http_client").FleetHttpClient.from_server_address(
        invitation.address, False, str(certificate), interceptors
    )
    with opened as client:
        request = calls.ActivateNodeRequest(
            public_key=flower("supercore.primitives.asymmetric").public_key_to_bytes(public),
            heartbeat_interval=flower("common.constant").HEARTBEAT_DEFAULT_INTERVAL,
        )
        _leave_behind(client, folder / NODE_FILE)
        number = through(invitation, client.ActivateNode, request).node_id
        replace_json(folder / NODE_FILE, number)
        sender = flower("supercore.heartbeat").HeartbeatSender(lambda: _beat(client, number))
        sender.start()
        try:
            yield Node(client, number, invitation, folder)
        finally:
            sender.stop()
            with contextlib.suppress(Exception):  # a good-bye that gets lost is no loss: heartbeats end too
                client.DeactivateNode(calls.DeactivateNodeRequest(node_id=number))


def _leave_behind(client: Any, place: Path) -> None:
    """Say good-bye for an earlier process that was killed: Flower takes nobody in whom it believes to be there."""
    with contextlib.suppress(Exception):  # there is none, or its host is another one
        client.DeactivateNode(flower("proto.fleet_pb2").DeactivateNodeRequest(node_id=int(read_json(place))))


def _beat(client: Any, number: int) -> bool:
    """Tell the host that this node is there; return whether it heard it."""
    interval = flower("common.constant").HEARTBEAT_DEFAULT_INTERVAL
    node = flower("proto.node_pb2").Node(node_id=number)
    request = flower("proto.heartbeat_pb2").SendNodeHeartbeatRequest(node=node, heartbeat_interval=interval)
    httpx = flower("supercore.protobuf.client").httpx
    try:
        return bool(client.SendNodeHeartbeat(request).success)
    except (httpx.HTTPError, ValueError):
        return False
