"""The command itself: help without heavy imports, and how every failure looks."""

import errno
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from fanformer.cli.failure import run_command, run_program, user_message, writing
from fanformer.cli.main import VERBS, fanformer
from fanformer.cli.options import Verb
from fanformer.errors import ConfigError, DataError

needs_full_device = pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs the device /dev/full")
HEAVY = ("torch", "transformers", "numpy", "tokenizers", "huggingface_hub", "matplotlib", "rich.progress")
LIST_IMPORTS = """
import sys
from fanformer.cli.main import main
code = main({words!r})
print("\\n" + "imported:", *[name for name in {heavy!r} if name in sys.modules])
sys.exit(code)
"""


def imported_for(words):
    script = LIST_IMPORTS.format(words=words, heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.rpartition("imported:")[2].split()


def test_list_of_verbs_imports_nothing_heavy():
    assert imported_for(["--help"]) == []


def test_help_of_no_verb_imports_anything_heavy():
    script = "import sys, io, contextlib\nfrom fanformer.cli.main import VERBS, main\n"
    script += "with contextlib.redirect_stdout(io.StringIO()):\n    for verb in VERBS: main([verb, '--help'])\n"
    script += f"print(*[name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, [], "")


def test_list_of_verbs_is_complete_and_each_exists(command):
    listed = command("--help")
    context = click.Context(fanformer)
    for verb, (_, text) in VERBS.items():
        assert verb in listed.out
        assert text in listed.out
        assert fanformer.get_command(context, verb).name == verb
    assert command().out == listed.out


def leaf_commands():
    context = click.Context(fanformer)
    for verb in VERBS:
        found = fanformer.get_command(context, verb)
        if isinstance(found, click.Group):
            yield from ((f"{verb} {name}", leaf) for name, leaf in found.commands.items())
        else:
            yield verb, found


@pytest.mark.parametrize(
    ("name", "leaf"), list(leaf_commands()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_help_shows_an_example_that_parses_and_every_default(command, name, leaf):
    assert isinstance(leaf, Verb)
    text = " ".join(command(*name.split(), "--help").out.split())
    example = text.partition("Example: ")[2]
    assert example.startswith(f"fanformer {name}")
    for option in leaf.params:
        if isinstance(option, click.Option) and not option.is_flag and isinstance(option.default, (int, float, str)):
            assert f"[default: {option.default}" in text, option.name
    words = shlex.split(leaf.epilog.partition("Example:\n")[2])[1 + len(name.split()) :]
    leaf.make_context(name, words)  # raises a usage error where a flag of the example does not exist


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generat"], "error: no command `generat`: did you mean `generate`?; see `fanformer --help`."),
        (["data", "prepar"], "error: no command `prepar`: did you mean `prepare`?; see `fanformer data --help`."),
        (["info", "--jsn"], "error: no option `--jsn` of `fanformer info`: did you mean `--json`?"),
        (
            ["generate", "x", "--max-lenght", "5"],
            "error: no option `--max-lenght` of `fanformer generate`: did you mean `--max-length`?",
        ),
        (["info", "--zzz"], "error: no option `--zzz` of `fanformer info`: `fanformer info --help` lists them."),
        (["eval"], "error: missing argument 'DIR'; see `fanformer eval --help`."),
        (
            ["generate", "x", "--top-k", "many"],
            "error: invalid value for '--top-k': 'many' is not a valid integer; see `fanformer generate --help`.",
        ),
    ],
)
def test_wrong_words_name_what_is_right(command, words, message):
    assert command(*words).refusal() == message


def outcome_of(error, capfd, *words):
    @click.command("verb", cls=Verb, example="")
    def verb():
        raise error

    code = run_command(verb, list(words), "verb")
    return code, *capfd.readouterr()


def test_bad_input_is_one_line_and_code_2(capfd):
    assert outcome_of(DataError("two\n  lines"), capfd) == (2, "", "error: two lines\n")


def test_bug_is_one_line_and_code_1_that_offers_the_traceback(capfd):
    code, _, err = outcome_of(KeyError("lost"), capfd)
    assert code == 1
    assert err == "error: internal error, KeyError: 'lost'; run again with --debug for the traceback.\n"


def test_value_error_that_is_not_of_the_model_is_a_bug(capfd):
    assert outcome_of(ValueError("strange"), capfd)[0] == 1


@pytest.mark.parametrize("error", [DataError("bad"), KeyError("lost")])
def test_debug_shows_the_traceback_and_still_the_line(capfd, error):
    _, _, err = outcome_of(error, capfd, "--debug")
    assert err.startswith("Traceback (most recent call last)")
    assert err.splitlines()[-1].startswith("error: ")


def test_debug_is_accepted_before_and_after_the_verb_but_not_behind_the_double_dash(command):
    for words in (["--debug", "info", "nan"], ["info", "nan", "--debug"]):
        assert command(*words).err.startswith("Traceback")
    assert "Traceback" not in command("generate", "nowhere", "--", "--debug").err


def test_interrupt_is_code_130_without_a_traceback(capfd):
    assert outcome_of(KeyboardInterrupt(), capfd) == (130, "", "")


def test_refused_configuration_reads_like_our_own_message():
    from fanformer.model import FANformerConfig

    for fields, message in (
        (
            {"fan_ratio": 0.7},
            "`fan_ratio` must be in [0, 0.5], got 0.7: cos and sin each take this share of the output.",
        ),
        ({"hidden_size": "x"}, "Field 'hidden_size' expected int, got str (value: 'x')"),
        ({"hidden_sise": 3}, "`hidden_sise` is not a field of FANformerConfig: did you mean `hidden_size`?"),
    ):
        with pytest.raises(Exception) as caught:  # strict configurations raise their own kind
            FANformerConfig(**fields)
        assert user_message(caught.value) == message


def test_system_errors_name_the_absolute_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for opened, message in (("missing", "no such file or folder"), (".", "a folder, expected a file")):
        with pytest.raises(OSError) as caught:
            Path(opened).read_bytes()
        assert user_message(caught.value) == f"{message}: {tmp_path / opened}"
    assert user_message(PermissionError(errno.EACCES, "", "x")) == f"no permission: {tmp_path / 'x'}"
    assert user_message(OSError(errno.EIO, "", "x")) is None  # a broken disk is not the user's to mend


@pytest.mark.parametrize("bytes_wanted", [1 << 44, 1 << 62], ids=["more than there is", "more than can be counted"])
def test_out_of_memory_on_a_cpu_is_the_user_s_to_mend(bytes_wanted):
    import torch

    with pytest.raises(RuntimeError) as caught:
        torch.empty(bytes_wanted)
    assert user_message(caught.value).startswith("out of memory: use a smaller batch")


def test_a_full_disk_met_by_a_library_in_rust_is_the_user_s_to_mend(tmp_path):
    """It raises bare Exception with the number in its words."""
    from tokenizers import Tokenizer, models

    with pytest.raises(Exception, match=r"os error") as caught:
        Tokenizer(models.BPE()).save(str(tmp_path / "no" / "folder" / "tokenizer.json"))
    assert user_message(caught.value).startswith("no such file or folder")


def test_memory_that_runs_out_says_what_to_lower():
    assert user_message(MemoryError()).startswith("out of memory: use a smaller batch")


@needs_full_device
def test_full_disk_is_named_with_the_path(tmp_path):
    with pytest.raises(OSError) as caught, writing(Path("/dev/full")):
        Path("/dev/full").write_text("x" * 10**5)
    assert user_message(caught.value) == "no space left on the disk: /dev/full"
    with pytest.raises(OSError) as caught, writing(tmp_path), open("/dev/full", "wb") as stream:
        stream.write(b"x" * 10**5)
    assert user_message(caught.value) == f"no space left on the disk: {tmp_path}"


def test_full_disk_is_named_in_the_words_of_the_weights_library(tmp_path):
    from safetensors import SafetensorError

    with pytest.raises(OSError) as caught, writing(tmp_path):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert user_message(caught.value) == f"no space left on the disk: {tmp_path}"
    with pytest.raises(SafetensorError), writing(tmp_path):
        raise SafetensorError("something else")


@needs_full_device
def test_full_disk_behind_stdout_is_one_line():
    done = subprocess.run(
        f"{sys.executable} -m fanformer.cli.main --help > /dev/full", shell=True, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr == "error: no space left on the disk\n"


def test_reader_that_goes_away_is_no_noise():
    script = f"{sys.executable} -m fanformer.cli.main --help | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.stderr == ""
    assert done.stdout.strip() in ("0", "141")  # 0 where the pipe's buffer took all before its reader left


def test_the_package_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "fanformer", "nowhere"], capture_output=True, text=True)
    asked = subprocess.run([sys.executable, "-m", "fanformer", "--version"], capture_output=True, text=True)
    assert (asked.returncode, asked.stdout.split()[0]) == (0, "fanformer,")
    assert (done.returncode, done.stderr.count("\n"), done.stderr[:7]) == (2, 1, "error: ")


def test_version_is_the_packages(command):
    from fanformer import __version__

    assert command("--version").out == f"fanformer, version {__version__}\n"


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (FileNotFoundError(2, "", "/nowhere/text"), 2, "error: no such file or folder: /nowhere/text"),
        (ConfigError("`layers` must be at least 1,\n got 0."), 2, "error: `layers` must be at least 1, got 0."),
        (KeyboardInterrupt(), 130, "stopped: the same command goes on"),
    ],
)
def test_a_script_says_in_a_line_what_a_user_can_mend(error, status, said, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as caught:
        run_program(main)
    assert (caught.value.code, capsys.readouterr().err) == (status, f"{said}\n")


def test_a_script_with_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_program(lambda: 1 // 0)
