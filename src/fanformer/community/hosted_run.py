"""A run in rounds on the host's disk: begun, gone on with, and every accepted round signed; its files: `folder.py`."""

import dataclasses
import re
import secrets
import statistics
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fanformer.community.folder import KEYS_FOLDER
from fanformer.community.hosting import first_state, last_state, measure_of, publisher
from fanformer.community.identity import ensure_host_identity, read_signing_key
from fanformer.community.member import member_config
from fanformer.community.offers import shared_configuration, tokenizer_files
from fanformer.community.plan import Plan
from fanformer.community.records import RoundLog, RoundRecord, as_record, contributions
from fanformer.community.release import ROUND_FILE, digest_of, sign_folder
from fanformer.community.rounds import STATE_FILE, Host, HostState
from fanformer.community.updates import fragments, shapes_of
from fanformer.errors import CheckpointError, ConfigError
from fanformer.files.durable import read_json, replace_json, replace_text
from fanformer.training.checkpoint import checkpoint_name, newest_intact
from fanformer.training.checkpoint import publish as publish_model
from fanformer.training.configuration import OF_ONE_COMMAND
from fanformer.training.events import Listener, note_to
from fanformer.training.fields import LENGTHS, RunConfig
from fanformer.training.folder import (
    ROUNDS_FILE,
    RUN_FILE,
    RecordFile,
    fingerprint,
    read_records,
    read_run_file,
)
from fanformer.training.publishing import CARD_FILE, model_card, plot_loss
from fanformer.training.run import Run
from fanformer.training.run import opened as opened_run
from fanformer.training.state import model_tensors

FORMAT_VERSION = 1
_OF_THE_FOLDER = ("architectures", "auto_map", "dtype", "model_type", "transformers_version")
"""What a model's configuration holds besides the fields that a model is built from."""
_WITHOUT_EFFECT = {
    "--rounds and --round-steps are its length": LENGTHS,
    "every accepted round is a checkpoint, of which --keep-last are kept": (
        "save_steps", "keep_best", "background_save",
    ),
    "it is measured after every round, on `eval_tokens`": ("eval_steps", "final_eval_tokens", "log_steps"),
    "the same command goes on with what its folder holds, and --output-dir names another": OF_ONE_COMMAND,
    "send a round's folder with `hf upload`": ("push_to_hub",),
}  # fmt: skip
"""Fields of a training that a run in rounds has no use for, by what is there in their place."""
_MAY_CHANGE = frozenset(("round_seconds", "min_reports", "gate_tolerance"))
"""Fields of a plan by which a host waits and judges: what was trained before them stays as good as it was."""
_MARKUP = re.compile(r"[\\`*\[\]<>|]")


