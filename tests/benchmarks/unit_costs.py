"""Measure what a feature row and a user cost: the unit costs of docs/growing.md.

`python tests/benchmarks/unit_costs.py` in the environment of `make env`, after `make features`. Seconds are seconds of
CPU, which a busy machine changes little. What `make features` loaded is deleted and loaded again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator

import pandas as pd
import redis
from figures import bytes_per_key, keys_of, show

from mlplatform import features, objectstore
from mlplatform.history import USER_ID, VIEWS
from mlplatform.settings import Settings

COPIES, REPEATS = 10, 3


def main() -> None:
    """Print a Markdown table."""
    for cells in [("what", "cost"), ("---", "---"), *measure()]:
        show(cells)


def measure() -> Iterator[tuple[str, str]]:
    """Measure on the features that are there."""
    store = features.open_store()
    store.config.mlflow.enabled = False
    uris = [f"s3://feature-data-sets/{view}.parquet" for view in VIEWS]
    rows = objectstore.read_frame(uris[0])[[USER_ID, "event_timestamp"]]
    size = sum(len(objectstore.read_bytes(uri)) for uri in uris)
    yield "object store, per row and view", f"{size / len(rows) / len(uris):.0f} bytes"
    with redis.Redis.from_url(Settings.from_env(os.environ).redis_url) as client:
        keys = keys_of(client, store.project)
        held = bytes_per_key(client, keys)
        yield "online store, per user of three views", f"{held:.0f} bytes ({len(keys):,} users)"

        asked = pd.concat([rows] * COPIES, ignore_index=True)
        features.point_in_time(store, rows)
        seconds = cpu(lambda: features.point_in_time(store, asked))
        yield "history, per million rows asked of three views", f"{seconds / len(asked) * 1e6:.1f} s of CPU"

        for what, prepare in (("a first load", lambda: client.unlink(*keys)), ("nothing newer", lambda: None)):
            before = server_cpu(client)
            seconds = cpu(lambda: features.materialise(store), prepare)
            written = len(keys) * len(uris)
            yield f"{what}, per million rows", f"{seconds / written * 1e6:.1f} s of CPU"
            yield "the same, in the online store", f"{(server_cpu(client) - before) / written * 1e6:.1f} s of CPU"


def cpu(run: Callable[[], object], prepare: Callable[[], object] = lambda: None) -> float:
    """Give the seconds of CPU that a call takes in this process, the median of three."""
    times = []
    for _ in range(REPEATS):
        prepare()
        started = time.process_time()
        run()
        times.append(time.process_time() - started)
    return sorted(times)[REPEATS // 2]


def server_cpu(client: redis.Redis) -> float:
    """Give the seconds of CPU that the online store has used, per run of `cpu`."""
    figures = client.info("cpu")
    return float(figures["used_cpu_user"] + figures["used_cpu_sys"]) / REPEATS


if __name__ == "__main__":
    main()
