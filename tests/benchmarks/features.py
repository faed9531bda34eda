"""Time the feature store beside Feast's own parts and beside the least that the work takes, in one run.

`make bench` starts the platform and runs this; `SCALES='1 10 100'` adds a hundred times the rows. Each figure is the
median of at least five runs, and the contenders take turns, so that a busy moment of the machine meets all of them. A
time counts only after the contenders gave the same answer. Everything lies under names of its own and is removed again;
the figures go to `build/benchmarks/features.json`.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import multiprocessing
import os
import secrets
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from functools import partial
from itertools import chain, product
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import redis
import requests
from feast import FeatureStore
from feast.infra.online_stores.helpers import _mmh3
from figures import OURS, Figure, bytes_per_key, keep, keys_of, take_turns, timed
from serving import client as http_client
from serving import encode, running

from mlplatform import connect, feature_client, features, history, objectstore
from mlplatform.connection import s3_client
from mlplatform.feast_plugins.duckdb_s3 import connection
from mlplatform.income import read_income
from mlplatform.settings import Settings, find_root

STOCK = {
    "mlplatform.feast_plugins.offline_store.S3DuckDBOfflineStore": "file",
    "mlplatform.feast_plugins.compute_engine.PipelinedComputeEngine": "local",
    "mlplatform.feast_plugins.online_store.ExpiringRedisOnlineStore": "redis",
    "  expire_online: false\n": "",
    '  scheduler: "${DASK_SCHEDULER_ADDRESS}"\n': "",
}
FLOOR, FEAST = "floor", "Feast's stock parts"
# Rows from which on Feast's own ways take minutes.
SLOW_HISTORY, SLOW_LOADS = 10**6, 10**5


def main() -> None:
    """Measure, print a Markdown table and keep it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scales", type=int, nargs="+", default=[1, 10], help="multiples of the data")
    parser.add_argument("--repeats", type=int, default=5, help="runs of which the median counts")
    parser.add_argument("--only", choices=("online", "history", "materialise"), help="measure this alone")
    options = parser.parse_args()
    connect()
    keep("features", chain.from_iterable(measure(scale, options.repeats, options.only) for scale in options.scales))


def measure(scale: int, repeats: int, only: str | None) -> Iterator[Figure]:
    """Measure everything at one multiple of the data; online reads do not grow with it."""
    versions = make_versions(scale)
    with scratch(versions) as (ours, stock, folder):
        if only in {None, "online"} and scale == 1:
            yield from measure_online(ours, stock, versions)
        if only in {None, "history"}:
            yield from measure_history(ours, stock, versions, folder, repeats)
        if only in {None, "materialise"}:
            yield from measure_loads(ours, stock, versions, repeats)


# The data


def make_versions(scale: int) -> pd.DataFrame:
    """Give the feature history several times over, each time of other users."""
    versions = history.build_history(read_income(find_root() / "data" / "income_data.csv"))
    copies = [versions.assign(user_id=versions["user_id"] + (f"-{copy}" if copy else "")) for copy in range(scale)]
    return pd.concat(copies, ignore_index=True)


@contextmanager
def scratch(versions: pd.DataFrame) -> Iterator[tuple[FeatureStore, FeatureStore, str]]:
    """Set up two copies of the feature repository over these versions, ours and one with Feast's stock settings."""
    name = f"benchmark_{os.getpid()}"
    folder = f"s3://feature-data-sets/{name}"
    for view, frame in history.split_views(versions).items():
        uri = f"{folder}/{view}.parquet"
        objectstore.write_bytes(objectstore.encode(frame, uri), uri)
    with tempfile.TemporaryDirectory() as temporary:
        # Feast's file store would need one more package for the object store; it gets the files on disk.
        for view, frame in history.split_views(versions).items():
            frame.to_parquet(Path(temporary, f"{view}.parquet"))
        places = {"ours": folder, "stock": temporary}
        stores = [copy_repo(Path(temporary), f"{name}_{kind}", place, kind) for kind, place in places.items()]
        try:
            yield stores[0], stores[1], folder
        finally:
            for store in stores:
                store.teardown()
            client = s3_client()
            for uri in objectstore.list_objects(folder)["uri"]:
                bucket, key = objectstore.split_uri(uri)
                client.delete_object(Bucket=bucket, Key=key)


