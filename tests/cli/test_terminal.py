"""How a run looks in the terminal: figures, a curve, and what it waits for."""

import io

import pytest
from rich.console import Console
from rich.text import Text

from fanformer.cli.terminal import TerminalReporter, curve
from fanformer.training.events import Event


@pytest.fixture
def shown(monkeypatch):
    """Return a function that gives a reporter on a terminal of 80 columns, and what its bar says then."""

    def make(encoding="utf-8"):
        stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="replace")
        reporter = TerminalReporter()
        reporter.console = Console(file=stream, force_terminal=True, width=80)
        reporter.has_bars = True
        reporter.bar.live.console = reporter.console
        reporter.bar.disable = False
        return reporter

    def text(reporter):
        with reporter.console.capture() as capture:
            reporter.console.print(reporter.bar.get_renderable())
        return capture.get()

    return make, text


def step(number, share):
    return Event(
        "step", share=share, figures={"step": number, "tokens": 1000 * number, "elapsed_seconds": 2.0 * number}
    )


def record(number, loss):
    figures = {"step": number, "loss": loss, "learning_rate": 0.01, "tokens_per_second": 500.0}
    return Event("record", share=0.1, figures=figures)


def test_curve_falls_with_the_values_and_keeps_its_width():
    assert curve([4.0, 3.0, 2.0, 1.0]) == "\u2588\u2586\u2583\u2581"
    assert curve([float(100 - value) for value in range(1000)])[:2] == "\u2588\u2587"
    assert len(curve([1.0] * 1000)) == 8
    assert curve([2.0, float("nan"), 1.0]) == "\u2588\u2581"
    assert curve([]) == ""


def test_line_has_loss_curve_rate_and_time_left_within_80_columns(shown):
    make, text = shown
    reporter = make()
    for number, loss in enumerate([8.0, 6.0, 4.0, 2.125], 1):
        reporter(record(number, loss))
        reporter(step(number, number / 8))
    line = text(reporter)
    assert "train" in line
    assert f"step 4 2.125 {curve([8.0, 6.0, 4.0, 2.125])} 500 tokens/s 0:08 left" in line
    assert line.strip().count("\n") == 0
    reporter(step(123_456, 0.001))  # many digits, and hours left
    assert text(reporter).strip().count("\n") == 0


def test_a_wait_is_named_until_the_next_step(shown):
    make, text = shown
    reporter = make()
    reporter(Event("wait", "compiling"))
    assert "compiling" in text(reporter)
    reporter(step(1, 0.25))
    assert "compiling" not in text(reporter)
    for what in ("evaluating", "saving"):
        reporter(Event("wait", what))
        assert what in text(reporter)
        assert "25%" in text(reporter)
    reporter(step(2, 0.5))
    assert "saving" not in text(reporter)


def test_terminals_without_such_letters_get_the_number_alone(shown):
    make, text = shown
    reporter = make("ascii")
    reporter(record(1, 8.0))
    reporter(record(2, 2.125))
    reporter(step(2, 0.5))
    assert "step 2 2.125  500 tokens/s" in text(reporter)


def test_a_record_tells_how_many_answers_are_right(shown):
    reporter = shown[0]()
    with reporter.console.capture() as capture:
        figures = {"step": 5, "val_loss": 0.5, "val_bits_per_byte": 1.25, "val_exact": 0.9375}
        reporter(Event("record", share=0.5, figures=figures))
        del figures["val_exact"]
        reporter(Event("record", share=0.5, figures=figures))
    right, plain = Text.from_ansi(capture.get()).plain.splitlines()
    assert right.endswith("held out 0.5000, 1.2500 bits per byte, 93.8% to the letter")
    assert plain.endswith("1.2500 bits per byte")
