"""`fanformer chat` on piped input: what is an answer, what a notice, and what the commands do."""

import contextlib
import copy
import os
import pty
import select
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

FIXED = ("--seed", "1", "--max-length", "8", "--min-length", "8", "--device", "cpu")


def test_base_model_says_so_once_and_continues_each_line(command, saved_model):
    outcome = command("chat", saved_model, *FIXED, text="the cat\nthe cat\n")
    assert outcome.code == 0
    assert outcome.err.count("is a base model") == 1
    first = command("generate", saved_model, "the cat", *FIXED).out.removeprefix("the cat")
    assert outcome.out.startswith(first)
    assert len(outcome.out) > len(first) + 1


def test_chat_template_keeps_history_until_reset(command, loaded, model_copy):
    loaded.tokenizer.save_pretrained(model_copy)
    (model_copy / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    outcome = command("chat", model_copy, *FIXED, text="hi\n/reset\n/help\n")
    assert outcome.code == 0
    assert "base model" not in outcome.err
    assert "conversation forgotten." in outcome.err
    assert outcome.err.count("/reset forgets the conversation") == 2  # at the start, and when asked for


def test_an_answer_that_was_cut_is_told_and_a_backslash_joins_lines(command, loaded, model_copy):
    loaded.tokenizer.save_pretrained(model_copy)
    (model_copy / "chat_template.jinja").write_text("{% for m in messages %}<{{ m.content }}>{% endfor %}")
    split = command("chat", model_copy, *FIXED, text="the\\\ncat\n")
    assert "cut after 8 tokens: --max-length sets how many." in split.err
    from fanformer.generation.chat import Conversation
    from fanformer.generation.interruption import interruptible
    from fanformer.generation.settings import GenerationSettings
    from fanformer.loading import load_text_model

    conversation = Conversation(load_text_model(model_copy, "cpu"), GenerationSettings(8, 8, seed=1))
    pieces = []
    with interruptible() as interruption:
        conversation.answer("the\ncat", pieces.append, interruption)
    assert split.out == "".join(pieces).lstrip() + "\n"
    assert conversation.cut
    longer = command("chat", model_copy, "--seed", "1", "--device", "cpu", text="hi\n")
    assert len(loaded.tokenizer(longer.out).input_ids) > 8 or "cut after" not in longer.err
    least = command("chat", model_copy, "--min-length", "80", "--device", "cpu", text="hi\n")
    assert "`min_length` must be between 0 and max_length (64), got 80" in least.refusal()  # half of its positions
    assert "max_length (400), got 401" in command("chat", model_copy, "--min-length", "401", text="hi\n").refusal()


def test_what_an_answer_begins_with_is_no_space_at_the_prompt():
    from fanformer.cli.chat import from_first_sign

    pieces = []
    write = from_first_sign(pieces.append)
    for piece in ("", " ", "\n the", " cat", " ", "\nsat"):
        write(piece)
    assert pieces == ["the", " cat", " ", "\nsat"]


def test_exit_ends_before_the_rest_of_the_input(command, saved_model):
    outcome = command("chat", saved_model, *FIXED, text="/exit\nthe cat\n")
    assert (outcome.code, outcome.out) == (0, "")


def test_unknown_command_is_not_a_prompt(command, saved_model):
    outcome = command("chat", saved_model, *FIXED, text="/rest\n")
    assert outcome.out == ""
    assert "no command /rest" in outcome.err


def test_line_that_is_too_long_is_refused_and_the_next_answered(command, saved_model):
    outcome = command("chat", saved_model, *FIXED, text="!?" * 200 + "\nthe cat\n")
    assert outcome.code == 0
    assert "error: prompt" in outcome.err
    assert outcome.out != ""


def test_settings_and_folder_are_checked_as_in_generate(command, tmp_path):
    assert "`top_k` must be at least 0" in command("chat", tmp_path, "--top-k", "-1").refusal()
    assert "no config.json" in command("chat", tmp_path).refusal()


def test_message_that_is_no_unicode_is_refused_and_the_conversation_kept(loaded):
    from fanformer.errors import ConfigError
    from fanformer.generation.chat import Conversation
    from fanformer.generation.interruption import Interruption
    from fanformer.generation.settings import GenerationSettings
    from fanformer.generation.torch_model import TorchModel

    tokenizer = copy.deepcopy(loaded.tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    conversation = Conversation(TorchModel(loaded.model, tokenizer), GenerationSettings(max_length=3, seed=1))
    conversation.answer("hi", lambda text: None, Interruption())
    before = list(conversation.messages)
    with pytest.raises(ConfigError, match="must be valid UTF-8"):
        conversation.answer("\udcff", lambda text: None, Interruption())
    assert conversation.messages == before


@pytest.fixture
def terminal():
    """Start a script with a terminal as its input and output; gives a function that waits for words in its output."""
    children = []

    def start(script, **variables):
        master, slave = pty.openpty()
        heeds = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a job in the background ignores SIGINT
        child = subprocess.Popen(
            [sys.executable, "-c", script],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            preexec_fn=heeds,
            env={**os.environ, **variables},
        )
        os.close(slave)
        children.append((child, master))
        seen = ""

        def wait_for(words, otherwise=lambda: None):
            """Wait for words; do something whenever there is silence for five seconds."""
            nonlocal seen
            deadline = time.monotonic() + 120
            while words not in seen:
                assert time.monotonic() < deadline, seen
                if select.select([master], [], [], 5)[0]:
                    seen += os.read(master, 1000).decode(errors="replace")
                else:
                    otherwise()
            seen = seen.partition(words)[2]

        return child, master, wait_for

    yield start
    for child, master in children:
        child.kill()
        child.wait()
        os.close(master)


def interrupt_reader(child):
    """Send SIGINT once the child sleeps in the line editor.

    A signal just before that waits for the next one: the editor looks for signals only where one ends its sleep.
    """
    status = Path(f"/proc/{child.pid}/stat")
    asleep = 0
    while status.exists() and asleep < 10:
        asleep = asleep + 1 if status.read_text().rpartition(")")[2].split()[0] == "S" else 0
        time.sleep(0.02)
    child.send_signal(signal.SIGINT)


def test_line_at_a_terminal_is_utf_8_and_what_is_not_is_mended(terminal):
    _, master, wait_for = terminal(
        "from fanformer.cli.chat import accept_any_bytes, read_line\n"
        "accept_any_bytes()\n"
        "while (line := read_line()) is not None: print('got', ascii(line))\n",
        PYTHONUTF8="0",
        LC_ALL="C",  # where a locale says UTF-8, the line editor itself drops what is not
        PYTHONIOENCODING="",
    )
    wait_for("> ")
    os.write(master, b"caf\xc3\xa9 caf\xe9\n")
    wait_for("the line is not UTF-8: what cannot be read of it became U+FFFD.")
    wait_for("got 'caf\\xe9 caf\\ufffd'")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to see that the child waits")
def test_first_interrupt_at_the_prompt_warns_and_the_second_leaves(terminal):
    child, master, wait_for = terminal(
        "import click, sys\n"
        "from fanformer.cli.chat import read_line\n"
        "from fanformer.cli.failure import run_command\n"
        "@click.command()\n"
        "def talk():\n"
        "    while (line := read_line()) is not None: print('got', line)\n"
        "sys.exit(run_command(talk, [], 'talk'))\n"
    )
    wait_for("> ")
    os.write(master, b"hello\n")
    wait_for("got hello")
    wait_for("> ")
    interrupt_reader(child)
    wait_for("Ctrl-C again leaves.", otherwise=lambda: interrupt_reader(child))
    wait_for("> ")
    os.write(master, b"still here\n")
    wait_for("got still here")
    wait_for("> ")
    interrupt_reader(child)
    wait_for("Ctrl-C again leaves.", otherwise=lambda: interrupt_reader(child))
    wait_for("> ")
    interrupt_reader(child)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(timeout=20)
    if child.poll() is None:
        interrupt_reader(child)
    assert child.wait(timeout=120) == 130