def copy_repo(temporary: Path, project: str, folder: str, kind: str) -> FeatureStore:
    """Copy the feature repository under another project, registry and folder of files, and apply it."""
    repo = temporary / project
    shutil.copytree(find_root() / "feature_repo", repo, ignore=shutil.ignore_patterns("__pycache__"))
    changes = {"project: income": f"project: {project}", "registry.db": f"{project}.db", '"income"': f'"{project}"'}
    changes |= {"s3://feature-data-sets": folder, "enabled: true": "enabled: false"}
    changes |= STOCK if kind == "stock" else {}
    for path in repo.iterdir():
        text = path.read_text()
        for old, new in changes.items():
            text = text.replace(old, new)
        path.write_text(text)
    return features.apply(repo)


# History

WINDOW = """
    SELECT {values} FROM (
        SELECT place, last_value(known IGNORE NULLS) OVER (
            PARTITION BY user_id ORDER BY moment, place NULLS FIRST ROWS UNBOUNDED PRECEDING) AS known
        FROM (SELECT user_id, event_timestamp AS moment, NULL AS place, struct_pack({columns}) AS known
              FROM read_parquet('{uri}') UNION ALL SELECT user_id, moment, place, NULL FROM asked)
    ) WHERE place IS NOT NULL ORDER BY place
"""


def by_hand(entity_df: pd.DataFrame, folder: str) -> pd.DataFrame:
    """Join the three files as somebody would who needs only that: no ttl, no checks of files, names or types."""
    asked = pa.Table.from_pandas(entity_df.rename(columns={"event_timestamp": "moment"}), preserve_index=False)
    asked = asked.append_column("place", pa.array(range(len(asked))))
    answers = [entity_df.reset_index(drop=True)]
    with connection() as duck:
        duck.register("asked", asked)
        for view, names in history.VIEWS.items():
            values = ", ".join(f"known.{name}" for name in names)
            text = WINDOW.format(columns=", ".join(names), values=values, uri=f"{folder}/{view}.parquet")
            answers.append(duck.sql(text).to_arrow_table().to_pandas())
    return pd.concat(answers, axis=1)


def measure_history(
    ours: FeatureStore, stock: FeatureStore, versions: pd.DataFrame, folder: str, repeats: int
) -> Iterator[Figure]:
    """Ask for every row that there is, which gives the versions back."""
    asked = versions[["user_id", "event_timestamp"]]
    ways: dict[str, Callable[[], pd.DataFrame]] = {OURS: lambda: features.point_in_time(ours, asked)}
    if len(versions) < SLOW_HISTORY:
        ways[FEAST] = lambda: features.point_in_time(stock, asked)
    ways[FLOOR] = lambda: by_hand(asked, folder)
    for name in (OURS, FLOOR):
        pd.testing.assert_frame_equal(ways[name]()[list(versions.columns)], versions, check_dtype=False)
    size = f"{len(versions):,} rows"
    runs = {name: (lambda run=run: timed(run)) for name, run in ways.items()}
    yield from take_turns("history; floor: hand-written window", runs, repeats, size=size, rows=len(versions))
    needed = pa.Table.from_pandas(versions).nbytes * 2 + pa.Table.from_pandas(asked).nbytes
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        peak = pool.apply(peak_of_history, (str(ours.repo_path), asked))
    beside = f"{peak / needed:.2f} x question, files, answer in Arrow"
    yield Figure("history, peak memory", OURS, peak / 2**20, "MiB", size=size, rows=len(versions), beside=beside)


def peak_of_history(repo: str, asked: pd.DataFrame) -> int:
    """Ask in a process of its own; give the memory that it takes beyond what it has before, in bytes."""
    store = features.open_store(Path(repo))
    features.point_in_time(store, asked.head(10))

    def status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

    Path("/proc/self/clear_refs").write_text("5")  # counts the peak from here on
    before = status("VmRSS")
    features.point_in_time(store, asked)
    return status("VmHWM") - before


# Materialising


def load(store: FeatureStore) -> None:
    """Materialise all views through Feast's own API."""
    with redirect_stdout(io.StringIO()):
        store.materialize(history.WINDOW_START.to_pydatetime(), features.MATERIALISE_END.to_pydatetime())


