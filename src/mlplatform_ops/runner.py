"""Run notebooks headlessly, in the order that they need each other, and read what they found.

A notebook's metadata names the notebooks whose results it needs, under `mlplatform.needs`, and the on-demand services,
under `mlplatform.services`, and the group of packages that it needs beside the base's, under `mlplatform.group`.
Notebooks that do not depend on each other run side by side.
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

from mlplatform.errors import NotebookError, PlatformError

# Two at a time: a third kernel gains nothing on the two cores of a small CI machine.
AT_ONCE = 2
CELL_TIMEOUT_S = 600
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# The module of each group of packages that tells whether the group is installed.
GROUPS = {"pipelines": "kfp", "serving": "bentoml", "drift": "evidently", "scale": "distributed"}

Parameters = Mapping[str, Mapping[str, object]]
# Takes a notebook's name and how many of its code cells have run; None when it has ended.
Progress = Callable[[str, int | None], None]


@dataclass(frozen=True)
class Execution:
    """How one notebook ran.

    Attributes:
        name: The notebook's file name without its suffix.
        executed: The executed copy, with outputs.
        seconds: Wall time, from the kernel's start to its end.
        error: One line, empty when the notebook succeeded.
        skipped: Whether it was not run because one that it needs had failed, or all were stopped before.
        stopped: Whether it was running when a signal stopped all of them.
        unchanged: Whether an earlier copy was kept, since another run would give the same.
    """

    name: str
    executed: Path
    seconds: float = 0.0
    error: str = ""
    skipped: bool = False
    stopped: bool = False
    unchanged: bool = False


def find_notebooks(folder: Path, *, groups: bool = False) -> list[Path]:
    """List the notebooks of a folder in the order of their names.

    Args:
        folder: Where they lie.
        groups: Whether to list those too that need a group of packages beside the base's.

    Raises:
        NotebookError: There is none.
    """
    found = [path for path in sorted(folder.glob("[0-9]*.ipynb")) if groups or not group(path)]
    if not found:
        raise NotebookError(f"no notebook in {folder}; run this inside a clone of the repository")
    return found


def group(notebook: Path) -> str:
    """Read which group of packages a notebook needs beside the base's; empty for none."""
    return str(_metadata(notebook).get("group", ""))


def check_group(notebook: Path) -> None:
    """Make sure that the packages are installed that a notebook needs.

    Raises:
        NotebookError: Its group is not installed, or there is no such group.
    """
    name = group(notebook)
    if name and name not in GROUPS:
        raise NotebookError(f"{notebook.stem} names the group {name!r}; there are: {', '.join(GROUPS)}")
    if name:
        require_group(name, what=notebook.stem)


def require_group(name: str, *, what: str) -> None:
    """Make sure that a group of packages is installed.

    Args:
        name: One of `GROUPS`.
        what: What needs it, for the message.

    Raises:
        NotebookError: It is not installed.
    """
    if find_spec(GROUPS[name]) is None:
        raise NotebookError(f"{what} needs the packages of the group {name!r}; run 'make .venv/.{name}'")


@contextmanager
def claim_folder(folder: Path) -> Iterator[Path]:
    """Keep a folder for executed copies to one run: a second run at the same time gets `<folder>-2`, and so on.

    Args:
        folder: Where copies go when nobody else writes there.
    """
    from filelock import FileLock, Timeout

    _make_folder(folder.parent)
    number = 1
    while True:
        chosen = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        try:
            with FileLock(chosen.with_name(f".{chosen.name}.lock"), timeout=0):
                yield chosen
                return
        except Timeout:
            number += 1


def needs(notebook: Path) -> set[str]:
    """Read which notebooks a notebook needs to have run, by name."""
    return set(_metadata(notebook).get("needs", ()))


def services(notebook: Path) -> set[str]:
    """Read which on-demand services a notebook needs to be running, by name."""
    return set(_metadata(notebook).get("services", ()))


def _metadata(notebook: Path) -> dict[str, Any]:
    return dict(json.loads(notebook.read_text())["metadata"].get("mlplatform", {}))


def select(notebooks: Iterable[Path], names: Iterable[str]) -> list[Path]:
    """Pick notebooks by name, with those that they need.

    Args:
        notebooks: All there are.
        names: Names without suffix; a unique beginning such as `02` is enough. None at all picks every notebook.

    Raises:
        NotebookError: A name fits no notebook, or several.
    """
    known = {path.stem: path for path in notebooks}
    wanted = [complete(name, known) for name in names] or list(known)
    chosen: set[str] = set()
    while wanted:
        name = wanted.pop()
        if name not in chosen:
            chosen.add(name)
            wanted.extend(needs(known[name]) & known.keys())
    return [known[name] for name in sorted(chosen)]


