"""The watch against a real MLflow server and object store: reference, report, record, and what may be missing."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import mlflow
import numpy as np
import pandas as pd
import pytest
import yaml
from evaluations import log_evaluation
from mlflow.entities.model_registry import ModelVersion
from sklearn.linear_model import LogisticRegression
from sklearn.tree import DecisionTreeClassifier

from mlplatform import income, modeling, objectstore, registry, tracking
from mlplatform.connection import s3_client
from mlplatform.errors import DataError, MissingObjectError, PlatformError, RegistryError, UntrustedModelError
from mlplatform.monitoring import drift_watch
from mlplatform.promotion import alias
from mlplatform.settings import Settings

ROOT = Path(__file__).parents[2]
CSV = ROOT / "data" / "income_data.csv"
COLUMNS = list(income.COLUMNS)


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    return income.read_income(CSV).sample(8_000, random_state=1, ignore_index=True)


@pytest.fixture(scope="module")
def champion(platform: Settings, frame: pd.DataFrame) -> Iterator[str]:
    """A registered model of this module's own, with a champion."""
    mlflow.set_experiment(f"test-{uuid4()}")
    train, test = income.split(frame, seed=42)
    datasets = tracking.write_datasets(train, test, frame)
    run = tracking.fit_and_log("logistic", LogisticRegression(max_iter=200), datasets)
    log_evaluation(run.run_id, auc=0.87)
    name = f"test-{uuid4()}"
    registry.promote(registry.register(run.run_id, name=name), name=name)
    yield name
    mlflow.MlflowClient().delete_registered_model(name)


@pytest.fixture
def batch(frame: pd.DataFrame) -> pd.DataFrame:
    return frame[COLUMNS].sample(1_000, random_state=2, ignore_index=True)


def test_an_equal_batch_is_silent_and_its_run_holds_report_figures_and_both_data_sets(
    champion: str, batch: pd.DataFrame
) -> None:
    uri = objectstore.write_frame(batch, f"s3://mlflow-datasets/test-{uuid4()}/batch.parquet")
    watched = drift_watch.watch(batch, source=uri, name=champion)
    assert not watched.alarm
    run = mlflow.get_run(watched.run_id)
    assert run.data.metrics["alarm"] == 0
    assert {f"p/{column}" for column in [*COLUMNS, "score"]} < set(run.data.metrics)
    assert {f"evidently/{column}" for column in COLUMNS} < set(run.data.metrics)
    contexts = {entry.tags[0].value: entry for entry in run.inputs.dataset_inputs}
    assert set(contexts) == {"reference", "current"}
    assert mlflow.data.get_source(contexts["current"]).to_dict()["uri"] == uri
    page = Path(mlflow.artifacts.download_artifacts(f"runs:/{watched.run_id}/{drift_watch.REPORT}")).read_text()
    assert "Data Drift Summary" in page
    assert 'src="http' not in page
    assert mlflow.artifacts.load_dict(f"runs:/{watched.run_id}/{drift_watch.VERDICT}")["alarm"] is False


def test_a_shifted_batch_alarms_with_the_column_in_run_verdict_and_prometheus_text(
    champion: str, batch: pd.DataFrame
) -> None:
    shifted = batch.assign(Race=batch["Race"].where(batch.index >= 100, None))
    watched = drift_watch.watch(shifted, source="shifted", report=False, name=champion)
    assert watched.columns.drifted == ["Race"]
    assert mlflow.get_run(watched.run_id).data.tags["drifted"] == "Race"
    text = drift_watch.prometheus_text(watched)
    assert 'mlplatform_drift_alarm{model_version="1"} 1\n' in text
    assert 'mlplatform_drift_column_alarm{column="Race"} 1\n' in text
    assert 'mlplatform_drift_column_alarm{column="Sex"} 0\n' in text


def test_labels_that_say_the_opposite_of_the_model_raise_the_alarm(champion: str, frame: pd.DataFrame) -> None:
    rows = frame.sample(1_000, random_state=3, ignore_index=True)
    truth = modeling.labels(rows)
    held = drift_watch.watch(rows, source="labels", truth=truth.tolist(), report=False, name=champion)
    assert held.performance is not None
    assert not held.alarm
    fallen = drift_watch.watch(
        rows, source="labels", truth=np.where(rows.index < 500, 1 - truth, truth).tolist(), report=False, name=champion
    )
    assert fallen.performance is not None
    assert fallen.performance.alarm
    assert not fallen.columns.alarm


