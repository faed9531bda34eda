"""Time the feature store against Feast's own parts and against the least that the work takes.

`python tests/benchmarks/features.py` in the environment of `make env`, with the feature server running (`make serve`).
It writes under names of its own and removes them again. Each figure is the best of some runs, side by side on one
machine.
"""

from __future__ import annotations

import argparse
import io
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import redis
import requests
from feast import FeatureStore

from mlplatform import feature_client, features, history, objectstore
from mlplatform.connection import s3_client
from mlplatform.feast_plugins.duckdb_s3 import connection
from mlplatform.income import read_income
from mlplatform.settings import Settings, find_root

STOCK = {
    "mlplatform.feast_plugins.offline_store.S3DuckDBOfflineStore": "file",
    "mlplatform.feast_plugins.compute_engine.PipelinedComputeEngine": "local",
}
Row = tuple[str, str, str, str]


def main() -> None:
    """Measure at one and at ten times the data, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scales", type=int, nargs="+", default=[1, 10], help="multiples of the data")
    parser.add_argument("--repeats", type=int, default=3, help="runs of which the best counts")
    options = parser.parse_args()
    show(("what", "data", "contender", "figure"))
    show(("---",) * 4)
    for row in chain(measure_online(), *(measure(scale, options.repeats) for scale in options.scales)):
        show(row)


def show(cells: Sequence[str]) -> None:
    """Write a line of the table as soon as it is known."""
    sys.stdout.write(f"| {' | '.join(cells)} |\n")
    sys.stdout.flush()


def measure(scale: int, repeats: int) -> Iterator[Row]:
    """Time retrieval and materialising at one scale."""
    versions = make_versions(scale)
    entity_df = versions[["user_id", "event_timestamp"]]
    size = f"{len(versions):,} rows"
    with scratch(versions) as (ours, stock, folder):
        lookups: dict[str, Callable[[], object]] = {
            "ours": lambda: features.point_in_time(ours, entity_df),
            "Feast's file store, files on disk": lambda: features.point_in_time(stock, entity_df),
            "hand-written window": lambda: by_hand(entity_df, folder, WINDOW),
        }
        if scale == 1:  # takes minutes at 10 times the data, see docs/decisions
            lookups["hand-written ASOF JOIN"] = lambda: by_hand(entity_df, folder, ASOF)
        for name, run in lookups.items():
            yield rate("history", size, name, run, len(versions), repeats)

        users = versions.loc[versions["event_timestamp"] <= features.MATERIALISE_END, "user_id"].nunique()
        loads = {"ours": ours, "Feast's stock settings, files on disk": stock}
        for name, store in loads.items():
            best = min(first_load(store) for _ in range(repeats))
            yield figure("materialise", size, f"{name}, first load", users * 3, best)
            yield rate("materialise", size, f"{name}, again", partial(load, store), users * 3, repeats)
        yield rate("materialise", size, "bare pipelined HSET", lambda: bare_writes(versions), users * 3, repeats)


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


ASOF = """
    SELECT {columns} FROM asked ASOF LEFT JOIN read_parquet('{uri}') AS known
    ON asked.user_id = known.user_id AND asked.moment >= known.event_timestamp ORDER BY asked.place
"""
WINDOW = """
    SELECT {columns} FROM (
        SELECT place, last_value(known IGNORE NULLS) OVER (
            PARTITION BY user_id ORDER BY moment, place NULLS FIRST ROWS UNBOUNDED PRECEDING) AS known
        FROM (SELECT user_id, event_timestamp AS moment, NULL AS place, struct_pack({columns}) AS known
              FROM read_parquet('{uri}') UNION ALL SELECT user_id, moment, place, NULL FROM asked)
    ) WHERE place IS NOT NULL ORDER BY place
