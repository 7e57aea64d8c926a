"""How trainings look in the terminal: progress bars where there is one, plain lines elsewhere."""

import time
from collections.abc import Mapping
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from fanformer.training.events import Event


class _Terminal:
    """Draws on stderr; stdout stays free for the result."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.tasks: dict[str, TaskID] = {}
        texts = ("{task.percentage:>3.0f}%", "{task.fields[figures]}")
        columns = (TextColumn("{task.description}"), BarColumn(), *map(TextColumn, texts))
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
    """Draws a run."""

    def __call__(self, event: Event) -> None:
        """Show what happened."""
        figures = event.figures
        match event.kind:
            case "step":
                elapsed = figures["elapsed_seconds"]
                left = elapsed * (1 - event.share) / max(event.share, 1e-9)
                rate = figures["tokens"] / max(elapsed, 1e-9)
                text = f"step {figures['step']:,}  {rate:,.0f} tokens/s  {_clock(left)} left"
                self._show("one", "train", event.share, text)
            case "record":
                self._record(figures, event.share)
            case "sample":
                shown = event.text.replace("\n", "\\n")
                self._print(f"      it writes: {shown[:150]}")
            case _:
                super().__call__(event)

    def _record(self, record: Mapping[str, float], progress: float) -> None:
        """Print one step's figures."""
        parts = [f"{progress:4.0%}", f"step {record['step']:>6,}"]
        if "loss" in record:
            parts += [f"loss {record['loss']:.4f}", f"lr {record['learning_rate']:.2e}"]
            parts.append(f"{record['tokens_per_second']:>7,.0f} tokens/s")
        if "margin" in record:
            parts.append(f"margin {record['margin']:.4f}, {record['accuracy']:.0%} ahead")
        if "val_margin" in record:
            told = f"margin {record['val_margin']:.4f}, {record['val_accuracy']:.0%} ahead"
            parts.append(f"held out {record['val_loss']:.4f}, {told}")
        elif "val_loss" in record:
            parts.append(f"held out {record['val_loss']:.4f}, {record['val_bits_per_byte']:.4f} bits per byte")
        if not self.has_bars or "val_loss" in record or record["step"] == 1:
            self._print("  ".join(parts))


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
