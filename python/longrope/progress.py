"""Progress with time left: a live bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

LINE_EVERY_SECONDS = 5.0
SHOW_AFTER_SECONDS = 2.0

# A file or pipe has no width: tables get enough for nine columns.
console = Console(highlight=False, width=None if sys.stdout.isatty() else 130)


def say(text: str = "") -> None:
    """Print a line of the command's own output."""
    console.print(text, markup=False, soft_wrap=True)
    console.file.flush()


def clock(seconds: float) -> str:
    """Format a duration: 07:05, 1:02:03.

    Examples:
        >>> clock(425)
        '07:05'
    """
    total = max(round(seconds), 0)
    hours, minutes = divmod(total // 60, 60)
    return f"{hours}:{minutes:02}:{total % 60:02}" if hours else f"{minutes:02}:{total % 60:02}"


class Task:
    """One piece of work whose cost is known beforehand, in any unit that is proportional to time.

    Time left comes from the cost done since the start over the time it took; cost found already done (`skip`) counts
    as done, not as speed.
    """

    def __init__(self, name: str, total: float, seconds_per_cost: float | None = None) -> None:
        self.name, self.total, self.done, self.skipped = name, max(total, 1e-9), 0.0, 0.0
        self.note = ""
        self.began = time.monotonic()
        self._given = seconds_per_cost
        self._last_line = 0.0
        self._on_change: Callable[[], None] = lambda: None

    def advance(self, cost: float, note: str = "") -> None:
        """Record `cost` as worked off just now."""
        self.done += cost
        self._changed(note)

    def skip(self, cost: float, note: str = "") -> None:
        """Record `cost` as found done, from an earlier run."""
        self.done += cost
        self.skipped += cost
        self._changed(note)

    def retarget(self, total: float) -> None:
        """Change the total: a plan that adapts to what it finds."""
        self.total = max(total, self.done, 1e-9)

    def seconds_left(self) -> float | None:
        """Return the estimate, or None before anything is known."""
        worked = self.done - self.skipped
        elapsed = time.monotonic() - self.began
        if worked > 0:
            return max(self.total - self.done, 0.0) * elapsed / worked
        return None if self._given is None else max((self.total - self.done) * self._given - elapsed, 0.0)

    def left(self) -> str:
        """Return the estimate as text."""
        seconds = self.seconds_left()
        return "estimating time left" if seconds is None else f"about {clock(seconds)} left"

    def _changed(self, note: str) -> None:
        self.note = note or self.note
        self._on_change()

    def line(self) -> str:
        """Return the state as one line."""
        elapsed = clock(time.monotonic() - self.began)
        note = f"  {self.note}" if self.note else ""
        return f"[{self.name} {min(self.done / self.total, 1.0):4.0%}] {elapsed} elapsed, {self.left()}{note}"


@contextmanager
def task(name: str, total: float, seconds_per_cost: float | None = None) -> Iterator[Task]:
    """Show a `Task` while the block runs."""
    work = Task(name, total, seconds_per_cost)
    if console.is_terminal:
        columns = (
            SpinnerColumn(),
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=28),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            TextColumn("[dim]{task.fields[note]}"),
        )
        with Progress(*columns, console=console, transient=True) as progress:
            bar = progress.add_task(name, total=work.total, left="", note="")

            def update() -> None:
                note = work.note.replace("[", r"\[")
                progress.update(bar, completed=work.done, total=work.total, left=work.left(), note=note)

            work._on_change = update
            update()
            yield work
        return

    def print_line() -> None:
        now = time.monotonic()
        if now - work.began >= SHOW_AFTER_SECONDS and now - work._last_line >= LINE_EVERY_SECONDS:
            work._last_line = now
            say(work.line())

    work._on_change = print_line
    yield work


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' own progress bars off the terminal; ours is there."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def waiting(what: str, usual_seconds: float | None = None) -> Iterator[None]:
    """Show that one step that cannot report its progress is under way, and how long it usually takes."""
    hint = "" if usual_seconds is None else f" (usually about {clock(usual_seconds)})"
    if console.is_terminal:
        with console.status(f"{what}{hint}"):
            yield
        return
    began = time.monotonic()
    say(f"{what}{hint} ...")
    yield
    if time.monotonic() - began >= SHOW_AFTER_SECONDS:
        say(f"{what}: {time.monotonic() - began:.0f} s")
