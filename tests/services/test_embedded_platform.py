from __future__ import annotations

import json
import os
import socket
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import boto3
import botocore.exceptions
import psutil
import pytest
import redis
import requests

from mlplatform.connection import check_services, connect
from mlplatform.errors import CredentialsError, ServiceDownError
from mlplatform.settings import BUCKETS, Settings
from mlplatform_ops.embedded.platform import EmbeddedPlatform
from mlplatform_ops.embedded.supervisor import OWNER_VARIABLE

ROOT = Path(__file__).parents[2]


def processes(platform: EmbeddedPlatform) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(OWNER_VARIABLE) == str(platform.state):
                found.append(process)
        except psutil.Error:
            continue
    return found


def names(platform: EmbeddedPlatform) -> list[str]:
    return sorted(process.name() for process in processes(platform))


def bucket(settings: Settings):
    session = boto3.session.Session(settings.access_key, settings.secret_key, region_name=settings.region)
    return session.resource("s3", endpoint_url=settings.s3_endpoint).Bucket(BUCKETS[0])


def test_starting_twice_starts_nothing_twice(embedded: EmbeddedPlatform) -> None:
    before = {status.name: status.pid for status in embedded.status()}
    embedded.up()
    assert {status.name: status.pid for status in embedded.status()} == before


def test_every_service_is_ready_and_says_where(embedded: EmbeddedPlatform) -> None:
    services = embedded.status()
    running = {service.name: service for service in services if service.pid}
    assert {"object-store", "online-store", "mlflow"} <= running.keys()
    assert {"weed", "valkey-server"} <= set(names(embedded))
    assert {service.state for service in running.values()} == {"ready"}
    assert all(service.url.split("//")[1].startswith("127.0.0.1:") for service in services)
    assert all(service.memory_bytes > 2**20 for service in running.values())


def test_the_buckets_are_there(platform: Settings) -> None:
    client = bucket(platform).meta.client
    assert {entry["Name"] for entry in client.list_buckets()["Buckets"]} >= set(BUCKETS)


def test_everything_listens_on_loopback_only(embedded: EmbeddedPlatform) -> None:
    addresses = [
        connection.laddr.ip
        for process in processes(embedded)
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN or connection.type == socket.SOCK_DGRAM
    ]
    assert len(addresses) >= 10
    assert set(addresses) == {"127.0.0.1"}


def test_secrets_are_the_owners_alone_and_in_no_log(embedded: EmbeddedPlatform) -> None:
    assert stat.S_IMODE(embedded.state.stat().st_mode) == 0o700
    secrets = [value for name, value in environment(embedded).items() if "PASSWORD" in name or "SECRET" in name]
    assert len(secrets) >= 5
    assert len(set(secrets)) == len(secrets)
    for path in embedded.state.rglob("*"):
        if path.is_file() and path.parent == embedded.state and path.name != "supervisord.conf":
            assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
        if path.is_file() and path.parent.name == "logs":
            assert not any(secret in path.read_text(errors="replace") for secret in secrets), path


def test_no_command_line_shows_a_secret(embedded: EmbeddedPlatform) -> None:
    secrets = [value for name, value in environment(embedded).items() if "PASSWORD" in name or "SECRET" in name]
    lines = [" ".join(process.cmdline()) for process in processes(embedded)]
    assert len(lines) >= 4
    assert not any(secret in line for secret in secrets for line in lines)


def test_no_service_answers_a_stranger(embedded: EmbeddedPlatform, platform: Settings) -> None:
    anonymous = requests.get(f"{platform.s3_endpoint}/{BUCKETS[0]}", timeout=5)
    assert anonymous.status_code == 403
    assert requests.get(platform.tracking_uri, timeout=5).status_code == 401
    with pytest.raises(redis.AuthenticationError):
        redis.Redis.from_url(f"redis://{platform.redis.split(',')[0]}").ping()
    supervisor = environment(embedded)["MLPLATFORM_SUPERVISOR_PORT"]
    assert requests.get(f"http://127.0.0.1:{supervisor}/", timeout=5).status_code == 401


