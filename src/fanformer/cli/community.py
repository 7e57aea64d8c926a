"""`fanformer community`: host a run that volunteers train together, take part in one, and look at one."""

import contextlib
import datetime
import webbrowser
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fanformer.cli.options import Verb, VerbGroup, echo_table
from fanformer.cli.train import field_option, parsed_fields
from fanformer.errors import ConfigError, FANformerError
from fanformer.training.configuration import PARSERS, preset_names

if TYPE_CHECKING:
    from fanformer.community.plan import Plan

_FLAGS = ("data", "eval_data", "output_dir", "init_from", "seed", "batch_size", "sequence_length", "learning_rate",
          "optimizer", "schedule", "keep_last", "tokenizer", "vocab_size", "device")  # fmt: skip
"""Fields of the run that `host` has flags for; all others go through --set."""
_path = click.Path(path_type=Path)


@click.group(cls=VerbGroup)
def community() -> None:
    """Train one model together, each on a machine of their own, over slow and unreliable links.

    docs/community.md says what it costs, what is safe, and what is not.
    """


@community.command(cls=Verb, example="fanformer community key alice")
@click.argument("name")
@click.option("--output-dir", metavar="DIR", type=_path, default=Path("."), help="Where the two files go.")
def key(name: str, output_dir: Path) -> None:
    """Make the key of a member: NAME.key, which stays with the member, and NAME.pub, which its host gets."""
    from fanformer.community.identity import make_member_key

    private, public = make_member_key(name, output_dir)
    click.echo(f"{private}: keep it to yourself, and give it to `fanformer community join --key`")
    click.echo(f"{public}: send it to the host")


def _host_flags(function: Any) -> Any:
    for name in reversed(_FLAGS):
        function = field_option(name, "runs/PRESET-community" if name == "output_dir" else None)(function)
    return function


@community.command(
    cls=Verb,
    example="fanformer community host --preset nano --members members --address host.example.org --rounds 100",
)
@click.option("--preset", default="nano", help=f"Model and recipe: {', '.join(preset_names())}.")
@click.option(
    "--members", metavar="DIR", type=_path, required=True, help="Folder of NAME.pub files: who may take part."
)
@click.option("--address", "addresses", metavar="NAME", multiple=True, help="What members dial.  [default: 127.0.0.1]")
@click.option("--listen", metavar="IP", default="0.0.0.0", help="Address of this machine to listen at.")
@click.option("--port", default=8000, help="Port to listen at, the only one that must be open.")
@click.option("--rounds", default=100, help="Accepted rounds in all; the learning rate's schedule spans them.")
@click.option("--round-steps", default=500, help="Steps that a member does in a round, at most.")
@click.option("--round-time", metavar="TIME", default="30m", help="After which a round does not wait for more updates.")
@click.option("--min-reports", default=1, help="Updates that a round needs.")
@click.option("--bits", default=8, help="Bits of a number in an update: 8 or 4.")
@click.option("--fragments", default=1, help="Parts of the model, of which a round sends one.")
@click.option("--base-dtype", default="float16", help="Number format of the weights that members are sent.")
@click.option("--gate", default=0.05, help="How far above the best a round's held-out loss may be, as a share.")
@click.option("--outer-learning-rate", default=0.7, help="Learning rate of the outer step.")
@click.option("--outer-momentum", default=0.9, help="Momentum of the outer step.")
@_host_flags
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Any field of the run, or model.FIELD.")
def host(
    preset: str,
    members: Path,
    addresses: tuple[str, ...],
    listen: str,
    port: int,
    settings: tuple[str, ...],
    **flags: Any,
) -> None:
    """Host a run: hand out shares of rounds, judge what comes back, and keep every accepted round, signed.

    The same command goes on with a run that was stopped. Volunteers join with the invitation that it prints.
    """
    from fanformer.cli.terminal import TerminalReporter
    from fanformer.community.flower.content import require_flower
    from fanformer.community.identity import read_public_members

    require_flower()
    plan_fields = {name: flags.pop(name) for name in ("rounds", "round_steps", "round_time", "min_reports", "bits",
        "fragments", "base_dtype", "gate", "outer_learning_rate", "outer_momentum")}  # fmt: skip
    overrides = {"preset": preset, **parsed_fields(flags, settings)}
    read_public_members(members)  # what is wrong there is told before any work
    with TerminalReporter() as reporter:
        _host(plan_fields, overrides, members, list(addresses) or ["127.0.0.1"], (listen, port), reporter)


