"""Whether a story is English, by link-grammar (Debian's package `link-grammar`), the parser of the AbiWord project.

A sentence is grammatical where a complete linkage of all its words costs little; a story passes where a quarter of its
sentences are: of 173 stories by people, old tales among them, 95.4% pass, and 13.3% with their words shuffled. The two
limits are the strictest with which 95% do, on `check.py --only grammar`.
"""

import itertools
import random
import re
import shutil
import subprocess
from collections.abc import Sequence

from fanformer.errors import DependencyError

LARGEST_COST = 10.0
"""Cost of a linkage's disjuncts above which a sentence does not count as grammatical."""
LEAST_SHARE = 0.25
"""Share of a story's sentences that must be grammatical."""
_SENTENCE = re.compile(r"[^.!?]+[.!?]+[\"”']?")
_COMPLETE = re.compile(r"UNUSED=0 DIS=\s*(-?[\d.]+)")


def sentences(text: str) -> list[str]:
    """Return the whole sentences of a text, quotation marks left out, which a parser cannot pair across sentences."""
    plain = " ".join(text.replace("“", '"').replace("”", '"').replace("\u2019", "'").replace('"', " ").split())
    return [found.strip(" ,") for found in _SENTENCE.findall(plain) if re.search(r"[A-Za-z]", found)]


def costs(lines: Sequence[str]) -> list[float | None]:
    """Return for each sentence the cost of its cheapest complete linkage, None where it has none.

    Raises:
        DependencyError: if link-grammar is not installed.
    """
    if shutil.which("link-parser") is None:
        raise DependencyError("link-parser is needed to judge grammar: install Debian's package link-grammar.")
    command = ["link-parser", "en", "-null=0", "-timeout=10", "-graphics=0", "-spell=0", "-limit=100", "-echo=1"]
    answer = subprocess.run(command, input="\n".join(lines) + "\n", capture_output=True, text=True, check=True).stdout
    found: list[float | None] = []
    for line in answer.split("\n"):
        if len(found) < len(lines) and line.strip() == lines[len(found)]:
            found.append(None)
        elif found and found[-1] is None and (cost := _COMPLETE.search(line)):
            found[-1] = float(cost[1])
    if len(found) != len(lines):
        raise RuntimeError(f"link-parser answered {len(found)} of {len(lines)} sentences.")
    return found


def shuffled(text: str, seed: int) -> str:
    """Return a text with the words of each sentence in another order, its first letter large."""
    draw = random.Random(seed)
    made = []
    for sentence in sentences(text):
        words = sentence.rstrip(".!?").split()
        words[0] = words[0][:1].lower() + words[0][1:]
        draw.shuffle(words)
        mixed = " ".join(words)
        made.append(f"{mixed[:1].upper()}{mixed[1:]}.")  # the other letters stay: names and `I` are no mistakes
    return " ".join(made)


def share_grammatical(texts: Sequence[str]) -> list[float]:
    """Return for each text the share of its sentences that are grammatical; 0 where it has none."""
    split = [sentences(text) for text in texts]
    found = iter(costs([sentence for part in split for sentence in part]))
    good = [
        [cost is not None and cost <= LARGEST_COST for cost in itertools.islice(found, len(part))] for part in split
    ]
    return [sum(part) / len(part) if part else 0.0 for part in good]


def passes(texts: Sequence[str]) -> list[bool]:
    """Return for each text whether it is English enough."""
    return [share >= LEAST_SHARE for share in share_grammatical(texts)]