def test_the_object_stores_inner_ports_refuse_who_has_no_certificate_of_theirs(
    embedded: EmbeddedPlatform, platform: Settings
) -> None:
    bucket(platform).put_object(Key="guarded.txt", Body=b"guarded")
    ports = environment(embedded)
    for part, path in (
        ("MASTER", "dir/assign"),
        ("MASTER", "dir/lookup?volumeId=1"),
        ("VOLUME", "status"),
        ("FILER", f"buckets/{BUCKETS[0]}/guarded.txt"),
    ):
        address = f"127.0.0.1:{ports[f'MLPLATFORM_WEED_{part}_PORT']}/{path}"
        assert requests.get(f"http://{address}", timeout=5).status_code == 400
        with pytest.raises(requests.ConnectionError, match=r"CERTIFICATE_REQUIRED|reset|aborted"):
            requests.get(f"https://{address}", verify=embedded.state / "certificates" / "ca.crt", timeout=5)


@pytest.mark.parametrize(
    ("change", "variable"),
    [
        ({"secret_key": "wrong"}, "AWS_ACCESS_KEY_ID"),
        ({"access_key": "nobody"}, "AWS_ACCESS_KEY_ID"),
        ({"tracking_password": "wrong"}, "MLFLOW_TRACKING_USERNAME"),
        ({"redis": "wrong"}, "REDIS_CONNECTION_STRING"),
    ],
)
def test_wrong_credentials_are_told_from_a_service_that_is_down(
    platform: Settings, change: dict[str, str], variable: str
) -> None:
    if "redis" in change:
        change = {"redis": platform.redis.split(",")[0] + ",password=wrong"}
    with pytest.raises(CredentialsError, match=f"refuses the credentials; check {variable}"):
        check_services(replace(platform, **change))


def test_connect_finds_the_embedded_platform_by_its_state_folder(embedded: EmbeddedPlatform) -> None:
    environ = {"MLPLATFORM_STATE": str(embedded.state), "AWS_ACCESS_KEY_ID": "of-some-cloud"}
    assert connect(environ) == embedded.settings
    assert environ["AWS_ACCESS_KEY_ID"] == embedded.settings.access_key
    assert environ["MLFLOW_DISABLE_TELEMETRY"] == "true"


def test_the_printed_exports_let_a_shell_talk_to_the_platform(embedded: EmbeddedPlatform) -> None:
    script = (
        'eval "$("$PYTHON" -m mlplatform_ops env)" && "$PYTHON" -c "'
        "import boto3, redis, os; print(len(boto3.client('s3').list_buckets()['Buckets']));"
        "print(redis.Redis.from_url(os.environ['REDIS_URL']).ping())\""
    )
    environ = {"PYTHON": sys.executable, "MLPLATFORM_STATE": str(embedded.state), "PATH": os.environ["PATH"]}
    outcome = subprocess.run(["/bin/sh", "-c", script], env=environ, capture_output=True, text=True, check=True)
    assert outcome.stdout.split() == [str(len(BUCKETS)), "True"]


@pytest.fixture(scope="class")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedPlatform]:
    platform = EmbeddedPlatform(
        tmp_path_factory.mktemp("a folder with spaces") / "state", environ={}, default_ports=False
    )
    try:
        platform.up()
        yield platform
    finally:
        platform.clean()


class TestLifecycle:
    """One platform of its own, stopped, killed and started again."""

    def test_what_was_stored_survives_a_kill_of_everything(self, own: EmbeddedPlatform) -> None:
        store(own)
        for process in sorted(processes(own), key=lambda process: "supervisor.supervisord" not in process.cmdline()):
            process.kill()
        psutil.wait_procs(processes(own), timeout=20)
        with pytest.raises(ServiceDownError):
            check_services(own.settings)
        own.up()
        assert_stored(own)

    def test_a_supervisor_that_was_killed_leaves_nothing_that_blocks_the_next_start(
        self, own: EmbeddedPlatform
    ) -> None:
        before, url = names(own), own.settings.redis_url
        supervisor = next(process for process in processes(own) if "supervisor.supervisord" in process.cmdline())
        supervisor.kill()
        supervisor.wait(10)
        assert len(processes(own)) >= 3
        own.up()
        assert_stored(own)
        assert names(own) == before
        assert own.settings.redis_url == url, "the old server still holds the port"

    def test_down_leaves_no_process_and_up_finds_everything_again(self, own: EmbeddedPlatform) -> None:
        assert own.down() is True
        assert processes(own) == []
        assert {service.state for service in own.status()} == {"stopped"}
        assert own.down() is False
        own.up()
        assert_stored(own)

    def test_a_service_that_does_not_come_up_is_named_with_its_log(self, own: EmbeddedPlatform) -> None:
        own.down()
        database = own.state / "mlflow" / "mlflow.db"
        kept = database.read_bytes()
        with closing(sqlite3.connect(database)) as opened, opened:
            opened.execute("UPDATE alembic_version SET version_num = 'of a later release'")
        with pytest.raises(ServiceDownError, match=r"mlflow does not come up: .*; see .*logs/mlflow\.log"):
            own.up()
        own.down()
        database.write_bytes(kept)

    def test_clean_removes_all_of_it(self, own: EmbeddedPlatform) -> None:
        own.clean()
        assert not own.state.exists()
        assert processes(own) == []