class HostedRun:
    """A run's folder, open and held, with the model that its rounds are measured with."""

    def __init__(self, run: Run, plan: Plan, identifier: str, keep_last: int) -> None:
        """Set up.

        Args:
            run: opened, of a member's configuration.
            plan: of its rounds.
            identifier: of the run.
            keep_last: rounds to keep.
        """
        self.plan, self.identifier, self.folder = plan, identifier, run.folder
        self.config, self.parameters = run.config, int(run.content["parameters"])
        self.key = read_signing_key(run.folder / KEYS_FOLDER)
        self.shared = shared_configuration(run.config) | {"model": _model_fields(run)}
        self.tokenizer_files = tokenizer_files(run.skeleton)
        self.measure = measure_of(run, run.config.evaluation.eval_tokens)
        self._run = run
        self._accepting: dict[str, float] = {}
        """Figures of the round that is being written."""
        self._write_round = publisher(run, run.folder, plan, keep_last, also=self._sign)

    def open_host(self, now: float, listener: Listener) -> Host:
        """Return the rounds, which go on from the newest one whose every byte is as it was written.

        Args:
            now: of the clock that the host's methods are given.
            listener: hears what was found.
        """
        note = note_to(listener)
        state = last_state(self.folder, note)
        if state is None:
            accepted = [one for one in RoundLog(self.folder).records if one.accepted]
            if accepted:
                raise CheckpointError(
                    f"{self.folder.absolute()} has no intact round any more, {len(accepted):,} were accepted: bring "
                    "one back from a copy of the folder, or begin anew with another --output-dir."
                )
            return Host(self.folder, self.plan, first_state(self._run), now)
        newest = newest_intact(self.folder, note)
        assert newest is not None, "its state was read"
        publish_model(newest, self.folder)  # which a kill may have left half done
        if state.record is not None and all(one["step"] < state.number for one in read_records(self.folder)):
            RecordFile(self.folder).append(self._figures(state, state.record))
        return Host(self.folder, self.plan, state, now)

    def publish(self, state: HostState, record: RoundRecord) -> None:
        """Make an accepted round durable, signed, and the model of the run's folder; whole or not at all.

        Raises:
            CheckpointError: if the disk is full; the rounds before are untouched.
        """
        self._accepting = figures = self._figures(state, record)
        self._write_round(state, record)
        publish_model(self.folder / checkpoint_name(state.number), self.folder)
        RecordFile(self.folder).append(figures)

    def _figures(self, state: HostState, record: RoundRecord) -> dict[str, float]:
        """Return what metrics.jsonl and the card hold of a round."""
        counted = [one for one in record.verdicts if one.counted and one.inner_loss is not None]
        accepted = [one for one in RoundLog(self.folder).records if one.accepted and one.number < state.number]
        figures: dict[str, float] = {
            "step": state.number,
            "tokens": record.tokens + sum(one.tokens for one in accepted),
        }
        if record.held_out_loss is not None:
            figures["val_loss"] = record.held_out_loss
        if counted:
            figures["loss"] = statistics.median(float(one.inner_loss or 0.0) for one in counted)  # each says its own
        return figures

    def _sign(self, folder: Path) -> None:
        """Write a card that says who contributed, and sign all other files."""
        content = read_json(folder / STATE_FILE)
        number, record = int(content["number"]), content["record"]
        previous = self.folder / checkpoint_name(number - 1)
        figures = {**self._accepting, "step": number * self.plan.round_steps}
        finished = number >= self.plan.rounds
        card = model_card(self._run.content, figures, self._run.corpus.held_out_sizes, finished)
        records = [*RoundLog(self.folder).records, as_record(record)]
        replace_text(folder / CARD_FILE, card + _credits(records))
        about = {
            "run": self.identifier,
            "number": number,
            "previous": digest_of(previous) if (previous / ROUND_FILE).is_file() else None,
            "record": record,
        }
        sign_folder(folder, self.key, about)

    def finish(self) -> None:
        """Draw the curve of the whole run."""
        plot_loss(self.folder, self._run.content)


def _model_fields(run: Run) -> dict[str, Any]:
    """Return the fields that a member builds the run's model from.

    Raises:
        ConfigError: if it is no FANformer.
    """
    content = run.content["model"]
    if content["model_type"] != "fanformer":
        raise ConfigError(
            f"a community run trains a FANformer, got a {content['model_type']}: take another --init-from."
        )
    return {name: value for name, value in content.items() if name not in _OF_THE_FOLDER}


def _credits(records: list[RoundRecord]) -> str:
    """Return who contributed, as a section of a model card."""
    rows = []
    for name, found in sorted(contributions(records).items()):
        told = {_MARKUP.sub(r"\\\g<0>", source): tokens for source, tokens in found["sources"].items()}
        sources = ", ".join(f"{source}: {tokens:,}" for source, tokens in told.items())
        rows.append(f"| {name} | {found['tokens']:,} | {found['rounds']:,} | {found['refused']:,} | {sources} |")
    head = "| member | tokens that counted | rounds | refused | data (licence): tokens |\n|---|---:|---:|---:|---|\n"
    return f"\n## Trained together by\n\n{head}" + "\n".join(rows) + "\n"


def refuse_without_effect(fields: Collection[str]) -> None:
    """Refuse fields of a training that say nothing of a run in rounds.

    Args:
        fields: that the user names.

    Raises:
        ConfigError: for the first of them, with what is there in its place.
    """
    for instead, names in _WITHOUT_EFFECT.items():
        for name in fields:
            if name in names:
                raise ConfigError(f"`{name}` has no effect on a community run: {instead}; leave it out.")


