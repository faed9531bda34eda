"""Training and batch scoring on a Dask cluster of two worker processes, held to what this process answers."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import mlflow
import numpy as np
import pandas as pd
import pytest
import yaml
from mlflow.data.pandas_dataset import PandasDataset, from_pandas
from sklearn.linear_model import LogisticRegression
from xgboost import XGBClassifier

from mlplatform import income, modeling, objectstore, registry, table, tracking
from mlplatform.engines import cluster, training
from mlplatform.errors import DataError, RegistryError, ServiceDownError, SettingsError
from mlplatform.promotion.alias import sign
from mlplatform.settings import STATE_VARIABLE, VARIABLES, Settings
from mlplatform_ops import reproduce
from mlplatform_pipeline import steps

ROOT = Path(__file__).parents[2]
MOMENT = pd.Timestamp("2023-09-16", tz="UTC").as_unit("us")


def boosted(**given: Any) -> XGBClassifier:
    """The model of notebook 2, with as many threads as there are."""
    return XGBClassifier(**{"n_estimators": 200, "max_depth": 4, "learning_rate": 0.1, "random_state": 42, **given})


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    return income.read_income(ROOT / "data" / "income_data.csv")


@pytest.fixture(scope="module")
def datasets(platform: Settings, frame: pd.DataFrame) -> list[PandasDataset]:
    return tracking.write_datasets(*income.split(frame, seed=42), frame)


@pytest.fixture
def experiment(platform: Settings) -> str:
    mlflow.set_tracking_uri(platform.tracking_uri)
    return str(mlflow.set_experiment(f"test-{uuid4()}").experiment_id)


@pytest.fixture
def model_name(platform: Settings) -> Iterator[str]:
    chosen = f"test-{uuid4()}"
    yield chosen
    mlflow.MlflowClient().delete_registered_model(chosen)


def kill_a_worker_when(on_dask: Any, due: Callable[[dict[str, str]], bool], job: Callable[[], Any]) -> Any:
    """Do a job, and kill a worker once the states of the cluster's tasks say that it is due."""
    over, killed = threading.Event(), []

    def kill() -> None:
        while not over.is_set():
            if due({str(key): task.state for key, task in list(on_dask.scheduler.tasks.items())}):
                pid = list(on_dask.workers.values())[-1].process.pid
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
                return
            time.sleep(0.002)

    thread = threading.Thread(target=kill)
    thread.start()
    try:
        return job()
    finally:
        over.set()
        thread.join()
        assert len(killed) == 1, "the job was over before a worker could be killed"
        on_dask.wait_for_workers(2, timeout=300)


# Training


