"""Training, logging and promotion against a real MLflow server."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import mlflow
import pandas as pd
import pytest
from evaluations import log_evaluation
from sklearn.linear_model import LogisticRegression
from sklearn.tree import DecisionTreeClassifier

from mlplatform import income, modeling, objectstore, registry, tracking
from mlplatform.errors import CredentialsError, RegistryError, ServiceDownError, UntrustedModelError
from mlplatform.settings import Settings
from mlplatform_ops import mlflow_rest

CSV = Path(__file__).parents[2] / "data" / "income_data.csv"


@pytest.fixture(scope="module")
def experiment(platform: Settings) -> str:
    name = f"test-{uuid4()}"
    mlflow.set_experiment(name)
    return name


@pytest.fixture(scope="module")
def parts() -> tuple[pd.DataFrame, pd.DataFrame]:
    train, test = income.split(income.read_income(CSV), seed=42)
    return train.head(3_000), test.head(1_000)


@pytest.fixture(scope="module")
def runs(experiment: str, parts: tuple[pd.DataFrame, pd.DataFrame]) -> dict[str, tracking.LoggedRun]:
    """A good model and a poor one, tested on the same rows."""
    train, test = parts
    datasets = tracking.write_datasets(train, test, pd.concat([train, test], ignore_index=True))
    both = {
        "good": tracking.fit_and_log("good", LogisticRegression(max_iter=200), datasets, params={"seed": 42}),
        "poor": tracking.fit_and_log("poor", DecisionTreeClassifier(max_depth=1), datasets),
    }
    for kind, auc in (("good", 0.87), ("poor", 0.70)):
        log_evaluation(both[kind].run_id, auc=auc)
    return both


@pytest.fixture
def name() -> Iterator[str]:
    """The name of a registered model of this test's own."""
    chosen = f"test-{uuid4()}"
    yield chosen
    if mlflow.MlflowClient().search_registered_models(f"name = '{chosen}'"):
        mlflow.MlflowClient().delete_registered_model(chosen)


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_run_records_parameters_metrics_data_sets_and_one_model(runs: dict[str, tracking.LoggedRun]) -> None:
    run = mlflow.get_run(runs["good"].run_id)
    assert run.data.params["estimator"] == "LogisticRegression"
    assert run.data.params["max_iter"] == "200"
    assert run.data.params["seed"] == "42"
    own = {name: value for name, value in run.data.metrics.items() if not name.startswith("evaluation_")}
    assert own == pytest.approx(runs["good"].scores)
    assert set(own) == set(modeling.SCORES)
    assert len(run.outputs.model_outputs) == 1


def test_the_data_sets_of_a_run_load_back_through_mlflow(
    runs: dict[str, tracking.LoggedRun], parts: tuple[pd.DataFrame, pd.DataFrame]
) -> None:
    inputs = {entry.tags[0].value: entry for entry in mlflow.get_run(runs["good"].run_id).inputs.dataset_inputs}
    assert set(inputs) == set(tracking.CONTEXTS)
    for context, expected in zip(tracking.CONTEXTS, parts, strict=False):
        source = mlflow.data.get_source(inputs[context])
        assert source.to_dict()["uri"].startswith("s3://mlflow-datasets/income/")
        pd.testing.assert_frame_equal(pd.read_parquet(source.load()), expected)


def test_the_addresses_of_a_runs_data_sets_are_read_in_one_place(runs: dict[str, tracking.LoggedRun]) -> None:
    data_sets = {data.context: data for data in tracking.data_sets(mlflow.get_run(runs["good"].run_id))}
    assert tuple(data_sets) == tracking.CONTEXTS
    assert [data.name for data in data_sets.values()] == [f"income-{context}" for context in tracking.CONTEXTS]
    assert len(objectstore.read_frame(data_sets["testing"].uri)) == 1_000


def test_logging_outside_of_a_run_says_what_to_call(
    runs: dict[str, tracking.LoggedRun], parts: tuple[pd.DataFrame, pd.DataFrame]
) -> None:
    datasets = tracking.write_datasets(*parts, parts[1])
    with pytest.raises(RegistryError, match="call log_fitted inside"):
        tracking.log_fitted(runs["good"].model, datasets)


