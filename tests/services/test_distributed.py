"""History and materialising on a Dask cluster of two worker processes, held to what one machine answers.

What Feast promises of any view is asked of the cluster in `feast/test_any_view.py`.
"""

from __future__ import annotations

import os
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pandas as pd
import pytest
import redis
from feast import FeatureStore
from shop import scratch_repository

from mlplatform import features, history, objectstore
from mlplatform.engines import cluster
from mlplatform.errors import ServiceDownError, SettingsError
from mlplatform.history import FEATURES, USER_ID, VIEWS
from mlplatform.income import read_income
from mlplatform.settings import Settings
from mlplatform_ops.embedded.services import make_certificates

ROOT = Path(__file__).parents[2]
INCOME = ROOT / "data" / "income_data.csv"
TTL = pd.Timedelta(days=365)


@pytest.fixture(scope="module")
def versions() -> pd.DataFrame:
    return history.build_history(read_income(INCOME)).reset_index(drop=True)


@pytest.fixture
def many_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make as many tasks of the census as of some million rows."""
    monkeypatch.setattr(cluster, "ROWS_PER_TASK", 10_000)


def alone(repo: Path, entity_df: pd.DataFrame) -> pd.DataFrame:
    """Ask the same files in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(cluster.VARIABLE, raising=False)
        return features.point_in_time(features.open_store(repo), entity_df)


def stored(settings: Settings, store: FeatureStore) -> dict[bytes, dict[bytes, bytes]]:
    """Read what Redis holds for a project, by key without the project."""
    end = store.project.encode()
    with redis.Redis.from_url(settings.redis_url) as client:
        keys = [key for key in client.scan_iter(count=10_000) if key.endswith(end)]
        pipeline = client.pipeline(transaction=False)
        for key in keys:
            pipeline.hgetall(key)
        return {key.removesuffix(end): fields for key, fields in zip(keys, pipeline.execute(), strict=True)}


def questions(versions: pd.DataFrame) -> pd.DataFrame:
    """Every row's own moment, the ttl's edge and past it, before anything was known, strangers; in no order."""
    asked = versions[[USER_ID, "event_timestamp"]]
    some = asked.head(500)
    frames = [
        asked,
        some.assign(event_timestamp=some["event_timestamp"] + TTL),
        some.assign(event_timestamp=some["event_timestamp"] + TTL + pd.Timedelta(1, "us")),
        some.assign(event_timestamp=some["event_timestamp"] - pd.Timedelta(days=800)),
        some.assign(user_id="stranger-" + some[USER_ID]),
        some.assign(user_id=None),
    ]
    everything = pd.concat(frames, ignore_index=True).assign(note=lambda frame: np.arange(len(frame)))
    return everything.sample(frac=1, random_state=7)


def worker_pids(cluster: Any) -> set[int]:
    return {worker.process.pid for worker in cluster.workers.values() if worker.process}


def in_mid_job(cluster: Any, job: Callable[[], Any], act: Callable[[str], None]) -> Any:
    """Do a job, and act when a worker, given by its address, holds results; fail if the job was done before."""
    acted, over = [], threading.Event()

    def watch() -> None:
        while not over.is_set():
            states = [task.state for task in list(cluster.scheduler.tasks.values())]
            holders = [worker for worker in list(cluster.scheduler.workers.values()) if worker.has_what]
            if "waiting" in states and "memory" in states and holders:
                act(holders[0].address)
                acted.append(holders[0].address)
                return
            time.sleep(0.002)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        answer = job()
    finally:
        over.set()
        thread.join()
    assert len(acted) == 1, "the job was over before anything could happen to it"
    return answer


def kill_a_worker_during(cluster: Any, job: Callable[[], Any]) -> Any:
    """Do a job, and kill a worker that holds results of its tasks."""

    def kill(address: str) -> None:
        pid = next(entry.pid for entry in cluster.workers.values() if entry.worker_address == address)
        assert pid in before
        os.kill(pid, signal.SIGKILL)

    before = worker_pids(cluster)
    return in_mid_job(cluster, job, kill)


@contextmanager
def forward(port: int) -> Iterator[tuple[int, Callable[[], None]]]:
    """Lead from a port of this machine to another, as kubectl does; give it, and what drops every connection."""
    pairs: list[tuple[socket.socket, socket.socket]] = []

    def drop() -> None:
        for end in [end for pair in pairs for end in pair]:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with socket.create_connection(("127.0.0.1", port)) as target:
                pairs.append((self.request, target))
                back = threading.Thread(target=pump, args=(target, self.request))
                back.start()
                pump(self.request, target)
                back.join()

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server.server_address[1], drop
        finally:
            server.shutdown()
            drop()
            thread.join()


