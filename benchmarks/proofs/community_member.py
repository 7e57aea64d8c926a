"""A member of a community run that attacks, has a wrong clock, dies, or tells how long moving took. For the drill.

    python benchmarks/proofs/community_member.py [--attack nan] [--clock-seconds 3600] [--die-sending 3] [--tell-moving]
        -- ARGUMENTS

What follows `--` is what `fanformer community join` takes; attacks are those of quality/community_attacks.py.
"""

import argparse
import datetime
import itertools
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "quality"))

from community_attacks import ATTACKS, Attacker

from fanformer.cli.main import main as fanformer
from fanformer.community.flower import joining
from fanformer.community.offers import Sealed, open_offer
from fanformer.community.updates import fragments
from fanformer.community.volunteering import Answer, Volunteer


class Attacking(Volunteer):
    """A volunteer that trains its share and sends something else."""

    kind = "nan"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._attacker: Attacker | None = None

    def answer(self, sealed: Sealed, base: bytes | None, *arguments: Any) -> Answer:
        """Answer with what the attack makes of the honest update."""
        honest = super().answer(sealed, base, *arguments)
        if honest.payload is None:
            return honest
        offer, member = open_offer(sealed, self._invitation), self._member
        assert offer.task is not None, "it was trained"
        assert member is not None, "it was trained"
        if self._attacker is None:
            self._attacker = Attacker(self.kind, offer.plan.bits, seed=0)
        names = fragments(member.shapes, offer.plan.fragments)[offer.task.fragment]
        return Answer(self._attacker.send(offer.task, honest.payload, {name: member.shapes[name] for name in names}))


def shift_clock(seconds: float) -> None:
    """Let Flower's part of this process see another time, as on a machine whose clock is wrong."""
    from flwr.supernode import node_auth_http_interceptor as signing

    right = signing.now
    signing.now = lambda: right() + datetime.timedelta(seconds=seconds)


def die_sending(number: int) -> None:
    """Kill this process when the host knows that its update of this number comes, and nothing of it is there."""
    from fanformer.community.flower.node import Node

    announce, count = Node._announce, itertools.count(1)

    def announced(self: Node, reply: Any, tree: Any) -> Any:
        accepted = announce(self, reply, tree)
        if "update" in reply.content and next(count) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return accepted

    Node._announce = announced


def tell_moving() -> None:
    """Say after every update how long fetching its offer and sending it took, without training and waiting."""
    from fanformer.community.flower.node import Node

    fetch, send, fetching = Node._fetch, Node._send, 0.0

    def fetched(self: Node, head: Any, tree: Any) -> Any:
        nonlocal fetching
        began = time.monotonic()
        message = fetch(self, head, tree)
        fetching = time.monotonic() - began
        return message

    def sent(self: Node, message: Any, content: Any) -> None:
        began = time.monotonic()
        send(self, message, content)
        if "update" in content:
            print(f"moved in {fetching + time.monotonic() - began:.2f} s", flush=True)

    Node._fetch, Node._send = fetched, sent


def main() -> int:
    """Join as asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--attack", choices=ATTACKS)
    parser.add_argument("--clock-seconds", type=float)
    parser.add_argument("--die-sending", type=int, metavar="N", help="with the Nth update")
    parser.add_argument("--tell-moving", action="store_true", help="say how long moving a round's bytes took")
    parser.add_argument("arguments", nargs="+")
    asked = parser.parse_args()
    if asked.attack is not None:
        Attacking.kind = asked.attack
        joining.Volunteer = Attacking
    if asked.clock_seconds is not None:
        shift_clock(asked.clock_seconds)
    if asked.die_sending is not None:
        die_sending(asked.die_sending)
    if asked.tell_moving:
        tell_moving()
    return fanformer(["community", "join", *asked.arguments])


if __name__ == "__main__":
    sys.exit(main())
