"""An overlay of `deploy/`: what it is made of, and the secret files that it reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from mlplatform.errors import ClusterError

FOLDER = "secrets"


def read_kustomization(overlay: Path) -> dict[str, Any]:
    """Read what an overlay is made of.

    Raises:
        ClusterError: There is no such overlay.
    """
    try:
        return dict(yaml.safe_load((overlay / "kustomization.yaml").read_text()))
    except FileNotFoundError:
        raise ClusterError(f"no overlay at {overlay}; name one that is there: OVERLAY=local") from None


def wanted_files(overlay: Path) -> set[str]:
    """List the secret files that an overlay's kustomization reads.

    Raises:
        ClusterError: There is no such overlay.
    """
    kustomization = read_kustomization(overlay)
    entries = [
        path for g in kustomization.get("secretGenerator", ()) for path in (*g.get("files", ()), *g.get("envs", ()))
    ]
    return {Path(entry.split("=", 1)[-1]).name for entry in entries}


def read_env(path: Path) -> dict[str, str]:
    """Read `NAME=value` lines.

    Raises:
        ClusterError: The file is not there.
    """
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:
        raise ClusterError(missing_file(path)) from None
    return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))


def missing_file(path: Path) -> str:
    """Say that a secret file is missing, and what to do."""
    return (
        f"the secret file {path} is missing; run 'make k8s-secrets' for a new cluster, "
        "or put the folder back from where your team keeps it"
    )


def namespace_of(overlay: Path) -> str:
    """Read the namespace that an overlay names.

    Raises:
        ClusterError: It names none.
    """
    namespace = read_kustomization(overlay).get("namespace")
    if not namespace:
        raise ClusterError(
            f"{overlay / 'kustomization.yaml'} names no namespace; add one, such as namespace: mlplatform"
        )
    return str(namespace)
