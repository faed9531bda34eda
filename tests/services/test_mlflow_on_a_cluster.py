"""MLflow's server with the settings that the manifests and the secrets give it on a cluster."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import requests
from manifests import compose, of_kind, pod_spec, render

from mlplatform_ops.cluster.credentials import changed_values, derived_files
from mlplatform_ops.ports import free_port

OLD = changed_values({})
USERS = "/api/2.0/mlflow/users/list"
# The command in deploy/production.md.
DELETE_USER = """import sys; from mlflow.server.auth.client import AuthServiceClient as Client
Client(sys.argv[1]).delete_user(sys.argv[2])"""


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Mapping[str, str]], str]]:
    """Start a server with the given secrets, on the databases that all share, and return its address."""
    shared = tmp_path_factory.mktemp("databases")
    manifests = render(compose(tmp_path_factory.mktemp("production"), overlay="production", components=["ingress"]))
    mlflow = next(item for item in of_kind(manifests, "Deployment") if item["metadata"]["name"] == "mlflow")
    env = {entry["name"]: entry.get("value", "") for entry in pod_spec(mlflow)["containers"][0]["env"]}

    def start_one(values: Mapping[str, str]) -> str:
        folder, port = tmp_path_factory.mktemp("server"), free_port()
        users = derived_files(values, postgres=False, seaweedfs=True)["basic_auth.ini"]
        (folder / "basic_auth.ini").write_text(users.replace("/var/lib/mlflow", str(shared)))
        environ = {
            **{name: value for name, value in env.items() if name.startswith("MLFLOW_")},
            "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{shared}/mlflow.db",
            "MLFLOW_AUTH_CONFIG_PATH": str(folder / "basic_auth.ini"),
            "MLFLOW_FLASK_SERVER_SECRET_KEY": values["MLFLOW_FLASK_SERVER_SECRET_KEY"],
        }
        options = [f"--port={port}", "--app-name=basic-auth", f"--allowed-hosts={env['ALLOWED_HOSTS']}", "--workers=1"]
        running.enter_context(_running([sys.executable, "-m", "mlflow", "server", *options], folder, environ))
        server = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 120
        while _status(server, path="/health") != 200:
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.2)
        return server

    with ExitStack() as running:
        yield start_one


@pytest.fixture(scope="module")
def server(start: Callable[[Mapping[str, str]], str]) -> str:
    return start(OLD)


@contextmanager
def _running(command: list[str], folder: Path, environ: Mapping[str, str]) -> Iterator[None]:
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, env={**os.environ, **environ}, stdout=log, stderr=log)
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(timeout=60)
            finally:
                process.kill()


def _status(server: str, values: Mapping[str, str] = OLD, *, path: str = USERS) -> int:
    login = (values["MLFLOW_ADMIN_USERNAME"], values["MLFLOW_ADMIN_PASSWORD"])
    try:
        return requests.get(server + path, auth=login, timeout=10).status_code
    except requests.RequestException:
        return 0


@pytest.mark.parametrize(
    ("host", "origin", "expected"),
    [
        ("mlflow.example.com", "https://mlflow.example.com", 200),
        ("localhost:5000", "http://localhost:5000", 200),
        ("mlflow:5000", None, 200),
        ("mlflow.example.com", "https://elsewhere.example.com", 403),
        ("elsewhere.example.com", "https://mlflow.example.com", 403),
    ],
)
def test_browsers_are_answered_at_the_ingress_and_at_no_other_page(
    server: str, host: str, origin: str | None, expected: int
) -> None:
    reply = requests.post(
        f"{server}/ajax-api/2.0/mlflow/experiments/search",
        json={"max_results": 1},
        headers={"Host": host} | ({"Origin": origin} if origin else {}),
        auth=(OLD["MLFLOW_ADMIN_USERNAME"], OLD["MLFLOW_ADMIN_PASSWORD"]),
        timeout=10,
    )
    assert reply.status_code == expected


def test_a_new_admin_works_beside_the_old_one_until_that_is_deleted(
    server: str, start: Callable[[Mapping[str, str]], str]
) -> None:
    """As while a Deployment is rolled out: servers with the old and the new file share their databases."""
    new = changed_values(OLD, rotate=["mlflow"])
    assert (_status(server), _status(server, new)) == (200, 401)
    other = start(new)
    assert (_status(server, new), _status(other)) == (200, 200)
    login = {f"MLFLOW_TRACKING_{name}": new[f"MLFLOW_ADMIN_{name}"] for name in ("USERNAME", "PASSWORD")}
    delete = [sys.executable, "-c", DELETE_USER, other, new["MLFLOW_ADMIN_USERNAME_PREVIOUS"]]
    subprocess.run(delete, env={**os.environ, **login}, check=True)
    assert (_status(other), _status(other, new)) == (401, 200)