def _host(
    plan_fields: dict[str, Any],
    overrides: dict[str, Any],
    members: Path,
    addresses: list[str],
    place: tuple[str, int],
    listener: Any,
) -> None:
    from fanformer.community.flower.keeping import end_left_behind, keep
    from fanformer.community.flower.processes import HostProcesses, require_free
    from fanformer.community.folder import FLOWER_FOLDER, HOST_LOCK_FILE, KEYS_FOLDER
    from fanformer.community.hosted_run import begun, refuse_without_effect
    from fanformer.community.identity import CERTIFICATE, PUBLIC_KEY
    from fanformer.community.invitation import check_address, invite
    from fanformer.community.status import note_end
    from fanformer.files.locking import hold
    from fanformer.machine.signals import sigterm_as_exit
    from fanformer.training.configuration import resolve_run
    from fanformer.training.events import note_to

    refuse_without_effect(overrides)
    for address in addresses:
        check_address(address)
    config = resolve_run(None, overrides)
    if config.output.output_dir is None:
        config = config.replace(output_dir=f"runs/{config.preset}-community")
    folder, note = config.folder, note_to(listener)
    lock = folder / HOST_LOCK_FILE, f"the run {folder.absolute()}"
    if (folder / FLOWER_FOLDER).is_dir():
        with hold(*lock):
            end_left_behind(folder)
    plan = _plan(plan_fields, config)
    require_free(folder, *place)
    with begun(config, plan, [*addresses, "127.0.0.1", "localhost"], listener):
        pass  # all that can be wrong with the input is, before anybody is invited
    pems = [(folder / KEYS_FOLDER / CERTIFICATE).read_text(), (folder / PUBLIC_KEY).read_text()]

    def tell() -> None:
        for address in addresses:
            click.echo(f"invitation: {invite(address, place[1], *pems)}")

    with hold(*lock), sigterm_as_exit():
        try:
            with HostProcesses(folder, *place) as processes:
                keep(folder, processes, members, note, tell)
        except (KeyboardInterrupt, SystemExit):  # Ctrl-C, or SIGTERM as systemd sends it
            note_end(folder, "stopped")
            click.echo(f"stopped: the same command goes on from the last round in {folder}")
            raise
        except (FANformerError, OSError) as error:
            note_end(folder, "failed", str(error))
            raise
    click.echo(f"model: {folder}")


def _plan(fields: dict[str, Any], config: Any) -> "Plan":
    """Return the plan that flags and the run's rows say."""
    from fanformer.community.outer import OuterSettings
    from fanformer.community.plan import Plan

    return Plan(
        rounds=fields["rounds"],
        round_steps=fields["round_steps"],
        batch_size=config.batch.batch_size,
        sequence_length=config.batch.sequence_length,
        round_seconds=PARSERS["max_time"](fields["round_time"]),
        fragments=fields["fragments"],
        bits=fields["bits"],
        base_dtype=fields["base_dtype"],
        min_reports=fields["min_reports"],
        gate_tolerance=fields["gate"],
        outer=OuterSettings(fields["outer_learning_rate"], fields["outer_momentum"]),
    )