def pump(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(65_536):
            target.sendall(data)
    for end in (source, target):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


def test_every_row_and_every_user_are_as_on_one_machine(
    on_dask: Any, versions: pd.DataFrame, platform: Settings, tmp_path: Path
) -> None:
    repo, other = scratch_repository(tmp_path), scratch_repository(tmp_path)
    for folder in (repo, other):
        for view, frame in history.split_views(versions).items():
            uri = f"s3://feature-data-sets/{folder.name}/{view}.parquet"
            objectstore.write_bytes(objectstore.encode(frame, uri), uri)
    store = features.apply(repo)
    assert [(entry.rows, entry.changed) for entry in features.materialise(store)] == [(28_066, 28_066)] * 3
    assert [(entry.rows, entry.changed) for entry in features.materialise(store)] == [(28_066, 0)] * 3

    answer = features.point_in_time(store, versions[[USER_ID, "event_timestamp"]])
    income = read_income(INCOME)
    assert len(answer) == 30_162
    income.columns = income.columns.str.replace("-", "_")
    assert (answer[list(FEATURES)].to_numpy() == versions[list(FEATURES)].to_numpy()).all()
    rows = [frame[list(FEATURES)].value_counts().sort_index() for frame in (answer, income)]
    pd.testing.assert_series_equal(*rows)

    asked = questions(versions)
    pd.testing.assert_frame_equal(features.point_in_time(store, asked), alone(repo, asked))

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(cluster.VARIABLE)
        single = features.apply(other)
        features.materialise(single)
    mine = stored(platform, store)
    assert len(mine) == 28_066
    assert mine == stored(platform, single)


def test_one_user_with_a_third_of_the_rows_and_pieces_that_are_spilled(
    on_dask: Any, many_tasks: None, versions: pd.DataFrame, tmp_path: Path
) -> None:
    repo = scratch_repository(tmp_path)
    third = len(versions) // 3
    skewed = versions.sort_values("event_timestamp", kind="stable").reset_index(drop=True)
    skewed.loc[skewed.index % 3 == 0, USER_ID] = "everywhere"
    assert (skewed[USER_ID] == "everywhere").sum() >= third
    for view, names in VIEWS.items():
        uri = f"s3://feature-data-sets/{repo.name}/{view}.parquet"
        objectstore.write_bytes(objectstore.encode(skewed[[USER_ID, "event_timestamp", *names]], uri), uri)
    store = features.apply(repo)
    asked = questions(skewed)
    pd.testing.assert_frame_equal(features.point_in_time(store, asked), alone(repo, asked))
    with cluster.cluster(on_dask.scheduler_address) as client:
        spilled = client.run(spilled_bytes)
    assert all(size > 0 for size in spilled.values()), spilled


def spilled_bytes(dask_worker: Any) -> int:
    figures = dask_worker.data.cumulative_metrics
    return int(sum(value for key, value in figures.items() if "disk-write" in key and "bytes" in key))


def test_a_worker_killed_in_mid_job_changes_nothing(
    on_dask: Any, many_tasks: None, versions: pd.DataFrame, platform: Settings, tmp_path: Path
) -> None:
    repo = scratch_repository(tmp_path)
    for view, frame in history.split_views(versions).items():
        uri = f"s3://feature-data-sets/{repo.name}/{view}.parquet"
        objectstore.write_bytes(objectstore.encode(frame, uri), uri)
    store = features.apply(repo)
    asked = questions(versions)
    answer = kill_a_worker_during(on_dask, lambda: features.point_in_time(store, asked))
    pd.testing.assert_frame_equal(answer, alone(repo, asked))
    on_dask.wait_for_workers(2, timeout=300)
    done = kill_a_worker_during(on_dask, lambda: features.materialise(store))
    on_dask.wait_for_workers(2, timeout=300)
    assert [entry.rows for entry in done] == [28_066] * 3
    held = features.read_online(store, versions[USER_ID].unique().tolist()[:2_000])
    assert held["found"].all()
    assert len(stored(platform, store)) == 28_066


# In a process of its own, since Dask leaves the socket of a connection that ended while it began to the garbage.
FORWARDED = """
import sys
from pathlib import Path
import pandas as pd
from mlplatform import features
from mlplatform.engines import cluster

cluster.ROWS_PER_TASK = 10_000
what, repo, asked, answer = sys.argv[1:]
store = features.open_store(Path(repo))
if what == "history":
    features.point_in_time(store, pd.read_parquet(asked)).to_parquet(answer)
else:
    print([entry.rows for entry in features.materialise(store)])
"""


def test_a_forward_to_the_scheduler_that_drops_in_mid_job_changes_nothing(
    on_dask: Any, versions: pd.DataFrame, tmp_path: Path
) -> None:
    repo = scratch_repository(tmp_path)
    for view, frame in history.split_views(versions).items():
        uri = f"s3://feature-data-sets/{repo.name}/{view}.parquet"
        objectstore.write_bytes(objectstore.encode(frame, uri), uri)
    features.apply(repo)
    asked, answer = tmp_path / "asked.parquet", tmp_path / "answer.parquet"
    versions[[USER_ID, "event_timestamp"]].to_parquet(asked)
    with forward(int(on_dask.scheduler_address.rpartition(":")[2])) as (port, drop):
        environ = os.environ | {cluster.VARIABLE: f"tls://127.0.0.1:{port}"}

        def run(what: str) -> str:
            command = [sys.executable, "-W", "ignore", "-c", FORWARDED, what, str(repo), str(asked), str(answer)]
            return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE, env=environ).stdout

        in_mid_job(on_dask, lambda: run("history"), lambda _: drop())
        assert in_mid_job(on_dask, lambda: run("load"), lambda _: drop()).strip() == str([28_066] * 3)
    pd.testing.assert_frame_equal(pd.read_parquet(answer), alone(repo, pd.read_parquet(asked)))


