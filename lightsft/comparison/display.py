"""The live display of a comparison: a line per trial, with its progress and its score when it is done."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

NO_LIMIT = 10**9  # steps of a run that something else ends


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
        self._shown: dict[str, TaskID] = {}

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def begin(self, name: str) -> None:
        """Something starts."""
        self._shown[name] = self._progress.add_task(name, total=None, note="starting")

    def event(self, event: dict[str, Any], name: str) -> None:
        """A worker's event about what runs under this name."""
        task = self._shown[name]
        if event["event"] == "progress":
            steps = event["steps"] if event["steps"] < NO_LIMIT else None
            note = f"step {event['step']}" + (f"/{steps}" if steps else "")
            self._progress.update(task, completed=event["step"], total=steps, note=note)
        elif event["event"] == "stage":
            self._progress.update(task, note=event["stage"])

    def end(self, note: str, name: str) -> None:
        """What ran has ended; `note` says how."""
        task = self._shown.pop(name)
        total = next(one.total for one in self._progress.tasks if one.id == task) or 1
        self._progress.update(task, completed=total, total=total, note=note)
        self._progress.stop_task(task)
        if not self.console.is_terminal:
            self.say(f"{name:<32} {note}")

    def say(self, text: str) -> None:
        """A line of text above the bars."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)