def test_xgboost_trained_by_two_workers_scores_as_by_one_process_and_logs_the_same(
    on_dask: Any, experiment: str, datasets: list[PandasDataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[range] = []
    split_rows = training.split_rows
    monkeypatch.setattr(training, "split_rows", lambda *given: read.extend(split_rows(*given)) or split_rows(*given))
    single = tracking.fit_and_log("single", boosted(), datasets, params={"seed": 42})
    spread = tracking.fit_and_log("spread", boosted(), datasets, params={"seed": 42}, engine="dask")
    assert [len(part) for part in read] == [12_064, 12_065]
    for name, score in single.scores.items():
        assert spread.scores[name] == pytest.approx(score, abs=0.001), name
    runs = [mlflow.get_run(run.run_id) for run in (single, spread)]
    params = [run.data.params for run in runs]
    assert [entry.pop("engine") for entry in params] == ["local", "dask"]
    assert params[0] == params[1]
    assert tracking.data_sets(runs[0]) == tracking.data_sets(runs[1])
    assert runs[0].data.metrics.keys() == runs[1].data.metrics.keys()
    files = [Path(mlflow.artifacts.download_artifacts(run.model_uri)) for run in (single, spread)]
    assert (files[0] / "requirements.txt").read_text() == (files[1] / "requirements.txt").read_text()
    assert "dask" not in (files[1] / "MLmodel").read_text()
    learned = [mlflow.artifacts.load_dict(f"runs:/{run.run_id}/{tracking.ENCODER_FILE}") for run in (single, spread)]
    assert learned[0] == learned[1]
    estimators = [run.model.named_steps["estimator"] for run in (single, spread)]
    assert [type(estimator) for estimator in estimators] == [XGBClassifier] * 2
    assert estimators[0].__dict__.keys() == estimators[1].__dict__.keys()
    boosters = [estimator.get_booster() for estimator in estimators]
    assert boosters[0].feature_names == boosters[1].feature_names
    assert boosters[0].feature_types == boosters[1].feature_types
    configs = [json.loads(booster.save_config())["learner"] for booster in boosters]
    assert configs[0]["generic_param"] == configs[1]["generic_param"]
    assert configs[0]["objective"] == configs[1]["objective"]


WITHOUT_DASK = """
import json, sys
sys.modules |= dict.fromkeys(("dask", "distributed", "xgboost.dask"))
import mlflow
from mlplatform import income, modeling, registry
from mlplatform.promotion import gate
run_id, name = sys.argv[1:]
frame = income.read_income()
test = income.split(frame, seed=42)[1]
model_id = mlflow.get_run(run_id).outputs.model_outputs[0].model_id
logged = mlflow.sklearn.load_model(f"models:/{model_id}")
with mlflow.start_run(run_id=run_id):
    gate.log(gate.evaluate(logged, test, frame))
promoted = registry.promote(registry.register(run_id, name=name), name=name).promoted
champion = registry.load_model(name=name)
print(json.dumps([promoted, *modeling.probabilities(champion, test).tolist()]))
"""


def test_what_it_trained_is_evaluated_promoted_loaded_and_trained_again(
    on_dask: Any, experiment: str, datasets: list[PandasDataset], frame: pd.DataFrame, model_name: str
) -> None:
    run = tracking.fit_and_log("spread", boosted(), datasets, engine="dask")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WITHOUT_DASK, run.run_id, model_name],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    promoted, *answers = json.loads(done.stdout.splitlines()[-1])
    assert promoted
    assert answers == modeling.probabilities(run.model, datasets[1].df).tolist()
    assert [entry.what for entry in reproduce.reproduce(run.run_id) if not entry.agrees] == []
    window = objectstore.write_frame(frame.head(6_000), f"s3://mlflow-datasets/test-{uuid4()}/window.parquet")
    again = mlflow.get_run(steps.train(window, registry.CHAMPION, 42, model_name, "dask"))
    assert again.data.params["engine"] == "dask"
    assert again.data.params["n_estimators"] == "200"


# XGBoost's tracker, here in a thread of this process, waits for the dead worker to say goodbye and then raises.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_worker_killed_in_mid_training_ends_it_at_once_with_one_line(
    on_dask: Any, experiment: str, datasets: list[PandasDataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "MEET_S", 10)
    monkeypatch.setattr(training, "NOTICED_S", 30)
    killed: list[float] = []

    def two_train(states: dict[str, str]) -> bool:
        # XGBoost's tasks are called `fn`; three seconds later both of them add trees.
        if sum(key.startswith("fn-") and state == "processing" for key, state in states.items()) < 2:
            return False
        time.sleep(3)
        killed.append(time.monotonic())
        return True

    with pytest.raises(
        ServiceDownError, match=r"^the Dask cluster lost a worker while XGBoost trained, .* run it again$"
    ):
        kill_a_worker_when(
            on_dask,
            two_train,
            lambda: timed(
                killed, lambda: tracking.fit_and_log("lost", boosted(n_estimators=20_000), datasets, engine="dask")
            ),
        )
    (run,) = mlflow.search_runs([experiment], output_format="list")
    assert run.info.status == "FAILED"
    # The cluster goes on with who is left and who came back.
    assert tracking.fit_and_log("next", boosted(n_estimators=2), datasets, engine="dask").scores
    for thread in threading.enumerate():
        if "(wait_for)" in thread.name:
            thread.join(timeout=60)
    gc.collect()


def timed(killed: list[float], job: Callable[[], Any]) -> Any:
    try:
        return job()
    finally:
        took = time.monotonic() - killed[0]
        sys.stderr.write(f"the training ended {took:.2f} s after the kill\n")
        assert took < 30


@pytest.mark.parametrize(
    ("engine", "estimator", "message"),
    [
        ("spark", boosted(), r"there is no engine 'spark'; give one of: local, dask"),
        ("dask", LogisticRegression(), r"an XGBClassifier and no LogisticRegression; give engine='local'"),
        ("dask", boosted(early_stopping_rounds=3), r"trains without early_stopping_rounds; leave it out, or give"),
        ("dask", boosted(objective=lambda truth, answer: (answer, truth)), r"trains without objective; leave it out"),
    ],
)
def test_what_it_cannot_train_is_refused_before_there_is_a_run(
    on_dask: Any, experiment: str, datasets: list[PandasDataset], engine: Any, estimator: Any, message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        tracking.fit_and_log("refused", estimator, datasets, engine=engine)
    assert mlflow.search_runs([experiment]).empty


def test_without_a_cluster_or_the_group_it_says_what_to_type_before_there_is_a_run(
    experiment: str, datasets: list[PandasDataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(cluster.VARIABLE, raising=False)
    with pytest.raises(SettingsError, match=rf"{cluster.VARIABLE} is not set; set it to tls://host:port, run 'python"):
        tracking.fit_and_log("refused", boosted(), datasets, engine="dask")
    monkeypatch.setenv(cluster.VARIABLE, "tls://127.0.0.1:1")
    monkeypatch.setattr(cluster, "WAIT_S", 1)
    with pytest.raises(ServiceDownError, match=r"the Dask scheduler at tls://127\.0\.0\.1:1 does not answer; start it"):
        tracking.fit_and_log("refused", boosted(), datasets, engine="dask")
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(SettingsError, match=r"group 'scale' are not installed; run 'make \.venv/\.scale'"):
        tracking.fit_and_log("refused", boosted(), datasets, engine="dask")
    assert mlflow.search_runs([experiment]).empty


def test_rows_that_are_not_stored_or_are_damaged_there_are_not_trained_on(
    on_dask: Any, experiment: str, datasets: list[PandasDataset], frame: pd.DataFrame
) -> None:
    nowhere = from_pandas(frame, targets="Target")
    with pytest.raises(DataError, match=r"store them with tracking\.write_datasets"):
        tracking.fit_and_log("nowhere", boosted(), [nowhere] * 3, engine="dask")
    changed = tracking.write_datasets(frame.head(300), frame.tail(100).reset_index(drop=True), frame)
    uri = changed[0].source.to_dict()["uri"]
    objectstore.write_bytes(objectstore.read_bytes(uri)[:-1] + b"?", uri)
    with pytest.raises(DataError, match="holds other bytes than its name says"):
        tracking.fit_and_log("damaged", boosted(), changed, engine="dask")


# Scoring


@pytest.fixture(scope="module")
def champion(platform: Settings, datasets: list[PandasDataset]) -> Iterator[tuple[str, str]]:
    """An alias and the signed version that holds it."""
    mlflow.set_experiment(f"test-{uuid4()}")
    client, alias, name = mlflow.MlflowClient(), f"test-{uuid4()}", table.current().model
    version = str(registry.register(tracking.fit_and_log("champion", boosted(), datasets).run_id))
    sign(client.get_model_version(name, version))
    client.set_registered_model_alias(name, alias, version)
    yield alias, version
    client.delete_model_version(name, version)


@pytest.fixture(scope="module")
def features_uri(platform: Settings, frame: pd.DataFrame) -> str:
    """Everybody's features, and some of whom nothing is known."""
    people = frame.assign(user_id=[f"user-{place}" for place in range(len(frame))], event_timestamp=MOMENT)
    people.loc[people.index % 1_000 == 7, list(income.COLUMNS)] = None
    return objectstore.write_frame(people, f"s3://mlflow-datasets/test-{uuid4()}/features.parquet")


def test_scores_of_two_workers_are_those_of_one_process_byte_for_byte(
    on_dask: Any, champion: tuple[str, str], features_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = [steps.score(features_uri, *champion, part, 3) for part in range(3)]
    monkeypatch.setattr(cluster, "ROWS_PER_TASK", 1_000)
    # An address holds the digest of the bytes.
    assert [steps.score(features_uri, *champion, part, 3, "dask") for part in range(3)] == here
    scored = pd.concat([objectstore.read_frame(uri) for uri in here], ignore_index=True)
    assert scored["user_id"].tolist() == [f"user-{place}" for place in range(30_162)]
    assert scored["probability"].isna().sum() == 31


def environment_of_a_pod(variables: dict[str, str]) -> dict[str, str]:
    """Give a worker these of the platform's variables alone; what it had before."""
    before = dict(os.environ)
    for name in (*VARIABLES.values(), STATE_VARIABLE):
        os.environ.pop(name, None)
    os.environ.update(variables)
    return before


def test_workers_train_and_score_with_the_variables_of_their_pods(
    on_dask: Any,
    champion: tuple[str, str],
    features_uri: str,
    experiment: str,
    datasets: list[PandasDataset],
) -> None:
    deployment = yaml.safe_load((ROOT / "deploy/components/dask/worker-deployment.yaml").read_text())
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    given = {entry["name"] for entry in container["env"]} & set(VARIABLES.values())
    assert "MLFLOW_TRACKING_URI" not in given
    with cluster.cluster(on_dask.scheduler_address) as client:
        before = client.run(environment_of_a_pod, {name: os.environ[name] for name in given})
        try:
            assert steps.score(features_uri, *champion, 0, 3, "dask") == steps.score(features_uri, *champion, 0, 3)
            assert tracking.fit_and_log("spread", boosted(n_estimators=2), datasets, engine="dask").scores
        finally:
            for worker, variables in before.items():
                client.run(environment_of_a_pod, variables, workers=[worker])


def test_this_process_reads_the_features_that_it_scores_once(
    champion: tuple[str, str], features_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []
    read = objectstore.read_frame
    monkeypatch.setattr(objectstore, "read_frame", lambda uri: reads.append(uri) or read(uri))
    steps.score(features_uri, *champion, 0, 3)
    assert reads == [features_uri]


def test_a_worker_killed_in_mid_scoring_changes_nothing(
    on_dask: Any, champion: tuple[str, str], features_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "ROWS_PER_TASK", 100)

    def some_are_done(states: dict[str, str]) -> bool:
        return {"memory", "processing"} <= {state for key, state in states.items() if key.startswith("score_rows")}

    scored = kill_a_worker_when(on_dask, some_are_done, lambda: steps.score(features_uri, *champion, 0, 1, "dask"))
    assert scored == steps.score(features_uri, *champion, 0, 1)


def test_a_batch_scores_with_no_other_version_than_it_began_with(
    on_dask: Any, champion: tuple[str, str], features_uri: str
) -> None:
    with pytest.raises(RegistryError, match=r"moved from version 999999 to \d+ while the batch ran"):
        steps.score(features_uri, champion[0], "999999", 0, 1, "dask")


@pytest.mark.filterwarnings("ignore")  # the runner's own, about what only a cluster heeds
def test_kubeflows_runner_hands_the_engine_to_each_step(
    on_dask: Any, champion: tuple[str, str], features_uri: str, tmp_path: Path
) -> None:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mlplatform_pipeline import local
        from mlplatform_pipeline.batch import score_parts
    alias, version = champion
    given = {"features_uri": features_uri, "alias": alias, "model_version": version, "parts": [0, 1]}
    done = local.run(score_parts, {**given, "engine": "dask"}, tmp_path)
    assert done.outputs["Output"] == [steps.score(features_uri, alias, version, part, 2) for part in range(2)]
    with pytest.raises(local.PipelineError, match="there is no engine 'spark'; give one of: local, dask"):
        local.run(score_parts, {**given, "engine": "spark"}, tmp_path)


@pytest.mark.parametrize("command", [("batch",), ("retrain", "s3://mlflow-datasets/window.parquet")])
def test_the_pipelines_command_asks_for_the_cluster_before_anything_else(command: tuple[str, ...]) -> None:
    def said(engine: str) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "mlplatform_pipeline", *command, "--engine", engine],
            cwd=ROOT,
            env={},
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stderr

    status, line = said("dask")
    assert status == 1
    assert line.startswith(f"error: the engine 'dask' needs a cluster and {cluster.VARIABLE} is not set; set it to")
    status, line = said("spark")
    assert status == 2
    assert 'Invalid value "spark" for --engine. Choose from: "local", "dask".' in line


def test_a_command_gets_a_cluster_of_this_machine(platform: Settings) -> None:
    code = "import os, sys; sys.exit(7 if os.environ['DASK_SCHEDULER_ADDRESS'].startswith('tls://127.0.0.1:') else 1)"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "mlplatform_ops", "with-dask", sys.executable, "-c", code], cwd=ROOT
    )
    assert done.returncode == 7


def test_rows_are_divided_without_a_gap() -> None:
    for rows, count in ((range(10), 3), (range(5, 7), 4), (range(0), 2), (range(3, 103), 1)):
        parts = cluster.split_rows(rows, count)
        assert np.concatenate([list(part) for part in parts]).tolist() == list(rows)
        assert 1 <= len(parts) <= count
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
