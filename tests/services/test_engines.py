"""Training and batch scoring on a Dask cluster of two worker processes, held to what this process answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from uuid import uuid4

import mlflow
import pandas as pd
import pytest
from mlflow.data.pandas_dataset import PandasDataset
from xgboost import XGBClassifier

from mlplatform import income, tracking
from mlplatform.settings import Settings

ROOT = Path(__file__).parents[2]


def boosted(**given: Any) -> XGBClassifier:
    """The model of notebook 2."""
    return XGBClassifier(
        **{"n_estimators": 200, "max_depth": 4, "learning_rate": 0.1, "n_jobs": 2, "random_state": 42, **given}
    )


@pytest.fixture(scope="module")
def income_frame() -> pd.DataFrame:
    return income.read_income(ROOT / "data" / "income_data.csv")


@pytest.fixture(scope="module")
def datasets(platform: Settings, income_frame: pd.DataFrame) -> list[PandasDataset]:
    train, test = income.split(income_frame, seed=42)
    return tracking.write_datasets(train, test, income_frame)


@pytest.fixture
def experiment(platform: Settings) -> str:
    mlflow.set_tracking_uri(platform.tracking_uri)
    return str(mlflow.set_experiment(f"test-{uuid4()}").experiment_id)


def test_xgboost_trained_by_two_workers_scores_as_by_one_process_and_logs_the_same(
    on_dask: Any, experiment: str, datasets: list[PandasDataset]
) -> None:
    single = tracking.fit_and_log("single", boosted(), datasets)
    spread = tracking.fit_and_log("spread", boosted(), datasets, engine="dask")
    for name, score in single.scores.items():
        assert spread.scores[name] == pytest.approx(score, abs=0.001), name
    print(single.scores, spread.scores)
    runs = [mlflow.get_run(run.run_id) for run in (single, spread)]
    params = [run.data.params for run in runs]
    assert [entry.pop("engine") for entry in params] == ["local", "dask"]
    assert params[0] == params[1]
    assert tracking.data_sets(runs[0]) == tracking.data_sets(runs[1])
    assert runs[0].data.metrics.keys() == runs[1].data.metrics.keys()
    files = [{entry.path for entry in mlflow.MlflowClient().list_artifacts(run.run_id)} for run in (single, spread)]
    assert files[0] == files[1]
    encoders = [mlflow.artifacts.load_dict(f"runs:/{run.run_id}/{tracking.ENCODER_FILE}") for run in (single, spread)]
    assert encoders[0] == encoders[1]
    estimators = [run.model.named_steps["estimator"] for run in (single, spread)]
    assert type(estimators[1]) is XGBClassifier
    assert estimators[0].__dict__.keys() == estimators[1].__dict__.keys()
    configs = [json.loads(estimator.get_booster().save_config()) for estimator in estimators]
    for c in configs:
        print(json.dumps(c)[:3000])