def measure_loads(ours: FeatureStore, stock: FeatureStore, versions: pd.DataFrame, repeats: int) -> Iterator[Figure]:
    """Load an empty store, then load the same again; the floor writes the same bytes with nothing but redis-py.

    From `SLOW_LOADS` on, where Feast's own way does not compete, it is the number of users alone that is checked.
    """
    users = versions.loc[versions["event_timestamp"] <= features.MATERIALISE_END, "user_id"].nunique()
    size = f"{users * 3:,} rows"
    stores = {OURS: ours} if len(versions) >= SLOW_LOADS else {OURS: ours, FEAST: stock}
    with redis_client() as client:
        for store in stores.values():
            load(store)
        stored = hashes(client, ours.project)
        assert FEAST not in stores or stored == hashes(client, stock.project), (
            "ours and Feast's stock parts stored other bytes"
        )
        assert len(stored) == users
        commands = [(key + b"benchmark", fields) for key, whole in stored.items() for fields in by_view(whole)]

        def bare() -> float:
            remove(client, "benchmark")
            return timed(lambda: write_bare(client, commands))

        def first(store: FeatureStore) -> float:
            remove(client, store.project)
            return timed(lambda: load(store))

        del stored
        if FEAST in stores:
            yield from memory(client, stores)

        runs: dict[str, Callable[[], float]] = {
            f"{name}, first load": (lambda store=store: first(store)) for name, store in stores.items()
        }
        runs |= {
            f"{name}, nothing newer": (lambda store=store: timed(lambda: load(store))) for name, store in stores.items()
        }
        runs[FLOOR] = bare
        yield from take_turns(
            "materialise three views; floor: pipelined HSET", runs, repeats, size=size, rows=users * 3
        )
        remove(client, "benchmark")


def memory(client: redis.Redis, stores: Mapping[str, FeatureStore]) -> Iterator[Figure]:
    """Give what the server keeps for a user, which is a whole key."""
    for name, store in stores.items():
        held = bytes_per_key(client, keys_of(client, store.project))
        values = sum(map(len, history.VIEWS.values()))
        billion = f"{held / values:.0f} GB for a billion features"
        yield Figure("online store, memory per user", name, held, "bytes", size=f"{values} features", beside=billion)


def hashes(client: redis.Redis, project: str) -> dict[bytes, dict[bytes, bytes]]:
    """Read everything that a project stored, by key without the project."""
    end = project.encode()
    keys = keys_of(client, project)
    found: dict[bytes, dict[bytes, bytes]] = {}
    once: dict[bytes, bytes] = {}  # fields and values are few, and a hundred times the users are many
    for start in range(0, len(keys), 10_000):
        pipeline = client.pipeline(transaction=False)
        some = keys[start : start + 10_000]
        for key in some:
            pipeline.hgetall(key)
        for key, fields in zip(some, pipeline.execute(), strict=True):
            pairs = {once.setdefault(name, name): once.setdefault(value, value) for name, value in fields.items()}
            found[key.removesuffix(end)] = pairs
    return found


def by_view(fields: Mapping[bytes, bytes]) -> Iterator[list[bytes]]:
    """Divide a key's fields by view, since views are loaded one after another."""
    for view, names in history.VIEWS.items():
        wanted = [f"_ts:{view}".encode(), *(_mmh3(f"{view}:{name}") for name in names)]
        yield [part for name in wanted for part in (name, fields[name])]


def write_bare(client: redis.Redis, commands: Sequence[tuple[bytes, list[bytes]]]) -> None:
    """Write prepared keys and fields."""
    for start in range(0, len(commands), 10_000):
        pipeline = client.pipeline(transaction=False)
        for key, fields in commands[start : start + 10_000]:
            pipeline.execute_command("HSET", key, *fields)
        pipeline.execute()


def remove(client: redis.Redis, project: str) -> None:
    """Delete what a project stored."""
    mine = keys_of(client, project)
    for start in range(0, len(mine), 10_000):
        client.unlink(*mine[start : start + 10_000])


# Online


def measure_online(ours: FeatureStore, stock: FeatureStore, versions: pd.DataFrame) -> Iterator[Figure]:
    """Read eight features of 1 and of 100 users: with the SDK, and over HTTP with a token."""
    load(ours)
    load(stock)
    users = versions.loc[versions["event_timestamp"] <= features.MATERIALISE_END, "user_id"].drop_duplicates().tolist()
    with redis_client() as client:
        yield from measure_sdk(ours, stock, client, users)
    token = secrets.token_urlsafe(16)
    feast = str(Path(sys.executable).parent / "feast")
    commands = {
        OURS: [sys.executable, "-m", "mlplatform_ops.feast_servers.feature_server", "--repo", str(ours.repo_path)],
        FEAST: [feast, "--chdir", str(stock.repo_path), "serve", "--no-access-log", "--max-requests", "0"],
    }
    # Feast orders a view's features by a set, so by a seed that each process draws for itself.
    os.environ.update(FEATURE_SERVER_TOKEN=token, PYTHONHASHSEED="0")
    with ExitStack() as stack:
        ports = {name: stack.enter_context(running(command, "/health"))[1] for name, command in commands.items()}
        bodies = {name: ask(port, users[:1], token) for name, port in ports.items()}
        many = {name: ask(port, users[:100], token) for name, port in ports.items()}
        assert bodies[OURS] == bodies[FEAST], "the JSON is not Feast's"
        assert many[OURS] == many[FEAST], "the JSON is not Feast's"
        for count, clients, calls in ((1, 1, 1_000), (1, 10, 3_000), (100, 1, 200)):
            for name, port in ports.items():
                yield asyncio.run(load_http(name, port, token, users[:count], clients, calls))


