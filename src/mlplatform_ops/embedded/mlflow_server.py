"""Run `mlflow server` as one process: `python -m mlplatform_ops.embedded.mlflow_server` and its options.

MLflow 3.17 prepares an environment, starts uvicorn as a child and waits. When the child is killed, the parent ends with
status 0; when the parent is killed, the child keeps the port. Here uvicorn runs in the parent, which also imports
MLflow once instead of twice.

A start is mostly imports (3.3 of 3.7 s of a core), and a killed server is back when they are done. Looking for garbage
among what has just been imported, again and again, would take a fifth more; there is none.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn


def _run_here(command: Sequence[object], *, extra_env: Mapping[str, str], **_: object) -> NoReturn:
    from uvicorn.main import main

    os.environ.update(extra_env)
    gc.freeze()  # what is imported stays, and is never looked at again
    gc.enable()
    words = [str(word) for word in command]
    main(words[words.index("uvicorn") + 1 :], prog_name="uvicorn")
    sys.exit(0)


if __name__ == "__main__":
    gc.disable()
    import mlflow.server
    from mlflow.cli import cli

    mlflow.server._exec_cmd = _run_here  # type: ignore[assignment, attr-defined]
    cli(prog_name="mlflow")
