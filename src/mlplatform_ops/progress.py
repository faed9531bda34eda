"""Show how far `make run` is: on a terminal a bar for each notebook that runs and one for all, else plain lines."""

from __future__ import annotations

import heapq
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from graphlib import TopologicalSorter
from pathlib import Path

from mlplatform_ops.console import say
from mlplatform_ops.runner import AT_ONCE, Progress, needs


@contextmanager
def shown(notebooks: Iterable[Path], output: Path) -> Iterator[Progress]:
    """Show progress for as long as the block runs.

    Args:
        notebooks: Those that are run.
        output: Where the last run's executed copies are: they say how long each took.
    """
    paths = {path.stem: path for path in notebooks}
    expected = {name: last_seconds(output / path.name) for name, path in paths.items()}
    if paths and sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        with _bars(paths, expected) as progress:
            yield progress
    else:
        yield lambda name, done: say(f"{name} starts{_last_time(expected[name])}") if done == 0 else None


def last_seconds(executed: Path) -> float:
    """Read how long a notebook took when it last ran; 0 where that is not known."""
    try:
        return float(json.loads(executed.read_text())["metadata"]["papermill"]["duration"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0.0


def total_seconds(needed: Mapping[str, set[str]], expected: Mapping[str, float]) -> float:
    """Add up how long notebooks take when two at a time run, each after those that it needs.

    Args:
        needed: Which others each needs, by name.
        expected: Seconds by name; 0 for one that never ran.

    Returns:
        Seconds; 0 when one of them never ran.
    """
    if not all(expected[name] for name in needed):
        return 0.0
    order = TopologicalSorter(needed)
    order.prepare()
    now, waiting, running = 0.0, list[str](), list[tuple[float, str]]()
    while order.is_active():
        waiting += sorted(order.get_ready())
        while waiting and len(running) < AT_ONCE:
            name = waiting.pop(0)
            heapq.heappush(running, (now + expected[name], name))
        now, name = heapq.heappop(running)
        order.done(name)
    return now


def _last_time(seconds: float) -> str:
    return f" ({_minutes(seconds)} the last time)" if seconds else ""


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


@contextmanager
def _bars(paths: Mapping[str, Path], expected: Mapping[str, float]) -> Iterator[Progress]:
    """Draw the bars below what is said meanwhile: Rich prints above them what others write to standard error."""
    import rich.progress
    from rich.console import Console
    from rich.text import Text

    class Time(rich.progress.ProgressColumn):
        """The time so far, and what the last run took."""

        def render(self, task: rich.progress.Task) -> Text:
            last = task.fields["last"]
            return Text(f"{_minutes(task.elapsed or 0)}{f' of {_minutes(last)}' if last else ''}")

    cells = {name: _code_cells(path) for name, path in paths.items()}
    needed = {name: needs(path) & paths.keys() for name, path in paths.items()}
    columns = (
        "{task.description}",
        rich.progress.BarColumn(bar_width=None),
        "{task.completed}/{task.total} cells",
        Time(),
    )
    counted = dict.fromkeys(paths, 0)
    display = rich.progress.Progress(
        *columns, console=Console(stderr=True, soft_wrap=True), expand=True, refresh_per_second=4, transient=True
    )
    everything = display.add_task("all", total=sum(cells.values()), last=total_seconds(needed, expected))
    bars = {
        name: display.add_task(name, total=cells[name], last=expected[name], start=False, visible=False)
        for name in paths
    }

    def progress(name: str, done: int | None) -> None:
        if done == 0:
            display.start_task(bars[name])
        elif done:
            # Papermill adds a cell for the parameters that it was given.
            counted[name] = min(done, cells[name])
            display.update(everything, completed=sum(counted.values()))
        display.update(bars[name], completed=counted[name], visible=done is not None)

    display.start()
    try:
        yield progress
    finally:
        # The terminal may be closed, which is one way to stop a run.
        with suppress(OSError):
            display.stop()


def _code_cells(notebook: Path) -> int:
    return sum(cell["cell_type"] == "code" for cell in json.loads(notebook.read_text())["cells"])