@contextmanager
def begun(config: RunConfig, plan: Plan, addresses: list[str], listener: Listener) -> Iterator[HostedRun]:
    """Begin a run, or go on with the one in the folder, and hold the folder during the block.

    Args:
        config: recipe of the run, its folder and the rounds to keep.
        plan: of its rounds; `data_fingerprint` is filled in.
        addresses: that members dial, for the certificate.
        listener: hears what happens.

    Raises:
        CheckpointError: if the folder holds a run of another recipe or plan, or is in use.
        ConfigError, DataError: on bad input; a folder that was not there is not there afterwards.
    """
    if config.corpus.objective != "text":
        raise ConfigError(f"`objective` of a community run must be text, got {config.corpus.objective}: leave it out.")
    if config.init_from is not None and Path(config.init_from).exists():  # what keeps the rounds works in another place
        config = config.replace(init_from=str(Path(config.init_from).absolute()))
    whole = member_config(config, plan)
    folder = config.folder
    identifier = secrets.token_hex(8)
    is_new = not (folder / RUN_FILE).is_file()
    if not is_new:
        content = read_community(folder)
        _check_same(folder, content, whole, plan)
        identifier = str(content["run"])
    with opened_run(whole, listener) as run:
        plan = dataclasses.replace(plan, data_fingerprint=run.corpus.fingerprint)
        content = {
            "format_version": FORMAT_VERSION,
            "run": identifier,
            "plan": plan.to_dict(),
            "keep_last": config.saving.keep_last,
        }
        try:
            fragments(shapes_of(model_tensors(run.model)), plan.fragments)  # refuses more than the model has
            ensure_host_identity(folder / KEYS_FOLDER, folder, addresses)
            hosted = HostedRun(run, plan, identifier, config.saving.keep_last)
            replace_json(folder / ROUNDS_FILE, content)
        except Exception:
            if is_new:  # nobody has joined it: with other words the command is to begin anew
                for name in (RUN_FILE, ROUNDS_FILE):
                    (folder / name).unlink(missing_ok=True)
            raise
        yield hosted


@contextmanager
def gone_on_with(folder: Path, listener: Listener) -> Iterator[HostedRun]:
    """Go on with the run of a folder, and hold the folder during the block.

    Raises:
        CheckpointError: if there is none, or it is in use, or its data are others than it began with.
    """
    content = read_community(folder)
    plan = Plan.from_dict(content["plan"])
    with opened_run(stored_configuration(folder), listener) as run:
        if run.corpus.fingerprint != plan.data_fingerprint:
            raise CheckpointError(
                f"the data of {folder.absolute()} have the fingerprint {run.corpus.fingerprint[:16]}, the run began "
                f"with {plan.data_fingerprint[:16]}: bring them back."
            )
        yield HostedRun(run, plan, str(content["run"]), int(content["keep_last"]))


def read_community(folder: Path) -> dict[str, Any]:
    """Return what a community run's folder says of its rounds.

    Raises:
        CheckpointError: if the folder holds no such run.
    """
    path = folder / ROUNDS_FILE
    try:
        content = read_json(path)
        if content["format_version"] == FORMAT_VERSION:
            return dict(content)
        wrong = f"format version {content['format_version']}, expected {FORMAT_VERSION}"
    except FileNotFoundError:
        wrong = "no such file"
    except (OSError, ValueError, KeyError, TypeError) as error:
        wrong = type(error).__name__
    raise CheckpointError(
        f"{path.absolute()} cannot be read ({wrong}): a community run has one; choose another --output-dir."
    )


def stored_configuration(folder: Path) -> RunConfig:
    """Return the configuration that a run began with, in the folder where it is now."""
    content: Mapping[str, Any] = read_run_file(folder)["configuration"]
    return RunConfig.from_fields({**content, "output_dir": str(folder), "resume": True, "overwrite": False})


def _check_same(folder: Path, content: Mapping[str, Any], config: RunConfig, plan: Plan) -> None:
    """Refuse a recipe or plan other than the one that a run began with, but for _MAY_CHANGE.

    Raises:
        CheckpointError: naming the first difference.
    """
    stored = Plan.from_dict(content["plan"]).to_dict()
    for then, now in (
        (stored, {**plan.to_dict(), "data_fingerprint": stored["data_fingerprint"]}),
        (shared_configuration(stored_configuration(folder)), shared_configuration(config)),
    ):
        for name in then:
            if name not in _MAY_CHANGE and fingerprint(then[name]) != fingerprint(now[name]):
                raise CheckpointError(
                    f"`{name}` of a community run cannot change: it was {then[name]!r:.100}, got {now[name]!r:.100}: "
                    f"go on with what {folder.absolute()} began with, or choose another --output-dir."
                )
