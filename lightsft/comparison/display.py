"""The live display of a comparison: a line per trial, with its progress and its score when it is done."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


class Display:
    """Shows stages and trials on `console`; on one that is not a terminal, prints a line when something ends."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        self._progress = Progress(
            TextColumn("{task.description:<32}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._current: tuple[TaskID, str] | None = None

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def begin(self, name: str) -> None:
        """Something starts."""
        self._current = (self._progress.add_task(name, total=None, note="starting"), name)

    def event(self, event: dict[str, Any]) -> None:
        """A worker's event about what runs now."""
        if self._current is None:
            return
        task, _ = self._current
        if event["event"] == "progress":
            note = f"step {event['step']}/{event['steps']}"
            self._progress.update(task, completed=event["step"], total=event["steps"], note=note)
        elif event["event"] == "stage":
            self._progress.update(task, note=event["stage"])

    def end(self, note: str) -> None:
        """What ran has ended; `note` says how."""
        if self._current is None:
            return
        task, name = self._current
        total = self._progress.tasks[task].total or 1
        self._progress.update(task, completed=total, total=total, note=note)
        self._progress.stop_task(task)
        if not self.console.is_terminal:
            self.say(f"{name:<32} {note}")
        self._current = None

    def say(self, text: str) -> None:
        """A line of text above the bars."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)