def test_a_job_begins_again_though_the_lost_client_fails_to_close(
    on_dask: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distributed import Client

    clients: list[Client] = []
    close = Client.close

    def job(client: Client, gather: cluster.Gather) -> list[int]:
        clients.append(client)
        if len(clients) == 1:
            raise cluster.LostError("the connection ended")
        return gather([client.submit(max, [1, 2])])

    def failing(client: Client, *arguments: Any) -> None:
        close(client, *arguments)
        if client is clients[0]:
            raise AssertionError

    monkeypatch.setattr(Client, "close", failing)
    assert cluster.on_cluster(on_dask.scheduler_address, job) == [2]
    monkeypatch.undo()


def test_no_credential_and_no_address_is_in_a_tasks_arguments(
    on_dask: Any, versions: pd.DataFrame, platform: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distributed import Client, Future

    sent: list[bytes] = []
    submit = Client.submit

    def plain(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [plain(part) for part in value]
        return None if isinstance(value, Future) else value

    def listening(self: Client, function: Any, *arguments: Any, **options: Any) -> Future:
        sent.append(cloudpickle.dumps((function, plain(arguments), options)))
        return submit(self, function, *arguments, **options)

    monkeypatch.setattr(Client, "submit", listening)
    repo = scratch_repository(tmp_path)
    for view, frame in history.split_views(versions.head(100)).items():
        uri = f"s3://feature-data-sets/{repo.name}/{view}.parquet"
        objectstore.write_bytes(objectstore.encode(frame, uri), uri)
    store = features.apply(repo)
    features.materialise(store)
    features.point_in_time(store, versions.head(100)[[USER_ID, "event_timestamp"]])
    assert any(repo.name.encode() in arguments for arguments in sent)
    password = platform.redis.partition("password=")[2].partition(",")[0]
    for secret in (platform.secret_key, password, platform.feature_registry_key, platform.s3_endpoint):
        assert secret
        assert not any(secret.encode() in arguments for arguments in sent)


# What is said when it cannot work


def ask(repo: Path) -> None:
    frame = pd.DataFrame({USER_ID: ["ann"], "event_timestamp": [pd.Timestamp("2023-03-01", tz="UTC")]})
    features.point_in_time(features.open_store(repo), frame)


@pytest.fixture
def small(versions: pd.DataFrame, platform: Settings, tmp_path: Path) -> Path:
    repo = scratch_repository(tmp_path)
    for view, frame in history.split_views(versions.head(10)).items():
        uri = f"s3://feature-data-sets/{repo.name}/{view}.parquet"
        objectstore.write_bytes(objectstore.encode(frame, uri), uri)
    features.apply(repo)
    return repo


def test_a_scheduler_that_does_not_answer_is_named(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"tls://127.0.0.1:{probe.getsockname()[1]}"
    monkeypatch.setattr(cluster, "WAIT_S", 1)
    monkeypatch.setenv(cluster.VARIABLE, address)
    with pytest.raises(ServiceDownError, match=rf"the Dask scheduler at {address} does not answer; start it, or unset"):
        ask(small)


def test_a_missing_group_is_named(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cluster.VARIABLE, "tls://127.0.0.1:1")
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(SettingsError, match=r"group 'scale' are not installed; run 'make \.venv/\.scale'"):
        ask(small)


def test_an_address_without_tls_is_refused(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cluster.VARIABLE, "tcp://127.0.0.1:1")
    with pytest.raises(SettingsError, match=r"tcp://127.0.0.1:1 is no address of TLS"):
        ask(small)


def test_a_stranger_without_a_certificate_of_the_cluster_is_not_answered(dask_workers: Any, tmp_path: Path) -> None:
    from distributed import Client, Security

    make_certificates(tmp_path)
    pair = {"tls_client_cert": str(tmp_path / "weed.crt"), "tls_client_key": str(tmp_path / "weed.key")}
    port = dask_workers.scheduler_address.rpartition(":")[2]
    for address, security in (
        (f"tcp://127.0.0.1:{port}", Security(require_encryption=False)),
        (f"tls://127.0.0.1:{port}", Security(tls_ca_file=str(tmp_path / "ca.crt"), require_encryption=True, **pair)),
    ):
        with pytest.raises(OSError, match=r"Timed out|Connection reset|closed|certificate does not match"):
            Client(address, security=security, timeout=2, set_as_default=False)