"""


def by_hand(entity_df: pd.DataFrame, folder: str, query: str) -> pd.DataFrame:
    """Join the three files as somebody would who needs only that: no ttl, no checks of files, names or types."""
    asked = pa.Table.from_pandas(entity_df.rename(columns={"event_timestamp": "moment"}), preserve_index=False)
    asked = asked.append_column("place", pa.array(range(len(asked))))
    answers = [entity_df.reset_index(drop=True)]
    with connection() as duck:
        duck.register("asked", asked)
        for view, names in history.VIEWS.items():
            columns = ", ".join(names)
            text = query.format(columns=columns, uri=f"{folder}/{view}.parquet")
            if query is WINDOW:
                text = text.replace(f"SELECT {columns}", f"SELECT {', '.join(f'known.{name}' for name in names)}", 1)
            answers.append(duck.sql(text).to_arrow_table().to_pandas())
    return pd.concat(answers, axis=1)


def load(store: FeatureStore) -> None:
    """Materialise all views through Feast's own API."""
    with redirect_stdout(io.StringIO()):
        store.materialize(history.WINDOW_START.to_pydatetime(), features.MATERIALISE_END.to_pydatetime())


def first_load(store: FeatureStore) -> float:
    """Time materialising into an online store that holds nothing of this project."""
    with redis_client() as client:
        project = store.project.encode()
        mine = [key for key in client.scan_iter(count=10_000) if key.endswith(project)]
        for start in range(0, len(mine), 10_000):
            client.unlink(*mine[start : start + 10_000])
    return timed(lambda: load(store))


def bare_writes(versions: pd.DataFrame) -> None:
    """Write as many keys and values of the same sizes with nothing but redis-py."""
    users = versions["user_id"].unique()
    with redis_client() as client:
        for names in history.VIEWS.values():
            values = [part for name in names for part in (name[:4], b"0123456789ab")]
            for start in range(0, len(users), 10_000):
                pipeline = client.pipeline(transaction=False)
                for user in users[start : start + 10_000]:
                    pipeline.execute_command("HSET", f"benchmark-bare-{user}", "_ts:view", b"0123456789", *values)
                pipeline.execute()
        keys = [f"benchmark-bare-{user}" for user in users]
        for start in range(0, len(keys), 10_000):
            client.unlink(*keys[start : start + 10_000])


def measure_online() -> Iterator[Row]:
    """Time reading eight features of 1 and of 100 users, one after another."""
    store = features.open_store()
    store.config.mlflow.enabled = False
    service = store.get_feature_service(feature_client.SERVICE)
    frame = read_income(find_root() / "data" / "income_data.csv")
    users = history.build_history(frame)["user_id"].drop_duplicates().tolist()
    session = requests.Session()
    session.headers["Authorization"] = f"Bearer {os.environ.get('FEATURE_SERVER_TOKEN', '')}"
    url = f"{os.environ['FEATURE_SERVER_URL']}/get-online-features"
    with redis_client() as client:

        def bare(asked: list[str]) -> None:
            pipeline = client.pipeline(transaction=False)
            for user in asked:
                pipeline.hmget(f"benchmark-none-{user}", [f"field{place}" for place in range(11)])
            pipeline.execute()

        ways: dict[str, Callable[[list[str]], Any]] = {
            "SDK": lambda asked: store.get_online_features(service, [{"user_id": user} for user in asked]).to_dict(),
            "HTTP": lambda asked: session.post(
                url, json={"feature_service": feature_client.SERVICE, "entities": {"user_id": asked}}, timeout=30
            ).raise_for_status(),
            "bare HMGET": bare,
        }
        for count, calls in ((1, 500), (100, 100)):
            for name, read in ways.items():
                read(users[:count])
                times = sorted(timed(partial(read, users[at : at + count])) for at in range(calls))
                p50, p99 = statistics.median(times) * 1000, times[int(len(times) * 0.99)] * 1000
                yield "online read", f"{count} users", name, f"p50 {p50:.2f} ms, p99 {p99:.2f} ms"


def rate(what: str, size: str, name: str, run: Callable[[], object], rows: int, repeats: int) -> Row:
    """Time a run several times and keep the best."""
    return figure(what, size, name, rows, min(timed(run) for _ in range(repeats)))


def figure(what: str, size: str, name: str, rows: int, seconds: float) -> Row:
    """Put a time as rows per second."""
    return what, size, name, f"{rows / seconds:,.0f} rows/s ({seconds:.2f} s)"


def timed(run: Callable[[], object]) -> float:
    """Give the seconds a call takes."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def redis_client() -> redis.Redis:
    """Connect to the platform's online store."""
    return redis.Redis.from_url(Settings.from_env(os.environ).redis_url)


if __name__ == "__main__":
    main()
