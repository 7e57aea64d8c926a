"""A volunteer's side, whatever carries the bytes: offers are judged before they are trained, and answered once.

What a member keeps lies in its folder: the run of its own training, and here

offer.json        run, member and round of the last offer, so that none is trained twice
update.safetensors   what it came to, until the next offer
tokenizer/        the run's
"""

import contextlib
import dataclasses
import hashlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fanformer.community.invitation import Invitation
from fanformer.community.member import Member, joined, member_config
from fanformer.community.offers import Offer, Sealed, open_offer
from fanformer.community.plan import Task
from fanformer.community.updates import decode_weights, is_name
from fanformer.data.prepared import open_prepared
from fanformer.data.sources.documents import is_prepared_folder
from fanformer.errors import ConfigError, DataError, DivergenceError
from fanformer.files.durable import read_json, replace_json, sync
from fanformer.model import FANformerConfig
from fanformer.training.configuration import preset_names
from fanformer.training.events import Listener, note_to
from fanformer.training.fields import RunConfig
from fanformer.training.run_model import ModelBuilder, build_fanformer

OFFER_FILE, UPDATE_FILE, TOKENIZER_FOLDER, TRAINING_FOLDER = (
    "offer.json", "update.safetensors", "tokenizer", "training",
)  # fmt: skip
_SECONDS_BETWEEN_SAVES = 600.0
_LEAST_SENDING, _MOST_SENDING, _SENDING_RESERVE = 0.1, 0.5, 1.25
"""Of a round's time that is kept for sending, at least and at most; and how much over what it took last."""


