"""The exercises were done in the chain that every other test looks at; here is what they and the figures left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import exercises
import mlflow
import pytest

from mlplatform import objectstore, results

NAMES = [path.stem for path in sorted((exercises.ROOT / "notebooks").glob("0[1-7]*.ipynb"))]


def cells(executed: Path) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(executed.read_text())["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("name", NAMES)
def test_the_solution_of_every_exercise_runs_and_shows_something(name: str, executed: dict[str, Path]) -> None:
    done = [cell for cell in cells(executed[name]) if exercises.TAG in cell["metadata"].get("tags", ())]
    assert len(done) == len(exercises.find(exercises.ROOT / "notebooks" / f"{name}.ipynb")) > 0
    for cell in done:
        assert cell["execution_count"], cell["source"]
        assert cell["outputs"], cell["source"]


@pytest.mark.parametrize("name", NAMES)
def test_every_figure_has_a_text_for_readers_who_cannot_see_it(name: str, executed: dict[str, Path]) -> None:
    taught = [cell for cell in cells(executed[name]) if exercises.TAG not in cell["metadata"].get("tags", ())]
    figures = [output for cell in taught for output in cell["outputs"] if "image/png" in output.get("data", {})]
    assert [output for output in figures if not output["metadata"].get("image/png", {}).get("alt")] == []
    drawn = [
        output["data"]["image/svg+xml"]
        for cell in taught
        for output in cell["outputs"]
        if "image/svg+xml" in output.get("data", {})
    ]
    assert all("<title" in "".join(drawing) for drawing in drawn)


def test_exercises_leave_nothing_under_the_names_that_notebooks_read(executed: dict[str, Path]) -> None:
    assert sorted(executed) == NAMES
    stored = objectstore.list_objects("s3://feature-registry/")["uri"].tolist()
    assert [uri for uri in stored if "try-it" not in uri] == ["s3://feature-registry/registry.db"]
    models = {model.name for model in mlflow.MlflowClient().search_registered_models()}
    assert {"income-by-hand", "income-try-it"} & models == set()
    trained = mlflow.search_runs(experiment_names=["income-classifier"], filter_string="metrics.roc_auc_score_test > 0")
    assert len(trained) == 4


def test_the_search_is_one_run_with_a_nested_run_for_each_candidate(executed: dict[str, Path]) -> None:
    search = results.read_results(executed["02_train_models"])["search"]
    nested = mlflow.search_runs(
        experiment_names=["income-classifier"], filter_string=f"tags.mlflow.parentRunId = '{search['run']}'"
    )
    by_number = nested.sort_values("tags.mlflow.runName")["metrics.roc_auc_score_folds"]
    assert by_number.tolist() == pytest.approx(search["means"])
    assert len(nested) == 5
    parent = mlflow.get_run(search["run"]).data
    assert parent.params["winner"] == str(search["winner"])
    # What a search finds is not silently worse than what was there before it.
    assert parent.metrics["roc_auc_score_folds"] == max(search["means"]) >= search["means"][0]
