"""How far long work has come: a bar with rate and time left on a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import click

SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def counted_progress(unit: str) -> Iterator[Callable[[str, int, int], None]]:
    """Give a function that shows how many of how many are done: a bar on a terminal, a line now and then elsewhere.

    Args:
        unit: what is counted, such as "requests".
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        last: tuple[float, int] | None = None

        def write_line(name: str, done: int, total: int) -> None:
            nonlocal last
            now = time.monotonic()
            if last is None or done < last[1]:  # setting up is no part of the rate
                last = now, done
            elif now - last[0] >= SECONDS_BETWEEN_LINES:
                rate = max(done - last[1], 1) / (now - last[0])
                last = now, done
                left = (total - done) / rate
                click.echo(f"{name}: {done:,} of {total:,} {unit}, {rate:,.0f}/s, {left:.0f} s left", err=True)

        yield write_line
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}/s"))
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        shown = bar.add_task(unit, total=None, rate="-")

        def move_bar(name: str, done: int, total: int) -> None:
            bar.update(shown, description=name, completed=done, total=total, rate=f"{bar.tasks[0].speed or 0:,.0f}")

        yield move_bar
