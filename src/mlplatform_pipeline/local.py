"""Run a pipeline on this machine with Kubeflow's own local runner, which needs no Docker.

Each step is a process of its own, as it is a pod of its own on a cluster. What a step returned is kept, so that a run
that was stopped goes on where it stopped when it is started again.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from kfp import local
from kfp.local import logging_utils, subprocess_task_handler

from mlplatform.errors import PlatformError

ENDED = re.compile(r"Task \S*'(?P<step>[\w-]+)'\S* finished with status \S*(?P<status>SUCCESS|FAILURE)")


class PipelineError(PlatformError, RuntimeError):
    """A step failed."""


@dataclass(frozen=True)
class LocalRun:
    """What a local run left.

    Attributes:
        outputs: The pipeline's outputs by name.
        folder: Where the output of each step is.
        ran: What each step that ran returned, by its folder; a step that was taken from the cache is not among them.
        log: What the runner and the steps said.
    """

    outputs: dict[str, Any]
    folder: Path
    ran: dict[str, dict[str, Any]]
    log: str


def run(
    pipeline: Any, arguments: Mapping[str, Any], root: Path, *, notify: Callable[[str], None] = lambda _: None
) -> LocalRun:
    """Run a pipeline here.

    Args:
        pipeline: A function with `@dsl.pipeline`.
        arguments: Its parameters by name.
        root: Folder for what steps return, and for the cache.
        notify: Called with a line when a step ends.

    Raises:
        PipelineError: A step failed; the message names it and its last line.
    """
    # A folder for each run: two may run side by side, and share what is cached.
    folder = root / f"{pipeline.name}-{uuid4().hex[:8]}"
    local.init(
        local.SubprocessRunner(use_venv=False),
        pipeline_root=str(folder),
        enable_caching=True,
        cache_root=str(root / "cache"),
    )
    said = _Lines(notify)
    try:
        with said.everything(), _one_log(), _once(pipeline), _quiet(), _quoted():
            finished = pipeline(**arguments)
    except RuntimeError as error:
        raise PipelineError(f"{pipeline.name}: {_reason(said.getvalue())}") from error
    return LocalRun(dict(finished.outputs), folder, read_outputs(folder), said.getvalue())


def read_outputs(folder: Path) -> dict[str, dict[str, Any]]:
    """Read what each step of a run left, by its folder below the run's."""
    return {
        "/".join(path.parent.relative_to(folder).parts[1:]): json.loads(path.read_text()).get("parameterValues", {})
        for path in sorted(folder.rglob("executor_output.json"))
    }


class _Lines(io.StringIO):
    """Keep what is written, and tell of each step that ends."""

    def __init__(self, notify: Callable[[str], None]) -> None:
        super().__init__()
        self._notify = notify

    @contextlib.contextmanager
    def everything(self) -> Iterator[None]:
        """Take what this process prints."""
        with contextlib.redirect_stdout(self), contextlib.redirect_stderr(self):
            yield

    def write(self, text: str) -> int:
        for match in ENDED.finditer(text):
            self._notify(f"{match['step']}: {match['status'].lower()}")
        return super().write(text)


def _reason(said: str) -> str:
    """Find the step that failed and the last line of its trace."""
    failed = [match["step"] for match in ENDED.finditer(said) if match["status"] == "FAILURE"]
    errors = re.findall(r"^ *(?:[\w.]+\.)?(\w+(?:Error|Exception): .*)$", said, re.MULTILINE)
    return f"step {failed[0] if failed else 'unknown'} failed: {errors[-1] if errors else 'see the log'}"


@contextlib.contextmanager
def _once(pipeline: Any) -> Iterator[None]:
    """Leave retries to clusters: here whoever looks wants to know at once."""
    spec = pipeline.pipeline_spec
    kept = type(spec)()
    kept.CopyFrom(spec)
    for dag in [spec.root.dag, *(component.dag for component in spec.components.values())]:
        for task in dag.tasks.values():
            task.ClearField("retry_policy")
    try:
        yield
    finally:
        spec.CopyFrom(kept)


def _quoted() -> contextlib.AbstractContextManager[None]:
    """Let the interpreter lie in a folder with a space: the runner puts its path into a line of the shell as it is."""
    replace = subprocess_task_handler.replace_python_executable
    return _replaced(
        subprocess_task_handler,
        replace_python_executable=lambda command, python: replace(command, shlex.quote(python)),
    )


@contextlib.contextmanager
def _one_log() -> Iterator[None]:
    """Change the log once for the whole run, and `print` not at all.

    The runner changes both for each step and then puts back what it found: where steps overlap that is another step's,
    which would stay for good.
    """
    leave = contextlib.nullcontext
    once = logging_utils.local_logger_context()
    with once, _replaced(logging_utils, local_logger_context=leave, indented_print=leave):
        yield


@contextlib.contextmanager
def _replaced(module: Any, **replacements: Any) -> Iterator[None]:
    before = {name: getattr(module, name) for name in replacements}
    vars(module).update(replacements)
    try:
        yield
    finally:
        vars(module).update(before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        # The runner doubts an image whose name lacks "python"; here it takes none at all.
        warnings.filterwarnings("ignore", "You may be attemping to run a task", RuntimeWarning)
        yield
