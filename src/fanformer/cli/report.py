"""How a training run looks in the terminal: a progress bar where there is one, plain lines elsewhere."""

from collections.abc import Mapping
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn


class TerminalReporter:
    """Draws a run on stderr; stdout stays free for its result."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.bar: Progress | None = None
        self.task: TaskID | None = None
        if self.console.is_terminal:
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}%"),
                TextColumn("{task.fields[figures]}"),
                console=self.console,
                transient=True,
            )

    def __enter__(self) -> "TerminalReporter":
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.bar is not None:
            self.bar.stop()

    def _show(self, description: str, progress: float, figures: str) -> None:
        if self.bar is None:
            return
        if self.task is None:
            self.task = self.bar.add_task(description, total=1.0, figures=figures)
        self.bar.update(self.task, description=description, completed=progress, figures=figures)

    def note(self, text: str) -> None:
        """Print one line."""
        self.console.print(text, markup=False)

    def data_progress(self, done: int, total: int | None) -> None:
        """Show how much of the data is read."""
        if total:
            self._show("data", done / total, f"{done / 1e6:.1f} of {total / 1e6:.1f} MB")

    def step(self, step: int, tokens: int, elapsed_seconds: float, progress: float) -> None:
        """Show rate and time left."""
        left = elapsed_seconds * (1 - progress) / max(progress, 1e-9)
        rate = tokens / max(elapsed_seconds, 1e-9)
        self._show("train", progress, f"step {step:,}  {rate:,.0f} tokens/s  {_clock(left)} left")

    def record(self, record: Mapping[str, float], progress: float) -> None:
        """Print one step's figures."""
        parts = [f"{progress:4.0%}", f"step {record['step']:>6,}"]
        if "loss" in record:
            parts.append(f"loss {record['loss']:.4f}")
            parts.append(f"lr {record['learning_rate']:.2e}")
            parts.append(f"{record['tokens_per_second']:>7,.0f} tokens/s")
        if "val_loss" in record:
            parts.append(f"held out {record['val_loss']:.4f}, {record['val_bits_per_byte']:.4f} bits per byte")
        if self.bar is None or "val_loss" in record or record["step"] == 1:
            self.note("  ".join(parts))

    def sample(self, prompt: str, text: str) -> None:
        """Print what the model writes now, as one line."""
        shown = (prompt + text).replace("\n", "\\n")
        self.note(f"      it writes: {shown[:150]}")


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
