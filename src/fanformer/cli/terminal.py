"""How trainings look in the terminal: progress bars where there is one, plain lines elsewhere."""

import itertools
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Column

from fanformer.training.events import Event

_BAR_WIDTH, _CURVE_WIDTH = 10, 8  # so that a line fits 80 columns
_BARS = "\u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"


class _Terminal:
    """Draws on stderr; stdout stays free for the result."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.tasks: dict[str, TaskID] = {}
        figures = TextColumn("{task.fields[figures]}", table_column=Column(no_wrap=True, overflow="ellipsis"))
        texts = (TextColumn("{task.description:<10}"), TextColumn("{task.percentage:>3.0f}%"))
        columns = (texts[0], BarColumn(_BAR_WIDTH), texts[1], figures)
        self.has_bars = self.console.is_terminal
        self.bar = Progress(*columns, console=self.console, transient=True, disable=not self.has_bars)

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.has_bars:
            self.bar.stop()

    def _show(self, bar: str, description: str, share: float, figures: str) -> None:
        """Move one of the bars, which begins with this."""
        if bar not in self.tasks:
            self.tasks[bar] = self.bar.add_task(description, total=1.0, figures=figures)
        self.bar.update(self.tasks[bar], description=description, completed=share, figures=figures)

    def __call__(self, event: Event) -> None:
        """Show what happened."""
        figures = event.figures
        if event.kind == "note":
            self._print(event.text)
        elif event.kind == "data" and figures["total_bytes"]:
            read, total = figures["bytes"] / 1e6, figures["total_bytes"] / 1e6
            self._show("one", "data", event.share, f"{read:.1f} of {total:.1f} MB")

    def _print(self, text: str) -> None:
        self.console.print(text, markup=False)


class TerminalReporter(_Terminal):
    """Draws a run: how far it is, a small curve of its loss, when it will be done, and what it waits for."""

    def __init__(self) -> None:
        super().__init__()
        self._losses: list[float] = []
        self._line = ""

    def __call__(self, event: Event) -> None:
        """Show what happened."""
        figures = event.figures
        match event.kind:
            case "step":
                elapsed = figures["elapsed_seconds"]
                left = elapsed * (1 - event.share) / max(event.share, 1e-9)
                rate = figures["tokens"] / max(elapsed, 1e-9)
                self._line = f"step {figures['step']:,} {self._curve()}{rate:,.0f} tokens/s {_clock(left)} left"
                self._show("one", "train", event.share, self._line)
            case "wait":
                if "one" in self.tasks:
                    share = self.bar.tasks[self.tasks["one"]].completed
                    self._show("one", event.text, share, self._line)
                else:
                    self._show("one", event.text, 0.0, "")
            case "record":
                self._losses += [figures["loss"]] if "loss" in figures else []
                self._record(figures, event.share)
            case "sample":
                shown = event.text.replace("\n", "\\n")
                self._print(f"      it writes: {shown[:150]}")
            case _:
                super().__call__(event)

    def _curve(self) -> str:
        """Return the newest loss and a curve of all, where the terminal has its letters."""
        if not self._losses:
            return ""
        letters = curve(self._losses) if self.console.encoding.lower().startswith("utf") else ""
        return f"{self._losses[-1]:.3f} {letters} "

    def _record(self, record: Mapping[str, float], progress: float) -> None:
        """Print one step's figures."""
        parts = [f"{progress:4.0%}", f"step {record['step']:>6,}"]
        if "loss" in record:
            parts += [f"loss {record['loss']:.4f}", f"lr {record['learning_rate']:.2e}"]
        if "tokens_per_second" in record:
            parts.append(f"{record['tokens_per_second']:>7,.0f} tokens/s")
        if "margin" in record:
            parts.append(f"margin {record['margin']:.4f}, {record['accuracy']:.0%} ahead")
        if "val_margin" in record:
            told = f"margin {record['val_margin']:.4f}, {record['val_accuracy']:.0%} ahead"
            parts.append(f"held out {record['val_loss']:.4f}, {told}")
        elif "val_loss" in record:
            exact = f", {record['val_exact']:.1%} to the letter" if "val_exact" in record else ""
            parts.append(f"held out {record['val_loss']:.4f}, {record['val_bits_per_byte']:.4f} bits per byte{exact}")
        if not self.has_bars or "val_loss" in record or record["step"] == 1:
            self._print("  ".join(parts))


def curve(values: Sequence[float]) -> str:
    """Return values as a line of bars, each the mean of its part of them; what is not finite is left out."""
    finite = [value for value in values if math.isfinite(value)]
    parts = min(len(finite), _CURVE_WIDTH)
    ends = [round(index * len(finite) / parts) for index in range(parts + 1)] if parts else []
    means = [statistics.fmean(finite[begin:end]) for begin, end in itertools.pairwise(ends)]
    low, high = min(means, default=0.0), max(means, default=0.0)
    height = (len(_BARS) - 1) / max(high - low, 1e-12)
    return "".join(_BARS[round((mean - low) * height)] for mean in means)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class SweepReporter(_Terminal):
    """Draws a list of trainings: a bar for all of them and one for each training under way."""

    def __init__(self) -> None:
        super().__init__()
        self._started = time.monotonic()
        self._begun: dict[str, float] = {}
        self._trained = 0

    def __call__(self, event: Event) -> None:
        """Show what happened."""
        name, figures = event.name, event.figures
        match event.kind:
            case "entry":
                self._started, self._trained = time.monotonic(), 0
                if figures["total"] > 1:
                    self._print(f"{name} ({figures['number']} of {figures['total']})")
            case "begin":
                self._begin(name, figures["done"], figures["total"])
            case "progress":
                self._show(name, name, event.share, event.text)
            case "end":
                self._end(name, event.text, f"{figures['done']}/{figures['total']}")
            case _:
                super().__call__(event)

    def _begin(self, name: str, done: int, total: int) -> None:
        """Show that a training begins, and when all will be done, judged by those that this process did."""
        self._begun[name] = time.monotonic()
        elapsed = time.monotonic() - self._started
        left = f"{_clock((total - done) * elapsed / self._trained)} left" if self._trained else ""
        self._show("all", "all", done / total, f"{done} of {total} trainings  {left}")
        self._show(name, name, 0.0, "")

    def _end(self, name: str, text: str, count: str) -> None:
        """Print how a training ended; one that was done before took no time and does not count for the time left."""
        seconds = time.monotonic() - self._begun.pop(name)
        self.bar.remove_task(self.tasks.pop(name))
        if seconds < 0.5:
            self._started = time.monotonic()
        else:
            self._trained += 1
        self._print(f"{count:>7}  {name}  {text}  ({_clock(seconds)})")