@dataclasses.dataclass(frozen=True)
class Own:
    """What a volunteer decides for itself.

    Attributes:
        data: its own text, a SPEC; None takes the run's, where that can be had here.
        licence: of its data, at most 200 printable characters.
        device: where to train.
        precision: as of a run.
        compile: as of a run.
    """

    data: str | None = None
    licence: str = "unknown"
    device: str = "auto"
    precision: str = "auto"
    compile: str = "auto"

    def __post_init__(self) -> None:
        if not is_name(self.licence):
            raise ConfigError(
                f"`--licence` must be 1 to 200 printable characters, got {self.licence!a:.80}: give its short name, as "
                "CC-BY-4.0."
            )


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a volunteer answers an offer with.

    Attributes:
        payload: the update, None where there is none.
        reason: why not; empty where there is one, or the run is over.
        final: whether the run is over.
    """

    payload: bytes | None = None
    reason: str = ""
    final: bool = False


class Volunteer:
    """Takes offers of one host, trains what is to be trained, and hands back updates; a context manager."""

    def __init__(self, invitation: Invitation, folder: Path, own: Own, listener: Listener) -> None:
        """Set up.

        Args:
            invitation: to the host.
            folder: of what the volunteer keeps, made if need be.
            own: what it decides for itself.
            listener: hears what happens.
        """
        self._invitation, self._folder, self._own, self._listener = invitation, folder, own, listener
        self._note = note_to(listener)
        self._stack = contextlib.ExitStack()
        self._member: Member | None = None
        self._plan: tuple[str, Any] | None = None
        self._saved = time.monotonic()
        self.rounds = self.tokens = 0
        self.sending_seconds = 0.0
        """What sending the last update took; whoever sends says so."""

    def __enter__(self) -> "Volunteer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """Save what the next round needs, unless something went wrong, and let go of the folder."""
        try:
            if kind is None or issubclass(kind, KeyboardInterrupt):
                self._save()
        finally:
            self._stack.close()

    def _save(self) -> None:
        """Save what the next round needs, where a round was trained."""
        if self._member is not None and self.rounds:
            self._saved = time.monotonic()
            self._member.save()

    @property
    def stopped_by(self) -> str | None:
        """Name of the signal that asked this process to stop while it trained, or None."""
        return None if self._member is None else self._member.stopped_by

    def answer(
        self,
        sealed: Sealed,
        base: bytes | None,
        age_seconds: float = 0.0,
        stop: Callable[[int], bool] = lambda steps: False,
    ) -> Answer:
        """Answer an offer; what is not the host's, or asks for what no host may ask, with why it is refused.

        Args:
            sealed: the offer as it came.
            base: the weights beside it.
            age_seconds: since it was sent.
            stop: is told how many steps of the share are done, and says whether to end there.

        Returns:
            The update; or why there is none, which the listener is told too.

        Raises:
            ConfigError, DataError, CheckpointError: if this machine cannot take part in the run.
        """
        arrived = time.monotonic()
        try:
            offer = open_offer(sealed, self._invitation)
            if offer.final:
                return Answer(final=True)
            if offer.task is None or base is None:
                raise DataError("the offer has no share of a round, or no weights to begin with: it was not trained.")
            done = self._done_before(offer, offer.task)
        except DataError as error:
            return self._refused(str(error))
        if done is not None:
            return Answer(done)
        member = self._opened(offer)
        task = offer.task
        began = time.monotonic()
        try:
            weights = decode_weights(base, member.shapes, task.base, member.base)
            if task.seconds is not None:
                spent = age_seconds + time.monotonic() - arrived
                task = dataclasses.replace(task, seconds=training_seconds(task.seconds, spent, self.sending_seconds))
            payload = member.take_part(task, weights, stop)
        except (DataError, DivergenceError) as error:
            return self._refused(f"round {task.round}: {error}")
        self._keep(offer, task, payload)
        steps = member.trainer.state.step - task.first_step
        self.rounds += 1
        self.tokens += steps * offer.plan.tokens_per_step
        self._note(
            f"round {task.round}: {steps * offer.plan.tokens_per_step:,} tokens in {time.monotonic() - began:.1f} s, "
            f"an update of {len(payload):,} bytes"
        )
        if time.monotonic() - self._saved >= _SECONDS_BETWEEN_SAVES:
            self._save()
        return Answer(payload)

    def _refused(self, reason: str) -> Answer:
        self._note(reason)
        return Answer(reason=" ".join(reason.split()))

    def _done_before(self, offer: Offer, task: Task) -> bytes | None:
        """Return what was answered to this round's offer before, None where it is new.

        Raises:
            ConfigError: if the folder is another run's.
            DataError: if the offer is of a round before the last one.
        """
        try:
            last = read_json(self._folder / OFFER_FILE)
            payload = (self._folder / UPDATE_FILE).read_bytes()
        except (OSError, ValueError):
            return None
        if last["run"] != offer.run:
            raise ConfigError(
                f"{self._folder.absolute()} is that of run {last['run']}, got an offer of run {offer.run}: join it "
                "with another --output-dir."
            )
        if (last["round"], last["base"]) == (task.round, task.base):
            if last.get("member") != offer.member:  # joined by another key: what was trained bears the other name
                return None
            is_whole = hashlib.sha256(payload).hexdigest() == last["sha256"]  # else it was killed between the files
            return payload if is_whole else None
        if task.round < last["round"]:
            raise DataError(
                f"the offer is of round {task.round}, and round {last['round']} was trained already: it is replayed; "
                f"it was not trained. Where the host went back to an older copy of its run, delete {OFFER_FILE} in "
                "--output-dir."
            )
        return None

    def _keep(self, offer: Offer, task: Task, payload: bytes) -> None:
        """Put an update on the disk, to be sent again if it gets lost."""
        place = self._folder / UPDATE_FILE
        aside = place.with_name(UPDATE_FILE + ".new")
        aside.write_bytes(payload)
        sync(aside)
        aside.replace(place)
        content = {
            "run": offer.run,
            "member": offer.member,
            "round": task.round,
            "base": task.base,
            "sha256": hashlib.sha256(payload).hexdigest(),
        }
        replace_json(self._folder / OFFER_FILE, content)

    def _opened(self, offer: Offer) -> Member:
        """Return the member of the offer's run, opened once."""
        key = (offer.run, offer.plan)
        if self._member is not None and self._plan == key:
            return self._member
        self._save()  # the host goes on with another plan
        self._stack.close()
        self._member = None
        self._folder.mkdir(parents=True, exist_ok=True)
        build = _builder(offer.configuration.get("model"))
        config = self._configuration(offer)
        member = joined(config, offer.plan, offer.member, self._listener, build, self._own.licence)
        self._member, self._plan = self._stack.enter_context(member), key
        return self._member

    def _configuration(self, offer: Offer) -> RunConfig:
        """Return the run of this member: the recipe is the host's, folder, data and machine are its own."""
        tokenizer = self._folder / TOKENIZER_FOLDER
        tokenizer.mkdir(exist_ok=True)
        for name, content in offer.files.items():
            if not (tokenizer / name).is_file() or (tokenizer / name).read_bytes() != content:
                (tokenizer / name).write_bytes(content)
        if offer.configuration.get("preset") not in preset_names():
            raise DataError(
                f"the run's preset {offer.configuration.get('preset')!a:.60} is none of this release's: host and "
                "members need the same one."
            )
        data = self._own.data or _public_data(str(offer.configuration.get("data")))
        fields = {
            **offer.configuration,
            "tokenizer": None if _has_tokenizer(data, offer.files) else str(tokenizer.absolute()),
            "vocab_size": None,
            "init_from": None,
            "data": data,
            "device": self._own.device,
            "precision": self._own.precision,
            "compile": self._own.compile,
            "output_dir": str(self._folder / TRAINING_FOLDER),
            "allow_changed_data": True,  # its data are the member's affair, also between two stays
            "push_to_hub": None,
            "sample_prompt": None,
        }
        return member_config(RunConfig.from_fields(fields), offer.plan)


