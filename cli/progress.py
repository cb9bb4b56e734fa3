"""Progress and tables for people, on stderr: a bar in a terminal, a few plain lines in a log."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

LINE_SECONDS = 15.0  # between plain lines


class Meter:
    """Shows how far something has come. Units: progress in [0, 1]."""

    def __init__(self, title: str, bar: Progress | None) -> None:
        self._title, self._bar = title, bar
        self._task = bar.add_task(title, total=1.0, note="") if bar else None
        self._last = time.monotonic() - LINE_SECONDS

    def show(self, progress: float, note: str = "", *, seconds_left: float | None = None) -> None:
        """Show the progress, a short note and, where there is no bar to tell it, the time left."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=progress, note=note)
        elif time.monotonic() - self._last >= LINE_SECONDS or progress >= 1:
            self._last = time.monotonic()
            left = "" if not seconds_left else f"  {seconds_left:.0f} s left"
            say(f"{self._title} {progress:4.0%}  {note}{left}")


@contextmanager
def meter(title: str) -> Iterator[Meter]:
    """Open a meter on stderr."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield Meter(title, None)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f}%"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as bar:
        yield Meter(title, bar)


def say(text: str) -> None:
    """Tell people something, on stderr."""
    click.echo(text, err=True)


def show_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str = "") -> None:
    """Show a table on stderr; the first column is text, the others are figures."""
    table = Table(title=title or None, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    Console(stderr=True).print(table)


def show_scores(scores: Mapping[str, Mapping[str, float]], *, title: str) -> None:
    """Show metrics by who answered."""
    names = list(next(iter(scores.values())))
    rows = [[who, *(f"{values[name]:.3f}" for name in names)] for who, values in scores.items()]
    show_table(["", *names], rows, title=title)
