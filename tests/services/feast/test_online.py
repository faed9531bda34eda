"""The online store never goes back in time, and lets values end with their ttl."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import httpx
import pandas as pd
import pytest
import redis
import warm
from feast import Entity, FeatureService, FeatureView, Field, ValueType
from feast.infra.online_stores.redis import RedisOnlineStore, RedisOnlineStoreConfig
from feast.types import Array, Float64, Int64, String
from shop import Shop, scratch_repository

from mlplatform import features
from mlplatform.feast_plugins import compute_engine, online_store
from mlplatform.feast_plugins.online_store import ExpiringRedisOnlineStore
from mlplatform.settings import Settings
from mlplatform_ops.feast_servers.feature_server import StoreWatcher, create_app

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


@pytest.mark.parametrize("command", online_store.EXPIRING)
def test_values_end_online_when_they_end_in_history(
    platform: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
):
    monkeypatch.setattr(online_store, "EXPIRING", (command,))
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


def test_after_a_load_of_nothing_new_only_what_is_newer_is_sent(
    platform: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    shop = Shop("ours on local files", tmp_path, platform)
    users = {f"u{number}": NOW for number in range(600)}  # three calls of the script
    make_view(shop, timedelta(0), users)
    load(shop)
    load(shop)
    asked = []
    newer = online_store._newer
    monkeypatch.setattr(online_store, "_newer", lambda *given: asked.append(newer(*given)) or asked[-1])
    changed = {"u0": 1, "u299": -1, "u300": 1, "u599": 1}
    frame = pd.DataFrame({"user_id": list(users), "at": NOW, "n": 7})
    frame["at"] += pd.to_timedelta(frame["user_id"].map(changed).fillna(0), "us")
    shop.store.write_to_online_store("v", frame)
    assert [len(rows) for rows in asked] == [3]
    assert read(shop, "u0", "u1", "u299", "u300", "u599") == [7, 1, 299, 7, 7]


@pytest.mark.parametrize("expires", [True, False])
def test_a_first_load_asks_the_script_only_about_what_is_stored(
    platform: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expires: bool
):
    shop = Shop("ours on local files", tmp_path, platform, expire_online=expires)
    users = {f"u{number}": NOW for number in range(600)} | {"over": NOW - timedelta(days=20)}
    make_view(shop, timedelta(days=10), users)
    moments = [NOW + timedelta(seconds=1), NOW - timedelta(seconds=1)]
    shop.store.write_to_online_store("v", pd.DataFrame({"user_id": ["u0", "u1"], "at": moments, "n": [-1, -2]}))
    left = []
    add = online_store._add
    monkeypatch.setattr(online_store, "_add", lambda *given: left.append(add(*given)) or left[-1])
    load(shop)
    assert [len(rows) for rows in left] == [2]
    assert read(shop, "u0", "u1", "u2", "u599", "over") == [-1, 1, 2, 599, None if expires else 600]


def test_where_feast_is_told_not_to_compare_the_last_written_stays(platform: Settings, tmp_path: Path):
    shop = Shop("ours on local files", tmp_path, platform, skip_dedup=True)
    make_view(shop, timedelta(0), {"x": NOW, "y": NOW})
    load(shop)
    make_view(shop, timedelta(0), {"y": NOW - timedelta(days=1), "x": NOW - timedelta(days=1)})
    load(shop)
    assert read(shop, "x", "y") == [1, 0]


def test_feasts_size_of_a_batch_and_its_validation_are_kept(
    platform: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    shop = Shop("ours on local files", tmp_path, platform)
    make_view(shop, timedelta(0), {"x": NOW, "y": NOW, "z": NOW})
    shop.config.materialization_config.online_write_batch_size = 2
    sizes = []
    write = compute_engine.write_batch
    monkeypatch.setattr(compute_engine, "write_batch", lambda *given: sizes.append(given[-1].num_rows) or write(*given))
    load(shop)
    assert sizes == [2, 1]
    view = shop.store.get_feature_view("v")
    view.enable_validation = True
    shop.store.apply([view])
    load(shop)
    assert sizes == [2, 1], "a view with validation went the short way, which does not validate"
    assert read(shop, "x", "y", "z") == [0, 1, 2]


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


def work(repo: Path, role: str, number: int, seed: int, said: Path) -> None:
    """What one of sixteen processes does until it is killed: apply a service or load rows, and say what is done."""
    with said.open("w", buffering=1) as out:
        store, dice = features.open_store(repo), random.Random(seed)
        while True:
            store = store if dice.random() < 0.9 else features.open_store(repo)
            try:
                if role == "apply":
                    store.refresh_registry()
                    name = f"s{number}_{time.time_ns()}"
                    made = FeatureService(name=name, features=[store.get_feature_view("demographic")])
                    store.registry.apply_feature_service(made, store.project, commit=True)
                    out.write(f"applied {name}\n")
                else:
                    at = pd.Timestamp(dice.randrange(1_600_000_000, 1_700_000_000), unit="s", tz="UTC")
                    rows = pd.DataFrame({"user_id": [f"u{dice.randrange(20)}" for _ in range(5)]}).drop_duplicates()
                    values = {"event_timestamp": at, "Sex": str(at.value), "Race": "r", "Native_country": "n"}
                    store.write_to_online_store("demographic", rows.assign(**values))
                    out.writelines(f"stored {user} {at.value}\n" for user in rows["user_id"])
            except Exception as error:
                out.write(f"refused {type(error).__name__} {str(error)[:200]!r}\n")


def test_no_acknowledged_change_is_lost_among_many_that_are_killed(platform: Settings, tmp_path: Path):
    """Eight apply and eight load at once, as processes of their own, while some are killed."""
    repo = scratch_repository(tmp_path)
    features.apply(repo)
    processes = warm.context()
    dice = random.Random(7)
    said: list[Path] = []

    def start(role: str, number: int) -> ForkServerProcess:
        said.append(tmp_path / f"said-{len(said)}")
        said[-1].touch()
        process = processes.Process(target=work, args=(repo, role, number, len(said), said[-1]))
        process.start()
        return process

    def done() -> list[list[str]]:
        lines = [line for path in said for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        return [line.split() for line in lines]

    workers = {("apply" if n < 8 else "load", n): None for n in range(16)}
    running = {key: start(*key) for key in workers}
    deadline = time.monotonic() + 540
    try:
        while len(done()) < 2_000 and time.monotonic() < deadline:
            time.sleep(2)
            if dice.random() < 0.3:
                key = dice.choice(list(running))
                running[key].kill()
                running[key].join()
                running[key] = start(*key)
    finally:
        for process in running.values():
            process.kill()
            process.join()
    operations = done()
    assert len(operations) >= 2_000, f"{len(operations)} operations in nine minutes"
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


# Plain views are read in one round trip


def test_plain_views_are_read_as_feasts_own_code_reads_them(platform: Settings, tmp_path: Path):
    shop = Shop("ours on local files", tmp_path, platform)
    moments = [NOW, pd.Timestamp("1969-12-31T23:59:58.5Z"), pd.Timestamp("2023-05-01T00:00:00.000001Z")]
    data = pd.DataFrame({"user_id": ["a", "b", "ü" * 100], "at": moments, "n": [2**40, None, -1]})
    data = data.astype({"n": "Int64"}).assign(t=["x" * 200, "", None], w=[[1.5], [], [2.0, 3.0]])
    fields = {"numbers": {"n": Int64}, "texts": {"t": String, "w": Array(Float64)}}
    views = [
        FeatureView(
            name=name,
            entities=[USER],
            schema=[Field(name=field, dtype=kind) for field, kind in kinds.items()],
            source=shop.source(name, data.assign(at=data["at"] + timedelta(hours=place))[["user_id", "at", *kinds]]),
        )
        for place, (name, kinds) in enumerate(fields.items())
    ]
    shop.store.apply([USER, *views, FeatureService(name="all", features=views)])
    shop.store.materialize(datetime(1960, 1, 1, tzinfo=UTC), datetime.now(UTC) + timedelta(days=1))
    online, registry = shop.store._get_provider().online_store, shop.store.registry
    for asked in (["texts:t"], ["texts:w", "numbers:n"], shop.store.get_feature_service("all")):
        for ids in (["a"], ["b", "nobody", "ü" * 100, "b", ""]):
            for full_names in (False, True):
                question = (shop.config, asked, {"user_id": ids}, registry, shop.project, full_names)
                found = online.read_plain(*question)
                own = RedisOnlineStore.get_online_features(online, *question)
                assert found.proto == own.proto
                assert found.to_dict(True) == own.to_dict(True)
    for rows in ({"user_id": [1]}, {"user_id": ["a"], "n": [1]}, [{"user_id": None}], {"user_id": []}, [{"n": 1}]):
        assert online.read_plain(shop.config, ["texts:t"], rows, registry, shop.project, False) is None


def test_the_feature_servers_short_way_gives_the_bytes_that_feasts_app_gives(platform: Settings, tmp_path: Path):
    repo = scratch_repository(tmp_path)
    rows = pd.DataFrame({"user_id": ["ann"], "event_timestamp": NOW, "Sex": "é", "Race": '"', "Native_country": None})
    features.apply(repo).write_to_online_store("demographic", rows)
    watcher = StoreWatcher(repo)
    watcher.look()
    answers: list[bool] = []
    short = watcher.read_plain

    def counted(question):
        answer = short(question)
        answers.append(answer is not None)
        return answer

    names = ["demographic:Sex", "occupation:Education"]
    entities = {"user_id": ["ann", "nobody", "ann"]}
    questions = [
        {"feature_service": "income_v1", "entities": entities},
        {"features": names, "entities": entities, "full_feature_names": True},
        {
            "features": ["demographic:Sex"],
            "entities": {"user_id": ["ann"]},
            "include_feature_view_version_metadata": True,
        },
        {"feature_service": "no_such_service", "entities": entities},
        {"features": ["demographic:nothing"], "entities": entities},
    ]

    async def ask_all() -> None:
        transport = httpx.ASGITransport(create_app(watcher), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            for question in questions:
                both = []
                for way in (counted, lambda _: None):
                    watcher.read_plain = way
                    answer = await client.post("/get-online-features", json=question)
                    both.append((answer.status_code, answer.headers["content-type"], answer.content))
                assert both[0] == both[1]

    asyncio.run(ask_all())
    assert answers == [True, True, False, False, False]


def test_a_plan_is_made_anew_when_the_registry_has_changed(platform: Settings, tmp_path: Path):
    repo = scratch_repository(tmp_path)
    store = features.apply(repo)
    rows = pd.DataFrame({"user_id": ["ann"], "event_timestamp": NOW, "Sex": "x", "Race": "y", "Native_country": "z"})
    store.write_to_online_store("demographic", rows)

    def ask() -> dict[str, list[object]]:
        return store.get_online_features(store.get_feature_service("income_v1"), [{"user_id": "ann"}]).to_dict()

    watcher = StoreWatcher(repo)
    question = {"feature_service": "income_v1", "entities": {"user_id": ["ann"]}}

    def ask_server() -> dict[str, object]:
        watcher.look()
        return dict(json.loads(watcher.read_plain(question).body)["metadata"])

    assert set(ask()) > {"Sex", "Education"}
    assert {"Sex", "Education"} < set(ask_server()["feature_names"])
    text = (repo / "features.py").read_text()
    (repo / "features.py").write_text(text.replace("features=views,", "features=views[:1],"))
    features.apply(repo)
    store.refresh_registry()
    assert set(ask()) == {"user_id", "Sex", "Race", "Native_country"} == set(ask_server()["feature_names"])
