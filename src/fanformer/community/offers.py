"""What a host offers a member: a share of a round, all that it needs to train it, and the host's signature.

An offer is JSON that the run's Ed25519 key signed, beside files whose SHA-256 the JSON names, and the weights whose
checksum it names. A member reads nothing of it before the signature holds, takes no path, no code and no setting of its
machine from it, and takes no round twice. No transport is in here.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fanformer.community.identity import PublicKey, SigningKey
from fanformer.community.invitation import Invitation, key_fingerprint
from fanformer.community.plan import Plan, Task
from fanformer.errors import DataError
from fanformer.training.fields import FIELDS, MachineConfig, OutputConfig, RunConfig, SavingConfig, TowersConfig

FORMAT_VERSION = 1
LARGEST_FILES = 64 << 20
"""Bytes of an offer's files, the tokenizer's, together."""
_OF_THE_MEMBER = {
    *OutputConfig.__dataclass_fields__,
    *MachineConfig.__dataclass_fields__,
    *SavingConfig.__dataclass_fields__,
    *TowersConfig.__dataclass_fields__,
    "objective",
    "tokenizer",
    "init_from",
    "eval_data",
    "log_steps",
    "max_time",
    "grace_seconds",
}
"""Fields of a run that a member never takes from a host: its folders, its machine, where text goes; what is learnt is
text."""
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True)
class Offer:
    """A share of a round.

    Attributes:
        run: identifier of the run.
        member: name that the host knows the member by.
        task: what is to be done.
        plan: of the run.
        configuration: fields of the run's `RunConfig` that a member shares.
        files: the tokenizer, content by name.
        final: that the run is over, and nothing is to be done.
    """

    run: str
    member: str
    task: Task | None
    plan: Plan
    configuration: Mapping[str, Any]
    files: Mapping[str, bytes]
    final: bool = False


@dataclass(frozen=True)
class Sealed:
    """An offer as it travels.

    Attributes:
        text: JSON, all but the bytes of the files.
        signature: of the text, by the run's key.
        public_key: that key, as PEM.
        files: content by name.
    """

    text: str
    signature: str
    public_key: str
    files: Mapping[str, bytes]


def shared_configuration(config: RunConfig) -> dict[str, Any]:
    """Return the fields of a run that its members share."""
    return {name: value for name, value in config.to_dict().items() if name not in _OF_THE_MEMBER}


def tokenizer_files(skeleton: Mapping[str, bytes]) -> dict[str, bytes]:
    """Return the files of a model folder that a tokenizer is made of; none of them is code."""
    return {name: skeleton[name] for name in _TOKENIZER_FILES if name in skeleton}


def seal(offer: Offer, key: SigningKey) -> Sealed:
    """Sign an offer."""
    content = {
        "format_version": FORMAT_VERSION,
        "run": offer.run,
        "member": offer.member,
        "task": None if offer.task is None else dataclasses.asdict(offer.task),
        "plan": offer.plan.to_dict(),
        "configuration": dict(offer.configuration),
        "files": {name: hashlib.sha256(body).hexdigest() for name, body in offer.files.items()},
        "final": offer.final,
    }
    text = json.dumps(content, separators=(",", ":"))
    return Sealed(text, key.sign(text.encode()), key.public_text(), offer.files)


def open_offer(sealed: Sealed, invitation: Invitation) -> Offer:
    """Return the offer, once it is known to be from the host of the invitation.

    Raises:
        DataError: if key, signature, format or a file is not as it must be; one line that says which.
    """
    if key_fingerprint(sealed.public_key) != invitation.key:
        raise DataError(
            f"the offer's key must be that of the invitation, {invitation.key}, got "
            f"{key_fingerprint(sealed.public_key)}: the round is forged, or the invitation is to another run."
        )
    if not PublicKey(sealed.public_key, "the offer").has_signed(sealed.text.encode(), sealed.signature):
        raise DataError("the offer's signature is not that of the run's key: the round is forged; it was not trained.")
    try:
        content = json.loads(sealed.text)
        if content["format_version"] != FORMAT_VERSION:
            raise DataError(
                f"the offer has format version {content['format_version']}, expected {FORMAT_VERSION}: host and "
                "members need the same release of fanformer."
            )
        digests = content["files"]
        task = None if content["task"] is None else Task(**content["task"])
        offer = Offer(
            content["run"], content["member"], task, Plan.from_dict(content["plan"]), content["configuration"],
            dict(sealed.files), content["final"],
        )  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"the offer cannot be read ({error}): host and members need the same release.") from error
    _check_files(offer.files, digests)
    refused = sorted(name for name in offer.configuration if name in _OF_THE_MEMBER or name not in FIELDS)
    if refused:
        raise DataError(
            f"the offer sets `{refused[0]}`, which a host does not decide for a member: it was not trained."
        )
    return offer


def _check_files(files: Mapping[str, bytes], digests: Mapping[str, str]) -> None:
    if files.keys() != digests.keys() or not files.keys() <= set(_TOKENIZER_FILES):
        got = ", ".join(sorted(files))[:200]
        raise DataError(f"the offer's files must be of {', '.join(_TOKENIZER_FILES)} and those it names, got {got}.")
    if sum(map(len, files.values())) > LARGEST_FILES:
        raise DataError(f"the offer's files must be at most {LARGEST_FILES:,} bytes together, got more.")
    for name, content in files.items():
        if hashlib.sha256(content).hexdigest() != digests[name]:
            raise DataError(f"the offer's {name} is not the one that was signed: it was changed on its way.")
