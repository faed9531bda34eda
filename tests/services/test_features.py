"""The feature store on real servers: what it answers, and what it says when something is wrong.

Tests that write use a repository of their own: a copy of ours with another project, registry and files.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from uuid import uuid4

import pandas as pd
import pytest
import redis
from shop import describe_table

from mlplatform import feature_client, features, history, objectstore
from mlplatform.errors import CredentialsError, DataError, MissingObjectError, RegistryError, ServiceDownError
from mlplatform.history import USER_ID, VIEWS
from mlplatform.settings import Settings, find_settings

ROOT = Path(__file__).parents[2]
ANN, BOB = "ann", "bob"
JANUARY, MARCH, MAY = (pd.Timestamp(f"2023-0{month}-01T12:00:00.000001", tz="UTC") for month in (1, 3, 5))


class Scratch:
    """A copy of the feature repository that shares nothing with it but the servers."""

    def __init__(self, folder: Path) -> None:
        self.name = f"scratch_{uuid4().hex[:8]}"
        self.repo = folder / self.name
        shutil.copytree(ROOT / "feature_repo", self.repo, ignore=shutil.ignore_patterns("__pycache__"))
        describe_table(folder)
        self._edit("feature_store.yaml", "project: income", f"project: {self.name}")
        self._edit("feature_store.yaml", "registry.db", f"{self.name}.db")
        self._edit("entity.py", '"income"', f'"{self.name}"')
        self._edit("features.py", "s3://feature-data-sets/", f"s3://feature-data-sets/{self.name}/")

    def _edit(self, file: str, old: str, new: str) -> None:
        path = self.repo / file
        text = path.read_text()
        assert old in text, f"{file} has no {old}"
        path.write_text(text.replace(old, new))

    def use_stock_engine(self) -> None:
        self._edit("feature_store.yaml", "mlplatform.feast_plugins.compute_engine.PipelinedComputeEngine", "local")

    def write(self, *versions: tuple[str, pd.Timestamp, str]) -> None:
        """Give the views these versions, all features of a version having one value."""
        frame = pd.DataFrame([version[:2] for version in versions], columns=[USER_ID, "event_timestamp"])
        frame["event_timestamp"] = frame["event_timestamp"].astype("datetime64[us, UTC]")
        values = [version[2] for version in versions]
        for view, names in VIEWS.items():
            self.put(view, frame.assign(**dict.fromkeys(names, values)))

    def put(self, view: str, frame: pd.DataFrame) -> str:
        uri = f"s3://feature-data-sets/{self.name}/{view}.parquet"
        return objectstore.write_bytes(objectstore.encode(frame, uri), uri)

    def stored(self, settings: Settings) -> dict[bytes, dict[bytes, bytes]]:
        """Read what Redis holds for this project, by key without the project."""
        with redis.Redis.from_url(settings.redis_url) as client:
            keys = [key for key in client.scan_iter() if key.endswith(self.name.encode())]
            return {key.removesuffix(self.name.encode()): client.hgetall(key) for key in keys}


@pytest.fixture
def scratch(platform: Settings, tmp_path: Path) -> Scratch:
    return Scratch(tmp_path)


@pytest.fixture
def store(scratch: Scratch):
    scratch.write((ANN, JANUARY, "old"), (ANN, MARCH, "new"), (BOB, JANUARY, "bob's"))
    return features.apply(scratch.repo)


def sex(store, *users: str) -> list[str | None]:
    return features.read_online(store, list(users))["Sex"].tolist()


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# What `make features` does


def test_building_twice_loads_everybody_and_then_changes_nothing(platform: Settings):
    said: list[str] = []
    repo, data = ROOT / "feature_repo", ROOT / "data" / "income_data.csv"
    assert [written.rows for written in features.build(data, repo, notify=said.append)] == [28_066] * 3
    again = features.build(data, repo, notify=said.append)
    assert [(written.rows, written.changed) for written in again] == [(28_066, 0)] * 3
    assert any("rows/s" in line for line in said)
    assert any(line.endswith("30,162 rows, there already") for line in said)


def test_the_registry_holds_what_the_repository_describes(store, scratch: Scratch):
    views = {view.name: view for view in store.list_feature_views()}
    assert {name: sorted(field.name for field in view.features) for name, view in views.items()} == {
        name: sorted(names) for name, names in VIEWS.items()
    }
    for view in views.values():
        assert view.ttl == pd.Timedelta(days=365)
        assert set(view.tags) == {"authors", "description", "used_by"}
    assert [(entity.name, entity.join_key, entity.value_type.name) for entity in store.list_entities()] == [
        ("user", "user_id", "STRING")
    ]
    service = store.get_feature_service(feature_client.SERVICE)
    names = [field.name for view in service.feature_view_projections for field in view.features]
    assert sorted(names) == sorted(history.FEATURES)


def test_no_address_and_no_secret_is_in_the_registry(store, scratch: Scratch, platform: Settings):
    registry = objectstore.read_bytes(f"s3://feature-registry/{scratch.name}.db")
    for word in (platform.s3_endpoint, platform.secret_key, platform.redis, "127.0.0.1"):
        assert word.encode() not in registry


# Materialising


def test_the_latest_value_in_the_range_is_loaded(store):
    written = features.materialise(store, JANUARY, MAY)
    assert [(entry.view, entry.rows, entry.changed) for entry in written] == [
        (view, 2, 2) for view in written_views(store)
    ]
    assert sex(store, ANN, BOB) == ["new", "bob's"]


def written_views(store) -> list[str]:
    return [view.name for view in store.list_feature_views()]


def test_both_ends_of_the_range_belong_to_it(store):
    microsecond = pd.Timedelta(1, "us")
    features.materialise(store, JANUARY, MARCH - microsecond)
    assert sex(store, ANN) == ["old"]
    features.materialise(store, MARCH, MARCH + microsecond)
    assert sex(store, ANN) == ["new"]


def test_an_earlier_version_never_replaces_a_later_one(store):
    features.materialise(store, JANUARY, MAY)
    written = features.materialise(store, JANUARY, MARCH - pd.Timedelta(1, "us"))
    assert [entry.changed for entry in written] == [0, 0, 0]
    assert sex(store, ANN) == ["new"]


def test_a_later_version_replaces_even_by_a_microsecond(store, scratch: Scratch):
    features.materialise(store, JANUARY, MAY)
    scratch.write((ANN, MARCH + pd.Timedelta(1, "us"), "newest"), (BOB, JANUARY, "changed behind its time"))
    written = features.materialise(store, JANUARY, MAY)
    assert [(entry.rows, entry.changed) for entry in written] == [(2, 1)] * 3
    assert sex(store, ANN, BOB) == ["newest", "bob's"]


def test_redis_holds_byte_for_byte_what_feasts_own_engine_writes(store, scratch: Scratch, tmp_path, platform):
    stock = Scratch(tmp_path / "stock")
    stock.use_stock_engine()
    versions = [(ANN, MARCH, "new"), ("Ünal 'x'", MAY, "ç"), ("no sex", MAY, None), ("half", JANUARY.floor("s"), "")]
    for repository in (scratch, stock):
        repository.write(*versions)
    features.materialise(store, JANUARY.floor("D"), MAY)
    other = features.apply(stock.repo)
    other.materialize(JANUARY.floor("D").to_pydatetime(), MAY.to_pydatetime())
    mine = scratch.stored(platform)
    assert len(mine) == 4
    assert mine == stock.stored(platform)


def test_a_null_value_is_found_and_null(store, scratch: Scratch):
    scratch.write((ANN, MAY, None), (BOB, MAY, "x"))
    features.materialise(store, JANUARY, MAY)
    answer = features.read_online(store, [ANN, BOB, "nobody"])
    assert answer["found"].tolist() == [True, True, False]
    assert answer["Sex"].tolist() == [None, "x", None]


@pytest.mark.parametrize(("start", "end"), [(MAY, JANUARY), (MAY, MAY)], ids=["inverted", "empty"])
def test_a_range_without_time_is_refused(store, start, end):
    with pytest.raises(DataError, match=r"no time lies between .*; give a start before the end"):
        features.materialise(store, start, end)


def test_a_range_without_values_is_refused(store):
    with pytest.raises(DataError, match=r"no feature has a value between .*; give a range within the history"):
        features.materialise(store, pd.Timestamp("2019-01-01"), pd.Timestamp("2020-01-01"))


def test_a_feature_file_without_a_column_is_not_materialised(store, scratch: Scratch):
    frame = pd.DataFrame({USER_ID: [ANN], "event_timestamp": [MAY.as_unit("us")], "Sex": ["x"], "Race": ["y"]})
    uri = scratch.put("demographic", frame)
    with pytest.raises(
        DataError, match=rf"{uri} \(source demographic_source\) has no column Native_country; it has .*"
    ):
        features.materialise(store, JANUARY, MAY)


def test_a_feature_file_with_another_type_is_not_materialised(store, scratch: Scratch):
    names = {name: [1] for name in VIEWS["demographic"]}
    scratch.put("demographic", pd.DataFrame({USER_ID: [ANN], "event_timestamp": [MAY.as_unit("us")], **names}))
    with pytest.raises(
        DataError, match=r"demographic:Sex in s3://.* is int64, and its view says STRING; write the file"
    ):
        features.materialise(store, JANUARY, MAY)


def test_a_feature_file_that_is_missing_is_named(platform: Settings, scratch: Scratch):
    store = features.apply(scratch.repo)
    with pytest.raises(
        MissingObjectError, match=r"demographic\.parquet \(source demographic_source\) is not there; write it"
    ):
        features.point_in_time(store, pd.DataFrame({USER_ID: [ANN], "event_timestamp": [MAY]}))


# Asking


def test_an_unknown_user_is_an_explicit_answer(store):
    features.materialise(store, JANUARY, MAY)
    answer = features.read_online(store, [ANN, "nobody"])
    assert answer["found"].tolist() == [True, False]
    with pytest.raises(RegistryError, match="knows nothing of user nobody; check the id, or run 'make features'"):
        feature_client.require_found(answer)
    assert "found" not in feature_client.require_found(answer.head(1)).columns


def test_a_user_may_be_asked_about_twice(store):
    features.materialise(store, JANUARY, MAY)
    assert sex(store, ANN, BOB, ANN) == ["new", "bob's", "new"]


def test_no_user_and_no_text_are_refused(store):
    with pytest.raises(DataError, match="no user was asked about"):
        features.read_online(store, [])
    with pytest.raises(DataError, match="user ids are text, and None is not"):
        features.read_online(store, [None])


IDS = [
    "it's", 'say "x"', "nul\0nul", "two\nlines\r\n", "tab\t", " ", "", "..", "../../etc/passwd", "a/b", "a,b;c|d",
    "%00%2e", "back\\slash", "\u202eright to left", "na\u00efve", "nai\u0308ve", "\U0001f600", "NaN", "None", "null",
    "0", "1e3", "'); DROP TABLE users; --", "{user_id}", "*", "x" * 65_536,
]  # fmt: skip


def test_any_text_is_an_id_in_history_and_online(scratch: Scratch):
    scratch.write(*((user, JANUARY, f"value {number}") for number, user in enumerate(IDS)))
    store = features.apply(scratch.repo)
    features.materialise(store, JANUARY, MARCH)
    expected = [f"value {number}" for number in range(len(IDS))]
    assert features.read_online(store, IDS)[[USER_ID, "found", "Sex"]].to_dict("list") == {
        USER_ID: IDS,
        "found": [True] * len(IDS),
        "Sex": expected,
    }
    asked = features.point_in_time(store, pd.DataFrame({USER_ID: IDS, "event_timestamp": MARCH}))
    assert asked[[USER_ID, "Sex"]].to_dict("list") == {USER_ID: IDS, "Sex": expected}


def test_half_a_character_is_no_id(store):
    with pytest.raises(DataError, match="half of a surrogate pair"):
        features.read_online(store, ["\ud800"])
    with pytest.raises(DataError, match="half of a surrogate pair"):
        features.point_in_time(store, pd.DataFrame({USER_ID: ["\ud800"], "event_timestamp": [MARCH]}))


ASKED = pd.DataFrame({USER_ID: [ANN], "event_timestamp": [MAY]})


@pytest.mark.parametrize(
    "ask", [features.point_in_time, lambda store, _, names: features.read_online(store, [ANN], names)]
)
def test_misspelt_names_are_answered_with_those_there_are(store, ask):
    with pytest.raises(RegistryError, match=r"view demografic does not exist .* demographic, .*; check the name"):
        ask(store, ASKED, ["demografic:Sex"])
    with pytest.raises(RegistryError, match=r"view 'demographic' has no feature 'Sexx'; it has .*Sex"):
        ask(store, ASKED, ["demographic:Sexx"])
    with pytest.raises(RegistryError, match=r"service income_v9 does not exist .* income_v1; check the name"):
        ask(store, ASKED, "income_v9")


def test_a_registry_that_is_missing_is_answered_with_what_to_run(platform: Settings, scratch: Scratch):
    with pytest.raises(
        RegistryError, match=r"no feature registry at s3://feature-registry/.*\.db; run 'make features'"
    ):
        features.open_store(scratch.repo)


def test_a_folder_without_a_store_is_refused(tmp_path: Path):
    with pytest.raises(MissingObjectError, match=r"holds no feature_store.yaml"):
        features.open_store(tmp_path)


# Servers that are down, and two writers


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """redis-py tries again as often as ever, and does not sleep in between."""
    monkeypatch.setattr("redis.retry.sleep", lambda _: None)


def test_a_redis_that_is_down_is_named(store, scratch: Scratch, no_waiting: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("REDIS_CONNECTION_STRING", f"127.0.0.1:{closed_port()},password=x")
    for act in (
        lambda: features.materialise(features.open_store(scratch.repo), JANUARY, MAY),
        lambda: features.read_online(features.open_store(scratch.repo), [ANN]),
    ):
        with pytest.raises(ServiceDownError, match=r"online store at 127\.0\.0\.1:\d+ does not answer; run 'make up'"):
            act()


def test_a_redis_that_refuses_the_password_is_named(
    store, scratch: Scratch, no_waiting: None, monkeypatch: pytest.MonkeyPatch
):
    address = os.environ["REDIS_CONNECTION_STRING"].split(",")[0]
    monkeypatch.setenv("REDIS_CONNECTION_STRING", f"{address},password=wrong")
    with pytest.raises(CredentialsError, match="refuses the credentials; check REDIS_CONNECTION_STRING"):
        features.read_online(features.open_store(scratch.repo), [ANN])


def test_an_object_store_that_is_down_is_named(store, scratch: Scratch, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{closed_port()}")
    for act in (lambda: features.open_store(scratch.repo), lambda: features.point_in_time(store, ASKED)):
        with pytest.raises(ServiceDownError, match=r"object store does not answer for s3://.*; run 'make up'"):
            act()


def test_an_object_store_that_refuses_the_keys_is_named(store, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(CredentialsError, match=r"refuses the credentials for s3://.*; check AWS_ACCESS_KEY_ID"):
        features.point_in_time(store, ASKED)


def meanwhile(store, act) -> None:
    """Let something happen between the moment a store reads the registry and the one it writes."""
    registry = store.registry._registry_store
    write = registry.update_registry_proto

    def be_slow(proto) -> None:
        registry.update_registry_proto = write
        act()
        write(proto)

    registry.update_registry_proto = be_slow


def test_what_another_command_changed_meanwhile_is_kept(store, scratch: Scratch):
    slower = features.open_store(scratch.repo)
    meanwhile(slower, lambda: features.materialise(store, JANUARY, MAY))
    view = slower.get_feature_view("demographic")
    view.tags = {**view.tags, "used_by": "somebody"}
    slower.apply(view)
    fresh = features.open_store(scratch.repo).get_feature_view("demographic")
    assert fresh.materialization_intervals, "the quicker one's work was undone"
    assert fresh.tags["used_by"] == "somebody"


def test_of_two_commands_that_change_one_definition_the_slower_is_turned_away(store, scratch: Scratch):
    def tag(feature_store, name: str) -> None:
        view = feature_store.get_feature_view("demographic")
        view.tags = {**view.tags, "used_by": name}
        feature_store.apply(view)

    slower = features.open_store(scratch.repo)
    meanwhile(slower, lambda: tag(store, "quicker"))
    with pytest.raises(
        RegistryError, match=r"demographic in s3://.* was changed by another command meanwhile; nothing"
    ):
        tag(slower, "slower")
    assert features.open_store(scratch.repo).get_feature_view("demographic").tags["used_by"] == "quicker"


def test_an_apply_that_loses_the_race_deletes_nothing_online(store, scratch: Scratch):
    features.materialise(store, JANUARY, MAY)
    slower = features.open_store(scratch.repo)
    view = slower.get_feature_view("demographic")
    other = store.get_feature_view("demographic")
    other.tags = {**other.tags, "used_by": "somebody"}
    meanwhile(slower, lambda: store.apply(other))
    with pytest.raises(RegistryError, match="nothing was written, in the registry or online"):
        slower.apply([], objects_to_delete=[view], partial=False)
    assert sex(features.open_store(scratch.repo), ANN) == ["new"]
    again = features.open_store(scratch.repo)
    again.apply([], objects_to_delete=[again.get_feature_view("demographic")], partial=False)
    assert "demographic" not in written_views(features.open_store(scratch.repo))
    assert not any(b"_ts:demographic" in row for row in scratch.stored(find_settings()).values())


def test_a_cache_that_expires_while_applying_loses_nothing(store, scratch: Scratch):
    slow = features.open_store(scratch.repo)
    view = slow.get_feature_view("demographic")
    view.tags = {**view.tags, "used_by": "somebody"}
    slow.registry.cached_registry_proto_ttl = pd.Timedelta(1, "us").to_pytimedelta()
    slow.registry.apply_feature_view(view, slow.project, commit=False)
    slow.registry.apply_entity(slow.get_entity("user"), slow.project, commit=True)
    assert features.open_store(scratch.repo).get_feature_view("demographic").tags["used_by"] == "somebody"


def test_feasts_own_commands_work_in_the_repository(scratch: Scratch, platform: Settings):
    scratch.write((ANN, JANUARY, "old"), (ANN, MARCH, "new"))
    # One process, since each costs an import of Feast.
    code = """
from feast.cli.cli import cli
for command in ("apply", "materialize 2023-01-01T00:00:00 2023-06-01T00:00:00", "feature-views list"):
    cli(command.split(), standalone_mode=False)
"""
    listed = subprocess.run([sys.executable, "-c", code], cwd=scratch.repo, capture_output=True, text=True, check=False)
    assert listed.returncode == 0, listed.stderr
    assert all(view in listed.stdout for view in VIEWS)
    assert sex(features.open_store(scratch.repo), ANN) == ["new"]