def environment(platform: EmbeddedPlatform) -> dict[str, str]:
    return json.loads((platform.state / "settings.json").read_text())["environment"]


def store(platform: EmbeddedPlatform) -> None:
    settings = platform.settings
    bucket(settings).put_object(Key="kept.txt", Body=b"kept" * 100_000)
    redis.Redis.from_url(settings.redis_url).set("kept", "kept")
    create = requests.post(
        f"{settings.tracking_uri}/api/2.0/mlflow/experiments/create",
        json={"name": "kept"},
        auth=(settings.tracking_username, settings.tracking_password),
        timeout=10,
    )
    create.raise_for_status()


def assert_stored(platform: EmbeddedPlatform) -> None:
    settings = platform.settings
    try:
        assert bucket(settings).Object("kept.txt").get()["Body"].read() == b"kept" * 100_000
    except botocore.exceptions.ClientError as error:
        log = (platform.state / "logs" / "object-store.log").read_text()[-3_000:]
        pytest.fail(f"the object is lost: {error}\n{log}")
    assert redis.Redis.from_url(settings.redis_url).get("kept") == b"kept"
    found = requests.get(
        f"{settings.tracking_uri}/api/2.0/mlflow/experiments/get-by-name",
        params={"experiment_name": "kept"},
        auth=(settings.tracking_username, settings.tracking_password),
        timeout=10,
    )
    assert found.json()["experiment"]["name"] == "kept"


def test_jupyterlab_opens_for_its_token_alone_and_shows_it_once(embedded: EmbeddedPlatform, tmp_path: Path) -> None:
    environ = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "BROWSER": "true"}
    environ["MLPLATFORM_STATE"] = str(embedded.state)
    with (tmp_path / "log").open("w+") as log:
        lab = subprocess.Popen([sys.executable, "-m", "mlplatform_ops", "lab"], cwd=ROOT, env=environ, stderr=log)
        try:
            page = wait_for_line(log.name, "JupyterLab: ").removeprefix("JupyterLab: ")
            server, token = page.split("/lab/tree/notebooks/01_explore_data.ipynb?token=")
            listed = answer(f"{server}/api/contents?token={token}").json()["content"]
            assert {"Makefile", "feature_repo", "notebooks"} <= {entry["name"] for entry in listed}
            assert requests.get(f"{server}/api/contents", timeout=5).status_code == 403
            assert server.startswith("http://127.0.0.1:")
            assert Path(log.name).read_text().count(token) == 1
            assert not any(token in word for word in psutil.Process(lab.pid).cmdline())
        finally:
            lab.terminate()
            lab.wait(100)


def wait_for_line(path: str, beginning: str) -> str:
    for _ in range(600):
        for line in Path(path).read_text().splitlines():
            if line.startswith(beginning):
                return line
        time.sleep(0.1)
    raise AssertionError(f"no line {beginning!r} in:\n{Path(path).read_text()}")


def answer(url: str) -> requests.Response:
    """Ask until the server listens."""
    for _ in range(300):
        try:
            return requests.get(url, timeout=5)
        except requests.ConnectionError:
            time.sleep(0.1)
    raise AssertionError(f"{url.split('?')[0]} does not answer")