def check_parameters(notebook: Path, parameters: Mapping[str, object]) -> None:
    """Make sure that a notebook declares every parameter that it is to be given.

    Papermill itself only warns, and runs the notebook with the value it would have had anyway.

    Raises:
        NotebookError: It does not declare one; the message lists those that it does.
    """
    if parameters:
        from papermill import inspect_notebook

        declared = inspect_notebook(str(notebook))
        for name in parameters:
            if name not in declared:
                known = ", ".join(declared) or "none"
                raise NotebookError(f"{notebook.stem} has no parameter {name!r}; it has: {known}")


def run_all(
    notebooks: Iterable[Path],
    output: Path,
    *,
    parameters: Parameters | None = None,
    notify: Callable[[str], None] = lambda _: None,
    progress: Progress = lambda _name, _done: None,
    diagnose: Callable[[], None] = lambda: None,
) -> list[Execution]:
    """Run notebooks, each as soon as those that it needs have succeeded.

    Ctrl-C, SIGTERM and a terminal that closes end the kernels at once; what was not run yet is skipped.

    Args:
        notebooks: Paths of notebooks. What one needs and is not among them counts as done.
        output: Where executed copies go; made if missing.
        parameters: Values by parameter, by notebook name.
        notify: Called with a line when a notebook ends.
        progress: Called with a notebook's name and how many of its code cells have run; None when it has ended.
        diagnose: Called after a failure; raises a `PlatformError` that names a service which does not answer.

    Returns:
        One entry per notebook, in the order of their names. A failure does not stop those that do not need it.

    Raises:
        NotebookError: A parameter is not declared, or the notebooks need each other in a circle.
    """
    paths = {path.stem: path for path in notebooks}
    given = parameters or {}
    for name in given:
        if name not in paths:
            raise NotebookError(f"parameters for {name!r}, which is not run; known: {', '.join(paths)}")
        check_parameters(paths[name], given[name])
    order = TopologicalSorter({name: needs(path) & paths.keys() for name, path in paths.items()})
    try:
        order.prepare()
    except CycleError as error:
        raise NotebookError(f"notebooks need each other in a circle: {' -> '.join(error.args[1])}") from None
    _make_folder(output)

    done: dict[str, Execution] = {}
    running: dict[Future[Execution], str] = {}
    with _temporary_folder(), _Stop() as stop, ThreadPoolExecutor(AT_ONCE) as pool:
        while order.is_active():
            for name in order.get_ready():
                if stop.asked or any(
                    done[need].error or done[need].skipped for need in needs(paths[name]) & paths.keys()
                ):
                    done[name] = Execution(name, output / paths[name].name, skipped=True)
                    order.done(name)
                else:
                    running[
                        pool.submit(
                            execute, paths[name], output, given.get(name, {}), notify, progress, diagnose, stop=stop
                        )
                    ] = name
            # A short wait: a kernel that was being started when all were to stop is ended in the next round.
            finished, _ = wait(running, 0.5, return_when=FIRST_COMPLETED) if running else ((), ())
            if stop.asked:
                stop.end_kernels()
            for future in finished:
                done[running.pop(future)] = future.result()
                order.done(future.result().name)
    return [done[name] for name in sorted(done)]


@contextmanager
def _temporary_folder() -> Iterator[None]:
    """Give kernels a temporary folder that ends with the block: MLflow leaves in it what it downloads."""
    before = os.environ.get("TMPDIR")
    with TemporaryDirectory(prefix="mlplatform-") as folder:
        os.environ["TMPDIR"] = folder
        try:
            yield
        finally:
            del os.environ["TMPDIR"]
            if before is not None:
                os.environ["TMPDIR"] = before


class _Stop:
    """Take the signals that stop a run for the time of the block, which runs in the main thread or is not stopped."""

    def __init__(self) -> None:
        self.asked = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> _Stop:
        with suppress(ValueError):  # signals can be taken in the main thread only
            for number in STOPS:
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _: FrameType | None) -> None:
        self.asked = number
        self.end_kernels()

    def end_kernels(self) -> None:
        """End every kernel of this process, and what it has started; forwards to a cluster are needed for longer."""
        import psutil

        for child in psutil.Process().children():
            with suppress(psutil.Error):
                if "ipykernel_launcher" in child.cmdline():
                    for process in (*child.children(recursive=True), child):
                        with suppress(psutil.Error):
                            process.kill()


def _make_folder(output: Path) -> None:
    try:
        output.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise NotebookError(
            f"cannot write to {output} ({error.strerror}); free it, or give another --output"
        ) from error