def test_an_alias_that_moves_while_a_batch_is_judged_mixes_no_versions(
    champion: str, frame: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, rows = mlflow.MlflowClient(), frame.sample(1_000, random_state=3, ignore_index=True)
    first = registry.require(name=champion).version
    mlflow.set_experiment(f"test-{uuid4()}")
    datasets = tracking.write_datasets(*income.split(frame, seed=42), frame)
    run = tracking.fit_and_log("stump", DecisionTreeClassifier(max_depth=1), datasets)
    other = str(registry.register(run.run_id, name=champion))
    alias.sign(client.get_model_version(champion, other))
    read = drift_watch.read_context

    def move_and_read(version: ModelVersion, context: str) -> tuple[str, pd.DataFrame]:
        client.set_registered_model_alias(champion, registry.CHAMPION, other)
        return read(version, context)

    def watch() -> drift_watch.Watched:
        truth = modeling.labels(rows).tolist()
        return drift_watch.watch(rows, source="moving", truth=truth, report=False, name=champion)

    try:
        before = watch()
        with monkeypatch.context() as patch:
            patch.setattr("mlplatform.monitoring.drift_watch.read_context", move_and_read)
            meanwhile = watch()
        after = watch()
    finally:
        client.set_registered_model_alias(champion, registry.CHAMPION, first)
        client.delete_model_version(champion, other)
    assert (before.version, meanwhile.version, after.version) == (int(first), int(first), int(other))
    assert before.performance == meanwhile.performance != after.performance
    assert mlflow.get_run(meanwhile.run_id).data.params["model_version"] == first


def test_a_reference_that_is_gone_is_named_with_what_brings_it_back(
    champion: str, batch: pd.DataFrame, frame: pd.DataFrame
) -> None:
    uri, reference = drift_watch.read_context(registry.require(name=champion), "reference")
    bucket, key = objectstore.split_uri(uri)
    s3_client().delete_object(Bucket=bucket, Key=key)
    try:
        with pytest.raises(MissingObjectError, match=r"reference data of .* is gone \(s3://.*02_train_models"):
            drift_watch.watch(batch, source="batch", report=False, name=champion)
    finally:
        assert objectstore.write_frame(reference, f"s3://{bucket}/income/reference.parquet") == uri


def test_without_a_champion_the_message_says_who_makes_one(platform: Settings, batch: pd.DataFrame) -> None:
    with pytest.raises(RegistryError, match="04_register_model"):
        drift_watch.watch(batch, source="batch", name=f"test-{uuid4()}")


def test_a_champion_that_nobody_signed_is_not_asked_and_leaves_no_run(champion: str, batch: pd.DataFrame) -> None:
    run_id = str(registry.require(name=champion).run_id)
    unsigned = f"test-{uuid4()}"
    version = registry.register(run_id, name=unsigned)
    client = mlflow.MlflowClient()
    client.set_registered_model_alias(unsigned, registry.CHAMPION, str(version))
    before = len(mlflow.search_runs(experiment_names=[drift_watch.EXPERIMENT]))
    with pytest.raises(UntrustedModelError, match=f"{unsigned}' version 1 is not signed; train it with"):
        drift_watch.watch(batch, source="batch", report=False, name=unsigned)
    assert len(mlflow.search_runs(experiment_names=[drift_watch.EXPERIMENT])) == before
    client.delete_registered_model(unsigned)


def test_a_batch_that_is_empty_or_has_other_columns_leaves_no_run(champion: str, batch: pd.DataFrame) -> None:
    before = len(mlflow.search_runs(experiment_names=[drift_watch.EXPERIMENT]))
    with pytest.raises(DataError, match="has no rows"):
        drift_watch.watch(batch.head(0), source="batch", name=champion)
    with pytest.raises(DataError, match="lacks Workclass"):
        drift_watch.watch(batch.drop(columns="Workclass"), source="batch", name=champion)
    assert len(mlflow.search_runs(experiment_names=[drift_watch.EXPERIMENT])) == before


def test_without_evidently_the_message_says_what_adds_it(
    champion: str, batch: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "evidently", None)
    with pytest.raises(PlatformError, match="Evidently is not installed here; run 'make drift', which adds it"):
        drift_watch.watch(batch, source="batch", name=champion)
    assert not drift_watch.watch(batch, source="batch", report=False, name=champion).alarm


def test_what_the_endpoint_logged_is_read_from_all_its_files_and_by_time(
    platform: Settings, batch: pd.DataFrame
) -> None:
    prefix = f"s3://mlflow-datasets/test-{uuid4()}"
    with pytest.raises(DataError, match="the endpoint logged nothing under"):
        drift_watch.read_endpoint_log(prefix)
    for day in ("2023-09-01", "2023-09-02"):
        seen = batch.assign(model_version="1", score=0.5, event_timestamp=pd.Timestamp(day, tz="UTC").as_unit("us"))
        objectstore.write_frame(seen, f"{prefix}/{day}/requests.parquet")
    assert len(drift_watch.read_endpoint_log(prefix)) == 2_000
    assert len(drift_watch.read_endpoint_log(prefix, since=pd.Timestamp("2023-09-02", tz="UTC"))) == 1_000
    with pytest.raises(DataError, match="since 2023-09-03"):
        drift_watch.read_endpoint_log(prefix, since=pd.Timestamp("2023-09-03", tz="UTC"))


def test_the_alert_rules_ask_for_figures_that_are_there(champion: str, batch: pd.DataFrame) -> None:
    text = drift_watch.prometheus_text(drift_watch.watch(batch, source="batch", report=False, name=champion))
    given = set(re.findall(r"^(mlplatform_drift_\w+)", text, re.MULTILINE))
    rules = yaml.safe_load((ROOT / "deploy" / "monitoring" / "alerts.yaml").read_text())["groups"]
    asked = {
        name for group in rules for rule in group["rules"] for name in re.findall(r"mlplatform_drift_\w+", rule["expr"])
    }
    assert asked
    assert asked <= given
    assert all({"alert", "expr", "labels", "annotations"} <= set(rule) for group in rules for rule in group["rules"])
