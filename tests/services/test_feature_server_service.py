"""The feature server and the Feast UI as processes, on the platform."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import requests

from mlplatform import feature_client, features, history
from mlplatform.errors import CredentialsError, RegistryError, ServiceDownError
from mlplatform.settings import Settings
from mlplatform_ops.feast_servers.feature_server import StoreWatcher
from mlplatform_ops.ports import free_port

ROOT = Path(__file__).parents[2]
TOKEN = "test-token"  # noqa: S105 - of servers that live for one test
STEADY = {"features": ["demographic:Sex"], "entities": {"user_id": [history.STEADY_USER]}}


@contextmanager
def running(module: str, repo: Path) -> Iterator[str]:
    """Run one of our servers on a free port, and give its address once it is ready."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", module, "--port", str(port)], cwd=repo, env={**os.environ, "FEATURE_SERVER_TOKEN": TOKEN}
    )
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 180
        while time.monotonic() < deadline:
            assert process.poll() is None, f"{module} ended with {process.returncode}"
            with suppress(requests.RequestException):
                if requests.get(f"{url}/health", timeout=20).status_code != 503:
                    break
            time.sleep(0.1)
        else:
            pytest.fail(f"{module} does not answer")
        yield url
    finally:
        process.terminate()
        try:
            process.wait(timeout=60)
        finally:
            process.kill()


@pytest.fixture(scope="module")
def built(platform: Settings) -> Settings:
    features.build(ROOT / "data" / "income_data.csv", ROOT / "feature_repo")
    return platform


@pytest.fixture(scope="module")
def server(built: Settings) -> Iterator[str]:
    with running("mlplatform_ops.feast_servers.feature_server", ROOT / "feature_repo") as url:
        yield url


@pytest.fixture(scope="module")
def environ(server: str) -> dict[str, str]:
    return {"FEATURE_SERVER_URL": server, "FEATURE_SERVER_TOKEN": TOKEN}


def test_the_documented_user_is_answered_as_documented(server: str):
    reply = requests.post(
        f"{server}/get-online-features", json=STEADY, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=20
    )
    assert reply.status_code == 200
    answer = reply.json()
    column = answer["results"][answer["metadata"]["feature_names"].index("Sex")]
    assert column == {"values": ["Male"], "statuses": ["PRESENT"], "event_timestamps": ["2023-01-24T06:52:20Z"]}


def test_over_http_and_through_the_sdk_the_answers_are_the_same(built: Settings, environ: dict[str, str]):
    store = features.open_store(ROOT / "feature_repo")
    users = [history.STEADY_USER, history.CHANGING_USER, "a-stranger"]
    for names in (feature_client.SERVICE, ["occupation:Education", "demographic:Sex"]):
        by_http = feature_client.read_server(users, names, environ=environ)
        assert by_http.equals(features.read_online(store, users, names))
        assert by_http["found"].tolist() == [True, True, False]


def test_without_the_token_nothing_is_read(server: str, environ: dict[str, str]):
    assert requests.post(f"{server}/get-online-features", json=STEADY, timeout=20).status_code == 401
    with pytest.raises(CredentialsError, match="refuses the token; check FEATURE_SERVER_TOKEN"):
        feature_client.read_server(["x"], environ={**environ, "FEATURE_SERVER_TOKEN": "other"})


def test_nothing_is_written(server: str):
    for path in ("push", "write-to-online-store", "materialize", "materialize-incremental"):
        reply = requests.post(f"{server}/{path}", json={}, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=20)
        assert reply.status_code == 403, path


def test_a_misspelt_name_is_an_error_and_not_a_null(environ: dict[str, str]):
    for names in (["demografic:Sex"], ["demographic:Sexx"], "income_v9"):
        with pytest.raises(RegistryError, match=r"answers 4|answers 5"):
            feature_client.read_server(["x"], names, environ=environ)


def test_a_server_that_is_not_there_is_named_with_what_to_run(environ: dict[str, str]):
    with pytest.raises(ServiceDownError, match="does not answer; run 'make serve'"):
        feature_client.read_server(["x"], environ={**environ, "FEATURE_SERVER_URL": "http://127.0.0.1:9"})