def execute(
    notebook: Path,
    output: Path,
    parameters: Mapping[str, object],
    notify: Callable[[str], None],
    progress: Progress = lambda _name, _done: None,
    diagnose: Callable[[], None] = lambda: None,
    stop: _Stop | None = None,
) -> Execution:
    """Run one notebook in its own folder and keep the executed copy, whether it succeeded or not.

    The copy of an earlier run is replaced when this one has ended, so a full disk never leaves an empty one.

    Args:
        notebook: The notebook.
        output: The folder for the executed copy.
        parameters: Values by parameter.
        notify: Called with a line at the end.
        progress: Called at the start, after each code cell and at the end, as `Progress` says.
        diagnose: Raises a `PlatformError` that names a service which does not answer.
        stop: Says whether all kernels were ended on purpose.
    """
    import papermill
    from traitlets.config import Config

    executed = output / notebook.name
    if stop and stop.asked:
        return Execution(notebook.stem, executed, skipped=True)
    progress(notebook.stem, 0)
    done = count(1)
    partial = output / f".running-{notebook.name}"
    start = time.monotonic()
    problem = ""
    # A kernel of this environment, even where the user has one of the same name.
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"
    # Kernels share the cores. On busy ones the threads of a small matrix product wait for each other ten times as long.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // AT_ONCE)))
    try:
        papermill.execute_notebook(
            str(notebook),
            str(partial),
            dict(parameters),
            # Papermill's own `cwd` changes the folder of the whole process, under the feet of what runs beside this.
            resources={"metadata": {"path": str(notebook.parent.resolve())}},
            kernel_name="python3",
            progress_bar=False,
            execution_timeout=CELL_TIMEOUT_S,
            on_cell_executed=lambda **_: progress(notebook.stem, next(done)),
            # What a kernel is sent would else cross loopback readable by others on this machine.
            config=Config({"KernelManager": {"transport_encryption": "required"}}),
        )
    except papermill.PapermillExecutionError as error:
        reason = f"{error.ename}: {error.evalue}".strip().splitlines()[0]
        problem = f"In [{error.exec_count}]: {reason}"
    except OSError as error:
        problem = f"cannot write to {output}: {error.strerror or error}"
    except Exception as error:
        # A kernel that died or a cell that took too long: each has an exception class of its own library.
        kind = {"DeadKernelError": "the kernel died", "CellTimeoutError": f"no end after {CELL_TIMEOUT_S} s"}
        name = type(error).__name__
        problem = f"{_unfinished_cell(partial)}: {kind.get(name, f'{name}: {error}'.strip().splitlines()[0])}"
    seconds = time.monotonic() - start
    progress(notebook.stem, None)
    if stop and stop.asked:
        partial.unlink(missing_ok=True)
        notify(f"{notebook.stem} stopped after {seconds:.1f} s")
        return Execution(notebook.stem, executed, seconds, "stopped", stopped=True)
    if problem:
        try:
            diagnose()
        except PlatformError as error:
            problem = f"{problem}; {error}"
    lost = _keep(partial, executed)
    problem = problem or lost
    notify(f"{notebook.stem} {'FAILED: ' + problem if problem else 'done'} after {seconds:.1f} s")
    return Execution(notebook.stem, executed, seconds, problem)


def _keep(partial: Path, executed: Path) -> str:
    """Put an executed copy in its place.

    Returns:
        What went wrong, empty when nothing did.
    """
    try:
        # What a full disk left is no notebook, and must not replace one.
        json.loads(partial.read_text())
        partial.replace(executed)
    except (OSError, ValueError) as error:
        partial.unlink(missing_ok=True)
        return f"cannot write {executed}: {getattr(error, 'strerror', None) or 'it was cut off'}"
    return ""


def _unfinished_cell(executed: Path) -> str:
    """Name the last cell that an executed copy started, by its place and its first line.

    Papermill may have marked it as completed already: it does so whatever ended the cell.
    """
    name = "before its first cell"
    with suppress(OSError, ValueError, KeyError):
        for place, cell in enumerate(json.loads(executed.read_text())["cells"], start=1):
            if cell["metadata"].get("papermill", {}).get("start_time") and cell["cell_type"] == "code":
                first = re.sub(r"\s+", " ", "".join(cell["source"]).strip().splitlines()[0])
                name = f"cell {place} ({first[:60]})"
    return name


def complete(name: str, known: Collection[str]) -> str:
    """Find the notebook that a name or a unique beginning of one means.

    Raises:
        NotebookError: It fits none, or several.
    """
    matches = [stem for stem in known if stem == name.removesuffix(".ipynb")] or [
        stem for stem in known if stem.startswith(name)
    ]
    if len(matches) != 1:
        found = "fits several" if matches else "is not there"
        raise NotebookError(f"notebook {name!r} {found}; there are: {', '.join(known)}")
    return matches[0]
