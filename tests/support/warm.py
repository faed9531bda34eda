"""Processes of their own that need not import Feast and MLflow again, which takes five seconds each."""

from __future__ import annotations

import multiprocessing
import os
import sys
import traceback
from multiprocessing.context import ForkServerContext
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired

BOUND_S = 300
PRELOADED = [
    "boto3",
    "feast.cli.cli",
    "mlflow.sklearn",
    "mlplatform.features",
    "mlplatform.registry",
    "skops.io",
    "xgboost",
]


def context() -> ForkServerContext:
    """Fork processes from one that has imported what takes long, and has no threads and no connections."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(PRELOADED)
    return made


def run_code(code: str, folder: Path) -> CompletedProcess[str]:
    """Do what `python -c code` does in a folder, with this process's environment."""
    said = folder / "said"
    process = context().Process(target=_run, args=(code, folder, dict(os.environ), said))
    process.start()
    process.join(BOUND_S)
    if process.is_alive():
        process.kill()
        raise TimeoutExpired(code, BOUND_S, said.read_text())
    return CompletedProcess(code, process.exitcode or 0, said.read_text())


def _run(code: str, folder: Path, environ: dict[str, str], said: Path) -> None:
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(folder)
    sys.path.insert(0, "")
    with said.open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    try:
        exec(code, {"__name__": "__main__"})  # noqa: S102 - a test's own
    except Exception:
        traceback.print_exc()
        sys.exit(1)
