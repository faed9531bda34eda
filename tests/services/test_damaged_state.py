"""State that is damaged or foreign: each command and call says in one line what is wrong, and nothing is deleted."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import mlflow
import pandas as pd
import pytest
from evaluations import log_evaluation
from sklearn.linear_model import LogisticRegression

from mlplatform import connect, features, income, objectstore, registry, tracking
from mlplatform.connection import s3_client
from mlplatform.errors import PlatformError
from mlplatform.settings import (
    ARTIFACTS_BUCKET,
    BUCKETS,
    DATASETS_BUCKET,
    FEATURES_BUCKET,
    REGISTRY_BUCKET,
    STATE_VARIABLE,
)
from mlplatform_ops.cli import main
from mlplatform_ops.embedded.platform import EmbeddedPlatform
from mlplatform_ops.embedded.services import addresses
from mlplatform_ops.embedded.supervisor import processes_of

CSV = Path(__file__).parents[2] / "data" / "income_data.csv"
USER = "9f2ac416-06e1-44a0-87bd-d4787c85bf66"
Command = Callable[..., tuple[int, list[str]]]


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedPlatform]:
    """A platform of these tests' own, with features and a champion."""
    platform = EmbeddedPlatform(tmp_path_factory.mktemp("damaged") / "state", environ={}, default_ports=False)
    before = dict(os.environ)
    try:
        platform.up()
        # Where nothing answers, nothing will: MLflow's client need not try for half a minute.
        os.environ.update({**platform.settings.to_env(), "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"})
        mlflow.set_tracking_uri(platform.settings.tracking_uri)
        fill()
        yield platform
    finally:
        platform.clean()
        mlflow.set_tracking_uri(None)  # as the environment says again
        os.environ.clear()
        os.environ.update(before)


def fill() -> None:
    """Build the features, and promote a model."""
    features.build(notify=lambda _: None)
    mlflow.set_experiment(f"test-{uuid4()}")
    frame = income.read_income(CSV).head(600)
    parts = frame.head(400), frame.tail(200).reset_index(drop=True), frame
    run = tracking.fit_and_log("model", LogisticRegression(max_iter=200), tracking.write_datasets(*parts))
    log_evaluation(run.run_id, auc=0.85)
    registry.promote(registry.register(run.run_id))