def _builder(fields: Any) -> ModelBuilder:
    """Return what builds the very model of the run, whatever vocabulary would fit the tokenizer here.

    Args:
        fields: of the model, from the host: transformers would take the name of a kernel with code of its own among
            them.

    Raises:
        DataError: if one is no field of the model.
    """
    known = FANformerConfig.__dataclass_fields__
    unknown = sorted(name for name in fields if name not in known) if isinstance(fields, Mapping) else ["itself"]
    if unknown:
        raise DataError(
            f"the run's model has the field {unknown[0]!a:.60}, which a FANformer has not: host and members need the "
            "same release."
        )
    planned = FANformerConfig(**fields)
    sizes = {name: getattr(planned, name) for name in ("vocab_size", "max_position_embeddings")}
    return lambda filled: build_fanformer({**filled, **sizes})


def training_seconds(seconds: float, spent_seconds: float, sending_seconds: float) -> float:
    """Return how long a share may be trained so that its update arrives in time.

    Args:
        seconds: from the offer until the update is to be there.
        spent_seconds: of these, on the way and on making ready.
        sending_seconds: that sending took the last time, 0 where that is not known.
    """
    reserve = max(_LEAST_SENDING * seconds, min(_MOST_SENDING * seconds, _SENDING_RESERVE * sending_seconds))
    return max(0.0, seconds - spent_seconds - reserve)


def _has_tokenizer(data: str, files: Mapping[str, bytes]) -> bool:
    """Return whether data are prepared, with the run's tokenizer.

    Raises:
        ConfigError: if they are prepared with another one.
    """
    if not is_prepared_folder(data):
        return False
    theirs = open_prepared(Path(data)).metadata["tokenizer_files"].get("tokenizer.json")
    if theirs != hashlib.sha256(files.get("tokenizer.json", b"")).hexdigest():
        raise ConfigError(
            f"`--data` {data} was prepared with another tokenizer than the run's: give its text, or prepare it anew "
            f"with --tokenizer and the folder `{TOKENIZER_FOLDER}` in --output-dir."
        )
    return True


def _public_data(spec: str) -> str:
    """Return the run's data where everybody has them.

    Raises:
        DataError: if they are files of the host's machine: a path from a host would name a file of this one.
    """
    if spec == "stdlib" or spec.startswith("hf:"):
        return spec
    raise DataError(
        f"the run's data, {Path(spec).name!a:.80}, are files that only the host has: bring your own with --data."
    )