def test_a_server_started_before_there_are_features_serves_them_as_soon_as_there_are(built: Settings, tmp_path: Path):
    repo = _without_registry(tmp_path)
    with running("mlplatform_ops.feast_servers.feature_server", repo) as url:
        environ = {"FEATURE_SERVER_URL": url, "FEATURE_SERVER_TOKEN": TOKEN}
        with pytest.raises(ServiceDownError, match=r"503 .*no features are registered yet; run 'make features'"):
            feature_client.read_server([history.STEADY_USER], environ=environ)
        features.apply(repo)
        deadline = time.monotonic() + 30
        while requests.get(f"{url}/health", timeout=20).json()["detail"] != "serving":
            assert time.monotonic() < deadline, "the server never noticed the registry"
            time.sleep(0.2)
        # The same project, so the values loaded before are there.
        assert feature_client.read_server([history.STEADY_USER], environ=environ)["found"].tolist() == [True]


def test_the_ui_shows_what_is_registered_and_changes_nothing(built: Settings):
    with running("mlplatform_ops.feast_servers.feature_ui", ROOT / "feature_repo") as url:
        assert "Feast" in requests.get(f"{url}/p/income", timeout=20).text
        for kind, count in {"feature_views": 3, "feature_services": 1, "data_sources": 3}.items():
            answer = requests.get(f"{url}/api/v1/{kind}", params={"project": "income"}, timeout=20).json()
            listed = next(value for value in answer.values() if isinstance(value, list))
            assert len(listed) == count, kind
        refused = requests.delete(f"{url}/api/v1/feature_views/demographic", params={"project": "income"}, timeout=20)
        assert refused.status_code == 403
        assert requests.get(url, headers={"Host": "elsewhere.example"}, timeout=20).status_code == 400


@pytest.mark.parametrize(
    "body",
    [
        {"entities": {"user_id": [None]}},
        {"entities": {"user_id": [["x"]]}},
        {"entities": {"user_id": [{"x": 1}]}},
        {"entities": {"user_id": []}},
        {"entities": {}},
        {},
        {"entities": {"user_id": ["\ud800"]}},
        {"entities": {"stranger": ["x"]}},
        {"entities": {"user_id": ["x"]}, "features": [7]},
        {"entities": {"user_id": ["x"]}, "features": None},
        {"entities": {"user_id": ["x"]}, "feature_service": ["a"]},
        {"entities": {"user_id": ["x"]}, "features": []},
        {"entities": {"user_id": ["x"]}, "features": [":"]},
        {"entities": {"user_id": ["x"]}, "features": ["no-colon"]},
        {"entities": {"user_id": ["x\0"]}, "full_feature_names": "maybe"},
    ],
    ids=str,
)
def test_a_question_of_a_wrong_form_is_the_askers_fault(server: str, body: dict[str, Any]) -> None:
    asked = {"features": ["demographic:Sex"]} | body
    reply = requests.post(
        f"{server}/get-online-features", json=asked, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=20
    )
    assert (reply.status_code, bool(reply.text)) == (422, True), reply.text


def test_a_hundred_megabytes_are_refused_and_hold_nobody_up(server: str) -> None:
    host, port = server.removeprefix("http://").split(":")
    for token, status in ((TOKEN, b"413"), ("wrong", b"401")):
        with socket.create_connection((host, int(port)), 20) as connection:
            head = f"POST /get-online-features HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {token}\r\n"
            connection.sendall(f"{head}Content-Length: {100 * 2**20}\r\n\r\n".encode() + b"[" * 1000)
            assert connection.recv(1000).split()[1] == status
        assert requests.get(f"{server}/health", timeout=5).json() == {"detail": "serving"}


@pytest.mark.parametrize(
    ("change", "ready"),
    [({}, True), ({"AWS_SECRET_ACCESS_KEY": "wrong"}, False), ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9"}, False)],
    ids=["there is no registry yet", "the store refuses the keys", "the store does not answer"],
)
def test_it_is_ready_without_a_registry_but_not_without_a_store(
    platform: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, str], ready: bool
) -> None:
    repo = _without_registry(tmp_path)
    for name, value in change.items():
        monkeypatch.setenv(name, value)
    watcher = StoreWatcher(repo)
    watcher.look()
    assert (watcher.ready, watcher.app) == (ready, None)


def _without_registry(folder: Path) -> Path:
    """Copy the feature repository and name a registry that is not there yet."""
    repo = folder / "repo"
    shutil.copytree(ROOT / "feature_repo", repo, ignore=shutil.ignore_patterns("__pycache__"))
    config = repo / "feature_store.yaml"
    config.write_text(config.read_text().replace("registry.db", f"late-{uuid4().hex}.db"))
    return repo