@pytest.fixture
def command(own: EmbeddedPlatform, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command of ours on that platform: its status, and what it prints, line by line."""
    monkeypatch.setenv(STATE_VARIABLE, str(own.state))

    def command(*words: str) -> tuple[int, list[str]]:
        capsys.readouterr()
        status, lines = main(words), "".join(capsys.readouterr()).splitlines()
        # The other process of the tests may be starting a platform of its own.
        return status, [line for line in lines if not line.startswith("another platform of yours starts or stops")]

    return command


def asked(history: bool) -> object:
    store = features.open_store()
    if not history:
        return features.read_online(store, [USER])["found"].item()
    moments = pd.DataFrame({"user_id": [USER], "event_timestamp": [pd.Timestamp("2023-01-30 10:59:42", tz="UTC")]})
    return features.point_in_time(store, moments)["Sex"].item()


# What notebooks call.
CALLS: dict[str, Callable[[], object]] = {
    "connect": connect,
    "load_model": registry.load_model,
    "history": lambda: asked(history=True),
    "online": lambda: asked(history=False),
    "write_frame": lambda: objectstore.write_frame(
        pd.DataFrame({"n": [1]}), f"s3://{DATASETS_BUCKET}/damaged/n.parquet"
    ),
}


def failures() -> dict[str, str]:
    """Try every call: what those say that fail, each in one line of ours."""
    said = {}
    for name, call in CALLS.items():
        try:
            call()
        except PlatformError as error:
            said[name] = str(error)
    assert not [line for line in said.values() if "\n" in line]
    return said


# Databases


# What else can be wrong with a file is told apart in unit/test_embedded.
@pytest.mark.parametrize(("damage", "name"), [("half", "mlflow.db"), ("empty", "basic_auth.db")])
def test_a_damaged_database_is_named_before_anything_starts(
    own: EmbeddedPlatform, command: Command, damage: str, name: str
) -> None:
    own.down()
    database = own.state / "mlflow" / name
    kept = database.read_bytes()
    damaged = kept[: len(kept) // 2] if damage == "half" else b""
    database.write_bytes(damaged)
    try:
        for words in (("up",), ("features",), ("run", "04")):
            status, lines = command(*words)
            assert (status, len(lines)) == (1, 1), lines
            assert lines[0].startswith(f"error: the database {database} is damaged (")
            assert f"cp FOLDER/databases/{name} {database}" in lines[0]
        assert command("status")[0] == 0
        assert {status.state for status in own.status()} == {"stopped"}
        assert list(processes_of(own.state)) == []
        assert "run 'make up'" in failures()["connect"]
        assert database.read_bytes() == damaged
    finally:
        database.write_bytes(kept)


def test_a_database_that_is_damaged_while_mlflow_runs_is_named_and_a_copy_put_back_helps(
    own: EmbeddedPlatform, command: Command, tmp_path: Path
) -> None:
    own.up()
    database = own.state / "mlflow" / "mlflow.db"
    status, _ = command("backup", "save", str(tmp_path / "copy"), "--database", str(database))
    assert status == 0
    kept = (tmp_path / "copy" / "databases" / "mlflow.db").read_bytes()
    os.truncate(database, len(kept) // 2)
    try:
        said = failures()
        assert said.keys() == {"connect", "load_model"}
        assert all("run 'make up', which says" in line for line in said.values()), said
        status, lines = command("up")
        assert status == 1
        assert lines[-1].startswith(f"error: the database {database} is damaged (")
    finally:
        # What the message says to type.
        down = command("down")
        database.write_bytes(kept)
        up = command("up")
    assert (down[0], up[0]) == (0, 0)
    assert failures() == {}


# Buckets and the feature registry


def delete(bucket: str) -> None:
    store = s3_client()
    for uri in objectstore.list_objects(f"s3://{bucket}")["uri"]:
        store.delete_object(Bucket=bucket, Key=objectstore.split_uri(uri)[1])
    store.delete_bucket(Bucket=bucket)


@pytest.mark.parametrize("bucket", BUCKETS)
def test_a_deleted_bucket_is_named_and_made_again_and_a_backup_brings_back_what_it_held(
    own: EmbeddedPlatform, command: Command, tmp_path: Path, bucket: str
) -> None:
    own.up()
    assert failures() == {}
    assert command("backup", "save", str(tmp_path / "copy"))[0] == 0
    delete(bucket)
    said = failures()
    needed = {ARTIFACTS_BUCKET: {"load_model"}, FEATURES_BUCKET: {"history"}, REGISTRY_BUCKET: {"history", "online"}}
    assert said.keys() == needed.get(bucket, {"write_frame"} if bucket == DATASETS_BUCKET else set())
    assert all("'make " in line for line in said.values()), said
    status, lines = command("up")
    assert status == 0
    assert [line for line in lines if f"the bucket {bucket} was gone and is made again, empty" in line], lines
    assert command("backup", "restore", str(tmp_path / "copy"))[0] == 0
    assert failures() == {}


def test_without_the_feature_registry_features_makes_it_again(own: EmbeddedPlatform, command: Command) -> None:
    own.up()
    s3_client().delete_object(Bucket=REGISTRY_BUCKET, Key="registry.db")
    assert set(failures().values()) == {
        f"there is no feature registry at s3://{REGISTRY_BUCKET}/registry.db; run 'make features'"
    }
    assert command("features")[0] == 0
    assert failures() == {}


@pytest.mark.parametrize("damage", ["half", "empty"])
def test_a_feature_registry_that_is_cut_is_refused_and_features_says_so(
    own: EmbeddedPlatform, command: Command, damage: str
) -> None:
    own.up()
    uri = f"s3://{REGISTRY_BUCKET}/registry.db"
    kept = objectstore.read_bytes(uri)
    cut = kept[: len(kept) // 2] if damage == "half" else b""
    objectstore.write_bytes(cut, uri)
    try:
        said = failures()
        assert said.keys() == {"history", "online"}
        assert all("registry" in line for line in said.values()), said
        status, lines = command("features")
        assert (status, [line for line in lines if "Traceback" in line]) == (1, [])
        assert "registry" in lines[-1]
        assert objectstore.read_bytes(uri) == cut
    finally:
        objectstore.write_bytes(kept, uri)


# Settings


def test_settings_without_any_one_of_their_variables_are_said_to_be_older_and_down_and_up_mend_them(
    own: EmbeddedPlatform, command: Command
) -> None:
    own.down()
    path = own.state / "settings.json"
    kept = json.loads(path.read_text())["environment"]
    for missing in kept:
        older = {name: value for name, value in kept.items() if name != missing}
        path.write_text(json.dumps({"environment": older}))
        for word in ("status", "env"):
            status, lines = command(word)
            if status:
                assert lines == [
                    f"error: the platform was started by an earlier version ({missing} missing); "
                    "run 'make down', then 'make up'"
                ]
        assert command("down") == (0, ["nothing was running"])
        made = own._configure(own._previous(lambda _: None), lambda _: None)
        # A port that is missing is chosen anew, and addresses follow from ports.
        assert {name: made[name] for name in older if name not in addresses(kept)} == {
            name: value for name, value in older.items() if name not in addresses(kept)
        }
        # Data depends on these, and the servers' own files still have them.
        if missing in {"MLFLOW_TRACKING_PASSWORD", "AWS_SECRET_ACCESS_KEY", "MLPLATFORM_REDIS_PASSWORD"}:
            assert made[missing] == kept[missing]
    path.write_text(json.dumps({"environment": kept}))
    own.up()
    assert failures() == {}
