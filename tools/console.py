"""Progress on stderr: one bar per phase, silent when not wanted."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


@dataclass(frozen=True)
class Phase:
    """One bar: `show(done, total)` moves it, `note` says what is going on."""

    progress: Progress
    task: TaskID

    def show(self, done: int, total: int) -> None:
        """Move the bar."""
        self.progress.update(self.task, completed=done, total=total)

    def note(self, text: str) -> None:
        """Say what is going on."""
        self.progress.update(self.task, note=text)

    def step(self, what: str, done: int, total: int) -> None:
        """Move the bar and say what is going on."""
        self.progress.update(self.task, completed=done, total=total, note=what)


@dataclass
class Stage:
    """Where the phases of a job are shown and their times kept."""

    console: Console
    phases_s: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[Phase]:
        """Show a bar while the block runs, and keep how long it took."""
        columns = (
            TextColumn("{task.description:<34}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[note]}"),
        )
        start = time.monotonic()
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task(name, total=None, note="")
            yield Phase(progress, task)
            done = progress.tasks[0]
            total = done.total or 1
            progress.update(task, completed=total, total=total)
        self.phases_s[name] = round(self.phases_s.get(name, 0.0) + time.monotonic() - start, 1)

    def say(self, text: str) -> None:
        """Print a line of comment."""
        self.console.print(text, highlight=False)
