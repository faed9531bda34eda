"""MLflow by its REST API, for commands: importing MLflow takes seconds, and a run that is being stopped has none."""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import psutil
import requests

from mlplatform.errors import service_down
from mlplatform.settings import Settings

# `make run` names itself in this variable, and MLflow runs carry the name as this tag.
RUN_VARIABLE = "MLPLATFORM_RUN"
RUN_TAG = "mlplatform.make_run"

TIMEOUT_S = 4.0


def new_run() -> str:
    """Name this process's run: `host/pid/second of start/digits`, by which another process sees whether it is alive."""
    process = psutil.Process(os.getpid())
    return f"{socket.gethostname()}/{process.pid}/{process.create_time():.0f}/{secrets.token_hex(4)}"


def is_dead(name: str) -> bool:
    """Say whether the process that a run was named after has ended; of another host, nothing is known."""
    try:
        host, pid, second, _ = name.rsplit("/", 3)
        if host != socket.gethostname():
            return False
        return abs(psutil.Process(int(pid)).create_time() - int(second)) > 1
    except psutil.NoSuchProcess:
        return True
    except (ValueError, psutil.Error):
        return False


def close_runs(settings: Settings, ended: Callable[[str], bool]) -> int:
    """Mark runs as KILLED which still say that they run.

    Args:
        settings: The platform.
        ended: Says, by the tag's value, whether the `make run` that made a run has ended.

    Returns:
        How many there were; 0 too when MLflow does not answer within seconds.
    """
    closed = 0
    with suppress(requests.RequestException, KeyError, ValueError):
        experiments = _ask(settings, "experiments/search", max_results=1000).get("experiments", [])
        found = _ask(
            settings,
            "runs/search",
            experiment_ids=[entry["experiment_id"] for entry in experiments],
            filter=f"attributes.status = 'RUNNING' and tags.`{RUN_TAG}` LIKE '%/%'",
            max_results=1000,
        )
        for run in found.get("runs", []):
            tags = {tag["key"]: tag["value"] for tag in run["data"].get("tags", [])}
            if ended(tags[RUN_TAG]):
                end_ms = int(time.time() * 1000)
                _ask(settings, "runs/update", run_id=run["info"]["run_id"], status="KILLED", end_time=end_ms)
                closed += 1
    return closed


def look_up(settings: Settings, method: str, **query: str) -> dict[str, Any] | None:
    """Send a request of MLflow's REST API that reads, such as `runs/get`; nothing if what is asked for is not there.

    Who shares the server is told of what is not there that it is not theirs.

    Raises:
        ServiceDownError: MLflow does not answer, or refuses.
    """
    try:
        answer = requests.get(_address(settings, method), params=query, timeout=TIMEOUT_S, **_login(settings))
        if answer.status_code == 404 or (settings.workspace and answer.status_code == 403):
            return None
        answer.raise_for_status()
        return dict(answer.json())
    except requests.RequestException as error:
        raise service_down("MLflow server", settings.tracking_uri) from error


def find_version(settings: Settings, name: str, alias: str) -> dict[str, Any] | None:
    """Find the version that holds an alias; nothing if there is no such model or alias.

    MLflow answers a question for an alias that is not there as if it were malformed, so the model is asked for.

    Raises:
        ServiceDownError: As in `look_up`.
    """
    found = look_up(settings, "registered-models/get", name=name) or {"registered_model": {}}
    versions = {entry["alias"]: entry["version"] for entry in found["registered_model"].get("aliases", ())}
    if alias not in versions:
        return None
    version = look_up(settings, "model-versions/get", name=name, version=versions[alias])
    return dict(version["model_version"]) if version else None


def _ask(settings: Settings, method: str, **body: Any) -> dict[str, Any]:
    answer = requests.post(_address(settings, method), json=body, timeout=TIMEOUT_S, **_login(settings))
    answer.raise_for_status()
    return dict(answer.json())


def _address(settings: Settings, method: str) -> str:
    return f"{settings.tracking_uri}/api/2.0/mlflow/{method}"


def _login(settings: Settings) -> dict[str, Any]:
    # The header by which MLflow's own client names a workspace.
    return {
        "auth": (settings.tracking_username, settings.tracking_password),
        "headers": {"X-MLFLOW-WORKSPACE": settings.workspace} if settings.workspace else {},
    }
