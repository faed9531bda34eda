"""The online store never goes back in time, and lets values end with their ttl."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pandas as pd
import pytest
import redis
from feast import Entity, FeatureView, Field, ValueType
from feast.infra.online_stores.redis import RedisOnlineStoreConfig
from feast.types import Int64
from shop import Shop, scratch_repository

from mlplatform import features
from mlplatform.feast_plugins.online_store import ExpiringRedisOnlineStore
from mlplatform.settings import Settings

USER = Entity(name="user", join_keys=["user_id"], value_type=ValueType.STRING)
NOW = pd.Timestamp.now("UTC").floor("us")


def make_view(shop: Shop, ttl: timedelta, rows: dict[str, pd.Timestamp]) -> None:
    data = pd.DataFrame({"user_id": list(rows), "at": list(rows.values()), "n": range(len(rows))})
    schema = [Field(name="n", dtype=Int64)]
    view = FeatureView(name="v", entities=[USER], schema=schema, source=shop.source("v", data), ttl=ttl)
    shop.store.apply([USER, view])


def load(shop: Shop) -> None:
    shop.store.materialize((NOW - timedelta(days=400)).to_pydatetime(), datetime.now(UTC) + timedelta(days=1))


def read(shop: Shop, *users: str) -> list[int | None]:
    return shop.online(["v:n"], *({"user_id": user} for user in users))["n"]


def test_values_end_online_when_they_end_in_history(platform: Settings, tmp_path: Path):
    shop = Shop("ours on local files", tmp_path, platform, expire_online=True)
    start = pd.Timestamp.now("UTC").floor("us")
    make_view(
        shop, timedelta(days=10), {"over": start - timedelta(days=11), "soon": start - timedelta(days=10, seconds=-6)}
    )
    load(shop)
    assert read(shop, "over", "soon") == [None, 1]
    time.sleep(max(0, 6.1 - (pd.Timestamp.now("UTC") - start).total_seconds()))
    asked = {"user_id": ["over", "soon"], "event_timestamp": [pd.Timestamp.now("UTC")] * 2}
    assert shop.ask(["v:n"], asked)["n"].isna().all()
    assert read(shop, "over", "soon") == [None, None]


def test_pushed_values_end_too(platform: Settings, tmp_path: Path):
    shop = Shop("ours on local files", tmp_path, platform, expire_online=True)
    make_view(shop, timedelta(days=1), {"x": NOW})
    frame = pd.DataFrame({"user_id": ["old", "new"], "at": [NOW - timedelta(days=2), NOW], "n": [1, 2]})
    shop.store.write_to_online_store("v", frame)
    assert read(shop, "old", "new") == [None, 2]


def test_without_the_setting_values_stay(platform: Settings, tmp_path: Path):
    shop = Shop("ours on local files", tmp_path, platform, expire_online=False)
    make_view(shop, timedelta(days=1), {"old": NOW - timedelta(days=2)})
    load(shop)
    assert read(shop, "old") == [0]


def test_a_server_that_cannot_expire_fields_is_said_once(
    platform: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    shop = Shop("ours on local files", tmp_path, platform, expire_online=True)
    make_view(shop, timedelta(days=1), {"old": NOW - timedelta(days=2)})
    execute = redis.Redis.execute_command

    def older_server(self, *command, **options):
        return [None] if command[:2] == ("COMMAND", "INFO") else execute(self, *command, **options)

    monkeypatch.setattr(redis.Redis, "execute_command", older_server)
    with caplog.at_level(logging.WARNING):
        load(shop)
        load(shop)
    assert read(shop, "old") == [0]
    assert sum("can't expire single fields" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize("moment", ["1969-12-31T23:59:58.5Z", "1970-01-01T00:00:00Z", "2023-05-01T00:00:00.000001Z"])
def test_a_later_value_stays_whatever_comes_after(platform: Settings, tmp_path: Path, moment: str):
    shop = Shop("ours on local files", tmp_path, platform)
    make_view(shop, timedelta(0), {"x": NOW})
    at = pd.Timestamp(moment)
    for shift, value in ((0, 1), (-1, 2), (0, 3), (1, 4), (-1_000_000, 5)):
        frame = pd.DataFrame({"user_id": ["u"], "at": [at + pd.Timedelta(shift, "us")], "n": [value]})
        shop.store.write_to_online_store("v", frame)
    assert read(shop, "u") == [4]


def test_the_fast_way_knows_every_field_of_a_view_and_of_the_online_stores_configuration():
    view = FeatureView(name="v", entities=[USER])
    assert {name.lstrip("_") for name in vars(view)} == {
        "name", "entities", "description", "tags", "owner", "org", "ttl", "batch_source", "stream_source",
        "source_views", "entity_columns", "features", "online", "offline", "projection", "mode",
        "enable_validation", "version", "enabled", "state", "current_version_number", "created_timestamp",
        "last_updated_timestamp", "materialization_intervals", "source", "data_source",
    }  # fmt: skip
    assert set(RedisOnlineStoreConfig.model_fields) == {
        "type", "redis_type", "client", "sentinel_master", "connection_string", "key_ttl_seconds",
        "full_scan_for_deletion", "skip_dedup",
    }  # fmt: skip


# No call leaves the platform


def test_no_call_asks_for_another_machines_name(platform: Settings, tmp_path: Path):
    """Python's look-ups are noted by its audit hook; native code's, where there is a compiler, before libc's."""
    asked = tmp_path / "names"
    script = Path(__file__).parents[2] / "support" / "every_call.py"
    environ = {**os.environ, "NAMES_ASKED": str(asked)}
    if compiler := shutil.which("cc"):
        library = str(tmp_path / "names.so")
        subprocess.run([compiler, "-shared", "-fPIC", "-o", library, script.with_name("names.c"), "-ldl"], check=True)
        environ["LD_PRELOAD"] = library
    command = [sys.executable, str(script), str(tmp_path)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    names = set(asked.read_text().split())
    assert "127.0.0.1" in names, "the look-ups were not noted"
    assert not [name for name in names if "amazonaws" in name]


# Many at once


WORKER = """
import sys, time, pathlib, random
import pandas as pd
from mlplatform import features
repo, role, number, seed = pathlib.Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
store = features.open_store(repo)
dice = random.Random(seed)
while True:
    store = store if dice.random() < 0.9 else features.open_store(repo)
    try:
        if role == "apply":
            store.refresh_registry()
            service = store.get_feature_service("income_v1")
            from feast import FeatureService
            name = f"s{number}_{time.time_ns()}"
            made = FeatureService(name=name, features=[store.get_feature_view("demographic")])
            store.registry.apply_feature_service(made, store.project, commit=True)
            print("applied", name, flush=True)
        else:
            at = pd.Timestamp(dice.randrange(1_600_000_000, 1_700_000_000), unit="s", tz="UTC")
            rows = pd.DataFrame({"user_id": [f"u{dice.randrange(20)}" for _ in range(5)], "event_timestamp": at,
                                 "Sex": str(at.value), "Race": "r", "Native_country": "n"}).drop_duplicates("user_id")
            store.write_to_online_store("demographic", rows)
            for user in rows["user_id"]:
                print("stored", user, at.value, flush=True)
    except Exception as error:
        print("refused", type(error).__name__, str(error)[:200], flush=True)
"""


def test_no_acknowledged_change_is_lost_among_many_that_are_killed(platform: Settings, tmp_path: Path):
    """Eight apply and eight load at once while some are killed; it takes a minute, since each start imports Feast."""
    repo = scratch_repository(tmp_path)
    features.apply(repo)
    dice = random.Random(7)
    said: list[Path] = []

    def start(role: str, number: int) -> subprocess.Popen[bytes]:
        path = tmp_path / f"said-{len(said)}"
        said.append(path)
        with path.open("wb") as output:
            command = [sys.executable, "-c", WORKER, str(repo), role, str(number), str(len(said))]
            return subprocess.Popen(command, stdout=output, stderr=subprocess.DEVNULL)

    def done() -> list[list[str]]:
        lines = [line for path in said for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        return [line.split() for line in lines]

    workers = {("apply" if n < 8 else "load", n): None for n in range(16)}
    running = {key: start(*key) for key in workers}
    deadline = time.monotonic() + 240
    try:
        while len(done()) < 2_000 and time.monotonic() < deadline:
            time.sleep(2)
            if dice.random() < 0.3:
                key = dice.choice(list(running))
                running[key].send_signal(signal.SIGKILL)
                running[key].wait()
                running[key] = start(*key)
    finally:
        for process in running.values():
            process.kill()
            process.wait()
    operations = done()
    assert len(operations) >= 2_000, f"{len(operations)} operations in four minutes"
    refused = [line for line in operations if line[0] == "refused"]
    assert not [line for line in refused if line[1] != "LostRaceError"], refused[:3]
    applied = {line[1] for line in operations if line[0] == "applied"}
    store = features.open_store(repo)
    assert applied
    assert applied <= {service.name for service in store.list_feature_services()}
    latest: dict[str, int] = {}
    for line in operations:
        if line[0] == "stored":
            latest[line[1]] = max(latest.get(line[1], 0), int(line[2]))
    online = features.read_online(store, list(latest), ["demographic:Sex"])
    # A killed loader may have stored more than it said, never less.
    for user, value in zip(latest, online["Sex"], strict=True):
        assert int(value) >= latest[user]


def test_the_asynchronous_way_decides_alike(platform: Settings, tmp_path: Path):
    shop = Shop("ours on local files", tmp_path, platform)
    make_view(shop, timedelta(0), {"x": NOW})
    for shift, value in ((0, 1), (-1, 2)):
        frame = pd.DataFrame({"user_id": ["u"], "at": [NOW + pd.Timedelta(shift, "us")], "n": [value]})
        asyncio.run(shop.store.write_to_online_store_async("v", frame))
    assert read(shop, "u") == [1]
    assert isinstance(shop.store._get_provider().online_store, ExpiringRedisOnlineStore)
