"""`make reset` after changes of every kind: the real notebooks' platform is as it was before them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import pytest
import redis
from mlflow import MlflowClient

from mlplatform import table
from mlplatform.connection import s3_client
from mlplatform.settings import CHAMPION, DATASETS_BUCKET, FEATURES_BUCKET, REGISTRY_BUCKET, Settings
from mlplatform_ops.cli import main
from mlplatform_ops.embedded import after_run
from mlplatform_ops.embedded.platform import EmbeddedPlatform

OWN = "own-bucket"
SIX_MIB = 6 * 2**20


@pytest.fixture
def kept(executed: dict[str, Path], embedded: EmbeddedPlatform, platform: Settings) -> dict[str, Any]:
    """Everything that the platform holds after the chain, whose state is kept as after `make run`."""
    mlflow.set_tracking_uri(platform.tracking_uri)
    after_run.keep(embedded.state, platform)
    return everything(platform)


def everything(settings: Settings) -> dict[str, Any]:
    """What MLflow answers, each object by its digest, each key of the online store with its fields."""
    client, store = MlflowClient(), s3_client(settings)
    experiments = client.search_experiments(view_type=mlflow.entities.ViewType.ALL)
    ids = [experiment.experiment_id for experiment in experiments]
    models = client.search_registered_models()
    with redis.Redis.from_url(settings.redis_url) as online:
        keys = sorted(online.scan_iter(count=5000))
        pipeline = online.pipeline(transaction=False)
        for key in keys:
            pipeline.dump(key)
        values = dict(zip(keys, pipeline.execute(), strict=True))
    return {
        "experiments": {experiment.name: dict(experiment) for experiment in experiments},
        "runs": {run.info.run_id: run.to_dictionary() for run in client.search_runs(ids, max_results=1000)},
        "models": {model.name: (dict(model.aliases), dict(model.tags)) for model in models},
        "versions": {
            (version.name, version.version): (version.run_id, dict(version.tags), sorted(version.aliases))
            for version in client.search_model_versions()
        },
        "objects": {
            f"{bucket['Name']}/{entry['Key']}": hashlib.sha256(
                store.get_object(Bucket=bucket["Name"], Key=entry["Key"])["Body"].read()
            ).hexdigest()
            for bucket in store.list_buckets()["Buckets"]
            for page in store.get_paginator("list_objects_v2").paginate(Bucket=bucket["Name"])
            for entry in page.get("Contents", ())
        },
        "online": values,
    }


def change_everything(settings: Settings) -> None:
    """Do what exercises, `make loop` and people of their own do: add, change and remove, in each store."""
    client, store = MlflowClient(), s3_client(settings)
    experiment = client.get_experiment_by_name("income-classifier")
    assert experiment
    best, worst = (
        client.search_runs(
            [experiment.experiment_id], "metrics.roc_auc_score_test > 0", order_by=[f"metrics.roc_auc_score_test {way}"]
        )[0]
        for way in ("DESC", "ASC")
    )
    client.delete_run(worst.info.run_id)
    client.set_tag(best.info.run_id, "mine", "yes")
    client.delete_experiment(client.create_experiment("deleted again"))
    mlflow.set_experiment("my own")
    with mlflow.start_run():
        mlflow.log_metric("answer", 42)
        mlflow.log_text("mine", "note.txt")
    champion = client.get_model_version_by_alias(table.current().model, CHAMPION)
    version = mlflow.register_model(champion.source, table.current().model)
    client.set_registered_model_alias(table.current().model, CHAMPION, version.version)
    client.create_registered_model("another-model")

    def first(bucket: str) -> str:
        return str(store.list_objects_v2(Bucket=bucket)["Contents"][0]["Key"])

    store.put_object(Bucket=DATASETS_BUCKET, Key="mine/new.csv", Body=b"a,b\n")
    store.delete_object(Bucket=DATASETS_BUCKET, Key=first(DATASETS_BUCKET))
    store.delete_object(Bucket=FEATURES_BUCKET, Key=first(FEATURES_BUCKET))
    store.put_object(Bucket=REGISTRY_BUCKET, Key=first(REGISTRY_BUCKET), Body=b"damaged")
    store.create_bucket(Bucket=OWN)
    store.put_object(Bucket=OWN, Key="a/b.bin", Body=bytes(SIX_MIB))
    with redis.Redis.from_url(settings.redis_url) as online:
        changed, gone, ending, *_ = online.scan_iter()
        online.hset(changed, mapping=dict.fromkeys(online.hkeys(changed), b"pushed"))
        online.delete(gone)
        online.expire(ending, 3600)
        online.set("mine", "new")


def differences(settings: Settings, before: dict[str, Any]) -> list[str]:
    now = everything(settings)
    return [part for part in before if now[part] != before[part]]


def test_reset_brings_every_store_back_to_what_the_run_left(
    kept: dict[str, Any], platform: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    change_everything(platform)
    assert differences(platform, kept) == list(kept)
    assert main(["reset"]) == 0
    said = capsys.readouterr().err
    assert differences(platform, kept) == []
    assert "deleting what came after the last complete run, your own experiments and data too" in said
    # The run's file, the CSV and the bucket's; the two deleted, the damaged; four keys.
    assert ": 3 objects removed, 3 written again, 4 keys of the online store" in said
    assert main(["reset"]) == 0
    assert ": 0 objects removed, 0 written again, 0 keys of the online store" in capsys.readouterr().err
    assert differences(platform, kept) == []


@pytest.mark.parametrize("step", ["put_back", "_put_back_online", "copy_sqlite"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_reset_that_was_interrupted_is_mended_by_the_next(
    kept: dict[str, Any],
    platform: Settings,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    step: str,
    when: str,
) -> None:
    real: Callable[..., Any] = getattr(after_run, step)

    def interrupted(*arguments: object) -> None:
        if when == "after":
            real(*arguments)
        raise KeyboardInterrupt

    change_everything(platform)
    with monkeypatch.context() as patch:
        patch.setattr(after_run, step, interrupted)
        assert main(["reset"]) == 130
    assert "stopped half way; run 'make reset' again" in capsys.readouterr().err
    assert main(["reset"]) == 0
    assert differences(platform, kept) == []


def test_a_state_of_another_mlflow_is_refused_and_nothing_is_changed(
    kept: dict[str, Any], embedded: EmbeddedPlatform, platform: Settings, capsys: pytest.CaptureFixture[str]
) -> None:
    s3_client(platform).put_object(Bucket=DATASETS_BUCKET, Key="mine/stays.csv", Body=b"a,b\n")
    database = after_run.find_copy(embedded.state) / "databases" / "mlflow.db"
    with after_run.closing(after_run.sqlite3.connect(database)) as file:
        file.execute("CREATE TABLE of_a_later_version (a INTEGER)")
    assert main(["reset"]) == 1
    assert (
        "another version of MLflow runs than the one that ran then; run 'make run FRESH=1'" in capsys.readouterr().err
    )
    s3_client(platform).delete_object(Bucket=DATASETS_BUCKET, Key="mine/stays.csv")
    assert differences(platform, kept) == []