@community.command(
    cls=Verb, example="fanformer community join 'https://host.example.org:8000/#...' --key alice.key --hours 8"
)
@click.argument("invitation", metavar="URL")
@click.option("--key", "key_file", metavar="FILE", type=_path, required=True, help="Private key, of `community key`.")
@click.option("--data", metavar="SPEC", help="Text of your own to train on.  [default: the run's, where it is public]")
@click.option("--licence", default="unknown", help="Licence of that text, for the record.")
@click.option("--hours", type=float, metavar="X", help="Leave after so many hours, with what is done by then.")
@click.option("--output-dir", metavar="DIR", type=_path, help="What you keep.  [default: joined/NAME of the key]")
@field_option("device")
@field_option("precision")
@field_option("compile")
def join(
    invitation: str,
    key_file: Path,
    data: str | None,
    licence: str,
    hours: float | None,
    output_dir: Path | None,
    **machine: str | None,
) -> None:
    """Take part in a run: train shares of its rounds on this machine until it is over, or you leave with Ctrl-C.

    Nothing that the host sends is run as code, and no file of this machine is read but what --data names. The same
    command goes on where it was stopped, or killed.
    """
    from fanformer.cli.terminal import TerminalReporter
    from fanformer.community.flower.content import require_flower
    from fanformer.community.flower.joining import join as take_part
    from fanformer.community.invitation import parse_invitation
    from fanformer.community.volunteering import Own

    require_flower()
    parsed = parse_invitation(invitation)
    if hours is not None and not hours > 0:
        raise ConfigError(f"`--hours` must be above 0, got {hours:g}.")
    own = Own(data, licence, **{name: value for name, value in machine.items() if value is not None})
    folder = output_dir or Path("joined") / key_file.stem
    with TerminalReporter() as reporter:
        stay = take_part(parsed, key_file, folder, own, None if hours is None else 3600 * hours, reporter)
    known = {"finished": "the run is over", "time": "your time is over", "gone": "no host has answered for a day"}
    ended = known.get(stay.ended, f"stopped by {stay.ended}")
    click.echo(f"{ended}: {stay.tokens:,} tokens in {stay.rounds:,} rounds, thank you")


@community.command(cls=Verb, example="fanformer community status runs/nano-community --browser")
@click.argument("run", metavar="URL|DIR")
@click.option("--browser", is_flag=True, help="Follow it as a page in the browser until Ctrl-C.")
@click.option("--json", "as_json", is_flag=True, help="Print all of it as JSON.")
def status(run: str, browser: bool, as_json: bool) -> None:
    """Tell how a run stands, from its invitation or its folder: members, rounds, loss, bytes, refused updates."""
    import json
    import tempfile

    from fanformer.community.status import lines

    with tempfile.TemporaryDirectory() as place:
        ask = _asker(run, Path(place))
        found = ask()
        if browser:
            _follow(ask)
        elif as_json:
            click.echo(json.dumps(found, indent=2))
        else:
            click.echo("\n".join(lines(found, datetime.datetime.now(datetime.UTC))))


def _asker(run: str, place: Path) -> Callable[[], Mapping[str, Any]]:
    """Return what asks for the status of a run, given its invitation or its folder, and room for a certificate."""
    from fanformer.community.status import check_status, read_status

    if "://" not in run:
        return lambda: read_status(Path(run))
    from fanformer.community.invitation import fetch_certificate, fetch_status, parse_invitation

    invitation, certificate = parse_invitation(run), place / "certificate.pem"
    fetch_certificate(invitation, certificate)
    return lambda: check_status(fetch_status(invitation, certificate), invitation.address)


def _follow(ask: Callable[[], Mapping[str, Any]]) -> None:
    from fanformer.community.status import status_page
    from fanformer.report.live import LIVE_SCRIPT, LiveServer

    with LiveServer(0, lambda: status_page(ask(), LIVE_SCRIPT), lambda: ask()["written"]) as server:
        click.echo(f"following the run at {server.address}, until Ctrl-C")
        webbrowser.open(server.address)
        with contextlib.suppress(KeyboardInterrupt):  # the way to end it, and no failure
            server.serve_forever()


@community.command(cls=Verb, example="fanformer community verify runs/nano-community")
@click.argument("folder", metavar="DIR", type=_path)
def verify(folder: Path) -> None:
    """Check signature and every byte of a run's accepted rounds and of its model; exit code 1 where one is wrong."""
    from fanformer.community.identity import read_public_key
    from fanformer.community.invitation import key_fingerprint
    from fanformer.community.release import verify_run

    found = verify_run(folder)
    rows = [["round", "outcome", "weights", "tokens"]]
    for one in found:
        record = one.about.get("record") or {}
        result, tokens = str(record.get("result", ""))[:16], record.get("tokens")
        rows.append([one.folder.name, one.problem or "as signed", result, "" if tokens is None else f"{tokens:,}"])
    echo_table(rows)
    click.echo(f"key: {key_fingerprint(read_public_key(folder).text)}, which is how the run's invitation is to end")
    if any(one.problem for one in found):
        raise click.exceptions.Exit(1)
