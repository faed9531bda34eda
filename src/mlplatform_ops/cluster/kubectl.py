"""kubectl, which comes as a wheel: render and apply."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

from mlplatform.errors import ClusterError
from mlplatform_ops.cluster.overlay import FOLDER, missing_file, wanted_files

Manifest = dict[str, Any]


def render(overlay: Path) -> list[Manifest]:
    """Render an overlay.

    Raises:
        ClusterError: A secret file is missing, or the overlay is wrong.
    """
    for name in sorted(wanted_files(overlay)):
        if not (overlay / FOLDER / name).exists():
            raise ClusterError(missing_file(overlay / FOLDER / name))
    outcome = subprocess.run([kubectl_path(), "kustomize", str(overlay)], capture_output=True, text=True, check=False)
    if outcome.returncode:
        raise ClusterError(f"{overlay} can't be rendered: {' '.join(outcome.stderr.split())}")
    return [document for document in yaml.safe_load_all(outcome.stdout) if document]


def kubectl_path() -> str:
    """Find kubectl: beside this Python, or on PATH.

    Raises:
        ClusterError: It is not installed.
    """
    beside = Path(sys.executable).parent / "kubectl"
    found = str(beside) if beside.exists() else shutil.which("kubectl")
    if not found:
        raise ClusterError("kubectl is missing; run 'make install'")
    return found


def kubectl_command(context: str) -> list[str]:
    """Give the beginning of a kubectl command for a context."""
    return [kubectl_path(), "--context", context]
