"""Links to MLflow's pages; `tests/browser` follows them."""

from __future__ import annotations

import uuid

import mlflow
import pytest

from mlplatform import mlflow_pages
from mlplatform.errors import RegistryError
from mlplatform.settings import Settings


def test_links_name_experiment_query_order_run_artifact_and_version(platform: Settings) -> None:
    mlflow.set_tracking_uri(platform.tracking_uri)
    name = f"pages-{uuid.uuid4()}"
    experiment_id = mlflow.create_experiment(name)
    with mlflow.start_run(experiment_id=experiment_id) as run:
        pass
    start = f"{platform.tracking_uri}/#/experiments/{experiment_id}/runs"
    end = "workflowType=machine_learning"
    assert mlflow_pages.runs_page(name) == f"{start}?{end}"
    assert mlflow_pages.runs_page(name, query="metrics.a > 0.8 and tags.b = 'c&d'", order_by="a", chart=True) == (
        f"{start}?searchFilter=metrics.a%20%3E%200.8%20and%20tags.b%20%3D%20%27c%26d%27"
        f"&orderByKey=metrics.%60a%60&orderByAsc=false&compareRunsMode=CHART&{end}"
    )
    assert mlflow_pages.run_page(run.info.run_id) == f"{start}/{run.info.run_id}?{end}"
    assert (
        mlflow_pages.run_page(run.info.run_id, "a b/c.png") == f"{start}/{run.info.run_id}/artifacts/a%20b/c.png?{end}"
    )
    assert mlflow_pages.version_page("my/model", 3) == f"{platform.tracking_uri}/#/models/my%2Fmodel/versions/3?{end}"


def test_an_experiment_that_is_not_there_is_named_with_what_to_run(platform: Settings) -> None:
    mlflow.set_tracking_uri(platform.tracking_uri)
    with pytest.raises(
        RegistryError, match="no experiment 'unheard-of'; run the notebook that makes it, or 'make run'"
    ):
        mlflow_pages.runs_page("unheard-of")