def test_a_run_that_would_get_lost_among_mlflows_default_ones_is_refused(
    runs: dict[str, tracking.LoggedRun], parts: tuple[pd.DataFrame, pd.DataFrame]
) -> None:
    datasets = tracking.write_datasets(*parts, parts[1])
    with (
        mlflow.start_run(experiment_id="0") as run,
        pytest.raises(RegistryError, match=r"experiment Default; call mlflow.set_experiment"),
    ):
        tracking.log_fitted(runs["good"].model, datasets)
    assert not mlflow.get_run(run.info.run_id).outputs.model_outputs


def test_nothing_in_a_run_or_its_model_is_a_pickle(runs: dict[str, tracking.LoggedRun], tmp_path: Path) -> None:
    model = Path(mlflow.artifacts.download_artifacts(runs["good"].model_uri, dst_path=str(tmp_path)))
    files = {path.name: path.read_bytes() for path in model.rglob("*") if path.is_file()}
    assert zipfile.is_zipfile(model / "model.skops")
    assert b"serialization_format: skops" in files["MLmodel"]
    assert b"cloudpickle" not in files["MLmodel"] + files["requirements.txt"] + files["conda.yaml"]
    # Every pickle of protocol 2 and later begins with this byte and its protocol's number.
    assert not [name for name, body in files.items() if body[:1] == b"\x80"]
    with zipfile.ZipFile(model / "model.skops") as archive:
        members = {Path(name).suffix for name in archive.namelist()}
    assert members <= {".json", ".npy", ".npz", ".bin"}, members