def ask(port: int, users: Sequence[str], token: str) -> bytes:
    """Ask until the features are loaded; give the body."""
    for _ in range(120):
        answer = requests.post(
            f"http://127.0.0.1:{port}/get-online-features",
            json=question(users),
            headers={"Authorization": f"Bearer {token}"},
            timeout=30,
        )
        if answer.ok:
            return answer.content
        time.sleep(0.5)
    sys.exit(f"no answer: {answer.text}")


def question(users: Sequence[str]) -> dict[str, Any]:
    """Ask about some users by the feature service."""
    return {"feature_service": feature_client.SERVICE, "entities": {"user_id": list(users)}}


async def load_http(name: str, port: int, token: str, users: list[str], clients: int, calls: int) -> Figure:
    """Let some clients ask at once, each over one connection."""
    request = encode(port, "/get-online-features", question(users), token)
    statuses: Counter[int] = Counter()
    await http_client(port, request, [], statuses, count=20)
    seconds: list[float] = []
    started = time.perf_counter()
    each = calls // clients
    await asyncio.gather(*(http_client(port, request, seconds, statuses, count=each) for _ in range(clients)))
    wall = time.perf_counter() - started
    assert set(statuses) == {200}, statuses
    p50, p99 = statistics.median(seconds) * 1000, statistics.quantiles(seconds, n=100)[98] * 1000
    size = f"{len(users)} users, {clients} clients"
    rate = f"{len(seconds) / wall:,.0f} requests/s"
    return Figure("online, HTTP", name, p50, "ms", size=size, spread=f"p99 {p99:.2f} ms", rate=rate)


def measure_sdk(ours: FeatureStore, stock: FeatureStore, client: redis.Redis, users: list[str]) -> Iterator[Figure]:
    """Read with the SDK; the floor sends the same `HMGET` and looks at nothing."""
    services = {
        name: store.get_feature_service(feature_client.SERVICE) for name, store in ((OURS, ours), (FEAST, stock))
    }
    fields: list[Any] = [f"_ts:{view}" for view in history.VIEWS]
    fields += [_mmh3(f"{view}:{name}") for view, names in history.VIEWS.items() for name in names]
    keys = {key.removesuffix(ours.project.encode())[-36:].decode(): key for key in keys_of(client, ours.project)}

    def bare(asked: list[str]) -> None:
        pipeline = client.pipeline(transaction=False)
        for user in asked:
            pipeline.hmget(keys[user], fields)
        pipeline.execute()

    def sdk(store: FeatureStore, name: str) -> Callable[[list[str]], Any]:
        return lambda asked: store.get_online_features(services[name], [{"user_id": user} for user in asked]).to_dict(
            True
        )

    ways: dict[str, Callable[[list[str]], Any]] = {OURS: sdk(ours, OURS), FEAST: sdk(stock, FEAST), FLOOR: bare}
    for count, calls in ((1, 1_000), (100, 100)):
        assert ways[OURS](users[:count]) == ways[FEAST](users[:count]), "the SDK's answers differ"
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        # In turns of some calls: Feast keeps what it knows of one registry, and forgets it when another is asked.
        for turn, (name, read) in product(range(10), ways.items()):
            read(users[:count])
            for at in range(turn * calls // 10, (turn + 1) * calls // 10):
                seconds[name].append(timed(partial(read, users[at : at + count])))
        floor = statistics.median(seconds[FLOOR])
        for name, times in seconds.items():
            p50, p99 = statistics.median(times), statistics.quantiles(times, n=100)[98]
            yield Figure(
                "online, SDK; floor: HMGET",
                name,
                p50 * 1000,
                "ms",
                size=f"{count} users",
                spread=f"p99 {p99 * 1000:.2f} ms",
                rate=f"{count / p50:,.0f} users/s",
                beside=f"{p50 / floor:.1f} x its time",
            )


def redis_client() -> redis.Redis:
    """Connect to the platform's online store."""
    return redis.Redis.from_url(Settings.from_env(os.environ).redis_url)


if __name__ == "__main__":
    main()