def test_the_stored_model_takes_raw_categories_in_a_process_of_its_own(
    runs: dict[str, tracking.LoggedRun], parts: tuple[pd.DataFrame, pd.DataFrame], tmp_path: Path
) -> None:
    rows = parts[1].head(20)
    rows.to_parquet(tmp_path / "rows.parquet")
    code = """
import sys, json, mlflow, pandas as pd
model = mlflow.pyfunc.load_model(sys.argv[1])
print(json.dumps(model.predict(pd.read_parquet(sys.argv[2]).drop(columns="Target"))[:, 1].tolist()))
"""
    command = [sys.executable, "-c", code, runs["good"].model_uri, str(tmp_path / "rows.parquet")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(result.stdout.splitlines()[-1]) == modeling.probabilities(runs["good"].model, rows).tolist()


def test_requirements_are_stated_and_never_found_out_by_loading_the_model(
    runs: dict[str, tracking.LoggedRun],
    parts: tuple[pd.DataFrame, pd.DataFrame],
    experiment: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("this takes several seconds per model")

    monkeypatch.setattr(mlflow.models, "infer_pip_requirements", fail)
    with mlflow.start_run():
        uri = tracking.log_model(runs["good"].model, parts[0]).model_uri
    model = Path(mlflow.artifacts.download_artifacts(uri, dst_path=str(tmp_path)))
    stated = (model / "requirements.txt").read_text().split()
    assert set(tracking.requirements(runs["good"].model)) <= set(stated)


def test_the_encoder_and_the_answers_are_kept_as_json(
    runs: dict[str, tracking.LoggedRun], parts: tuple[pd.DataFrame, pd.DataFrame]
) -> None:
    run = runs["good"]
    described = mlflow.artifacts.load_dict(f"runs:/{run.run_id}/{tracking.ENCODER_FILE}")
    assert described == modeling.describe_encoder(run.model)
    answers = mlflow.artifacts.load_dict(f"runs:/{run.run_id}/{tracking.ANSWERS_FILE}")["probability"]
    assert answers == modeling.probabilities(run.model, parts[1]).tolist()


def test_a_run_that_fails_is_marked_as_failed_and_never_searched(
    experiment: str, runs: dict[str, tracking.LoggedRun]
) -> None:
    datasets = tracking.write_datasets(*[runs_frame() for _ in range(3)])
    with pytest.raises(ValueError, match="max_iter"):
        tracking.fit_and_log("broken", LogisticRegression(max_iter=-1), datasets)
    found = mlflow.search_runs(experiment_names=[experiment], filter_string="run_name = 'broken'")
    assert found["status"].tolist() == ["FAILED"]
    assert "broken" not in set(registry.search("metrics.roc_auc_score_test > 0", experiment=experiment)["name"])


def runs_frame() -> pd.DataFrame:
    return income.read_income(CSV).head(100)


def test_runs_are_found_best_first(experiment: str, runs: dict[str, tracking.LoggedRun]) -> None:
    found = registry.search("metrics.roc_auc_score_test > 0.5", experiment=experiment)
    assert found["name"].tolist() == ["good", "poor"]
    assert found["run_id"].tolist() == [runs["good"].run_id, runs["poor"].run_id]


@pytest.mark.parametrize("query", ["metrics.roc_auc_score_test > 0.99", "metrics.no_such_metric > 0"])
def test_no_run_above_the_filter_names_the_filter_and_the_next_step(
    query: str, experiment: str, runs: dict[str, tracking.LoggedRun]
) -> None:
    with pytest.raises(RegistryError, match=r"no finished run .* lower the bound") as caught:
        registry.search(query, experiment=experiment)
    assert query in str(caught.value)


@pytest.mark.parametrize("query", ["not a query", "metrics.roc_auc_score_test >"])
def test_a_query_that_is_none_is_reported_in_one_line(query: str, experiment: str) -> None:
    with pytest.raises(RegistryError) as caught:
        registry.search(query, experiment=experiment)
    assert "\n" not in str(caught.value)


def test_a_missing_experiment_says_which_notebook_makes_it(platform: Settings) -> None:
    with pytest.raises(RegistryError, match="02_train_models"):
        registry.search(experiment="no-such-experiment")


def test_a_run_is_registered_once(runs: dict[str, tracking.LoggedRun], name: str) -> None:
    assert registry.register(runs["good"].run_id, name=name) == 1
    assert registry.register(runs["good"].run_id, name=name) == 1
    assert registry.register(runs["poor"].run_id, name=name) == 2


def test_a_run_without_a_model_leaves_no_empty_registered_model(experiment: str, name: str) -> None:
    with mlflow.start_run() as run:
        pass
    with pytest.raises(RegistryError, match="has 0 models"):
        registry.register(run.info.run_id, name=name)
    with pytest.raises(RegistryError, match="not found"):
        registry.register("0" * 32, name=name)
    assert not mlflow.MlflowClient().search_registered_models(f"name = '{name}'")


def test_promotion_moves_the_aliases_and_writes_the_decisions(runs: dict[str, tracking.LoggedRun], name: str) -> None:
    poor, good = (registry.register(runs[kind].run_id, name=name) for kind in ("poor", "good"))
    assert registry.promote(poor, name=name).promoted
    outcome = registry.promote(good, name=name)
    assert (outcome.promoted, outcome.over) == (True, poor)
    assert int(registry.find(registry.CHAMPION, name=name).version) == good
    assert int(registry.find(registry.PREVIOUS, name=name).version) == poor
    assert not registry.promote(poor, name=name).promoted
    events = registry.decisions(name=name)
    assert events["version"].tolist() == [poor, poor, good, poor]
    assert events["event"].iloc[1] == f"replaced by version {good}"
    assert events["event"].iloc[3].startswith("not promoted")
    assert events["time"].is_monotonic_increasing


def test_asking_again_changes_nothing(runs: dict[str, tracking.LoggedRun], name: str) -> None:
    good, poor = (registry.register(runs[kind].run_id, name=name) for kind in ("good", "poor"))
    for _ in range(2):
        registry.promote(good, name=name)
        registry.promote(poor, name=name)
        events = registry.decisions(name=name)
        assert len(events) == 2
    assert int(registry.find(registry.CHAMPION, name=name).version) == good
    assert registry.find(registry.PREVIOUS, name=name) is None


def test_what_cannot_be_judged_is_not_promoted(runs: dict[str, tracking.LoggedRun], name: str) -> None:
    registry.register(runs["good"].run_id, name=name)
    with pytest.raises(RegistryError):
        registry.promote(99, name=name)
    assert registry.find(registry.CHAMPION, name=name) is None


def test_a_run_that_was_not_evaluated_is_not_promoted(
    runs: dict[str, tracking.LoggedRun], parts: tuple[pd.DataFrame, pd.DataFrame], name: str
) -> None:
    datasets = tracking.write_datasets(*parts, pd.concat(parts, ignore_index=True))
    run = tracking.fit_and_log("unknown", DecisionTreeClassifier(max_depth=2), datasets)
    with pytest.raises(RegistryError, match="has no evaluation; run notebook 03_evaluate_models"):
        registry.promote(registry.register(run.run_id, name=name), name=name)
    assert registry.find(registry.CHAMPION, name=name) is None


def test_a_version_tested_on_other_rows_is_not_compared(
    runs: dict[str, tracking.LoggedRun], parts: tuple[pd.DataFrame, pd.DataFrame], name: str
) -> None:
    registry.promote(registry.register(runs["poor"].run_id, name=name), name=name)
    train, test = parts
    datasets = tracking.write_datasets(train, test.head(900), pd.concat(parts, ignore_index=True))
    run = tracking.fit_and_log("elsewhere", DecisionTreeClassifier(max_depth=3), datasets)
    log_evaluation(run.run_id, auc=0.99)
    outcome = registry.promote(registry.register(run.run_id, name=name), name=name)
    assert not outcome.promoted
    assert "tested on other rows" in outcome.reason


def test_the_champion_answers_like_the_model_in_memory(
    runs: dict[str, tracking.LoggedRun], parts: tuple[pd.DataFrame, pd.DataFrame], name: str
) -> None:
    registry.promote(registry.register(runs["good"].run_id, name=name), name=name)
    loaded = registry.load_model(name=name)
    expected = modeling.probabilities(runs["good"].model, parts[1])
    assert modeling.probabilities(loaded, parts[1]).tolist() == expected.tolist()


@pytest.mark.parametrize("alias", [registry.CHAMPION, "no-such-alias"])
def test_a_missing_alias_is_named_with_the_next_step(alias: str, name: str) -> None:
    with pytest.raises(RegistryError, match=f"no alias '{alias}' on '{name}'; run notebook 04"):
        registry.load_model(alias, name=name)


def test_a_model_with_another_signature_is_not_loaded(runs: dict[str, tracking.LoggedRun], name: str) -> None:
    registry.promote(registry.register(runs["good"].run_id, name=name), name=name)
    with pytest.raises(RegistryError, match="asked for Age double, Sex string; promote"):
        registry.load_model(name=name, kinds={"Age": "number", "Sex": "category"})


def test_a_model_that_nobody_signed_is_not_loaded(experiment: str, name: str) -> None:
    with mlflow.start_run():
        info = mlflow.sklearn.log_model(
            LogisticRegression().fit([[0.0], [1.0]], [0, 1]), name="model", pip_requirements=["scikit-learn"]
        )
    client = mlflow.MlflowClient()
    client.create_registered_model(name)
    client.create_model_version(name, info.model_uri, model_id=info.model_id)
    client.set_registered_model_alias(name, registry.CHAMPION, "1")
    with pytest.raises(UntrustedModelError, match="version 1 is not signed"):
        registry.load_model(name=name)


def test_wrong_credentials_are_reported_as_such(platform: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong-password")
    with pytest.raises(CredentialsError, match="MLFLOW_TRACKING_USERNAME"):
        registry.search()


def test_a_server_that_is_down_is_reported_as_such(platform: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    # Feast, once it has used MLflow in this process, has set the address where the variable no longer counts.
    before = mlflow.get_tracking_uri()
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    mlflow.set_tracking_uri(f"http://127.0.0.1:{closed_port()}")
    try:
        with pytest.raises(ServiceDownError, match="make up"):
            registry.load_model()
    finally:
        mlflow.set_tracking_uri(before)


def test_logging_the_same_data_again_stores_no_byte_of_it(
    runs: dict[str, tracking.LoggedRun], parts: tuple[pd.DataFrame, pd.DataFrame]
) -> None:
    train, test = parts
    before = objectstore.list_objects("s3://mlflow-datasets/income/")
    tracking.write_datasets(train.copy(), test.copy(), pd.concat([train, test], ignore_index=True))
    pd.testing.assert_frame_equal(objectstore.list_objects("s3://mlflow-datasets/income/"), before)


def test_commands_find_the_version_that_holds_an_alias_and_none_where_there_is_none(
    platform: Settings, runs: dict[str, tracking.LoggedRun], name: str
) -> None:
    assert mlflow_rest.find_version(platform, name, "champion") is None
    version = registry.register(runs["good"].run_id, name=name)
    assert mlflow_rest.find_version(platform, name, "champion") is None
    mlflow.MlflowClient().set_registered_model_alias(name, "champion", str(version))
    found = mlflow_rest.find_version(platform, name, "champion")
    assert found is not None
    assert (found["version"], found["run_id"]) == (str(version), runs["good"].run_id)
