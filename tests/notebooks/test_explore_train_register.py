"""What notebooks 1 to 4 made: plots, runs, data sets, models, the champion."""

from __future__ import annotations

import re
from pathlib import Path

import mlflow
import pandas as pd
import pytest
from mlflow.entities import Run

from mlplatform import income, modeling, objectstore, registry, results, tracking
from mlplatform_ops.embedded.platform import EmbeddedPlatform

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
# Area under the ROC curve on the training and on the test rows of seed 42. The split is exact, the models nearly so.
EXPECTED = {
    "xgboost": (0.887, 0.884),
    "logistic-regression": (0.878, 0.880),
    "random-forest": (0.928, 0.863),
    "decision-tree": (0.931, 0.830),
}


@pytest.fixture(scope="module")
def explored(executed: dict[str, Path]) -> dict[str, object]:
    return results.read_results(executed["01_explore_data"])


@pytest.fixture(scope="module")
def trained(executed: dict[str, Path]) -> dict[str, dict]:
    return results.read_results(executed["02_train_models"])


@pytest.fixture(scope="module")
def registered(executed: dict[str, Path]) -> dict[str, object]:
    return results.read_results(executed["04_register_model"])


@pytest.fixture(scope="module", params=EXPECTED)
def run(request: pytest.FixtureRequest, trained: dict[str, dict]) -> Run:
    return mlflow.get_run(trained["runs"][request.param])


def test_exploring_shows_the_documented_profile(explored: dict[str, object]) -> None:
    rows = {row["column"]: [row["unique"], row["top"], row["freq"]] for row in explored["profile"]}
    assert rows == {
        "Workclass": [7, "Private", 22286],
        "Education": [16, "HS-grad", 9840],
        "Marital-Status": [7, "Married-civ-spouse", 14065],
        "Occupation": [14, "Prof-specialty", 4038],
        "Relationship": [6, "Husband", 12463],
        "Race": [5, "White", 25933],
        "Sex": [2, "Male", 20380],
        "Native_country": [41, "United-States", 27504],
        "Target": [2, "<=50K", 22654],
    }
    assert explored["distinct_rows"] == 7_722


def test_exploring_logs_eight_plots_in_one_run_named_after_what_it_is(explored: dict[str, object]) -> None:
    run = mlflow.get_run(explored["run_id"])
    assert re.fullmatch(r"eda-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", run.info.run_name)
    assert mlflow.get_experiment(run.info.experiment_id).name == "income-classifier"
    plots = mlflow.artifacts.list_artifacts(f"runs:/{run.info.run_id}/plots")
    assert {Path(plot.path).name for plot in plots} == {f"{column}.png" for column in income.COLUMNS}
    assert min(plot.file_size for plot in plots) > 5_000
    times = objectstore.list_objects(f"s3://mlflow-artifacts/{run.info.experiment_id}/{run.info.run_id}/")["modified"]
    assert len(times) == len(income.COLUMNS)
    # One upload of eight files is over at once; a folder uploaded again after each plot takes as long as the plots.
    assert (times.max() - times.min()).total_seconds() <= 2


def test_every_run_has_the_four_metrics_within_tolerance(run: Run, trained: dict[str, dict]) -> None:
    own = {name: value for name, value in run.data.metrics.items() if not name.startswith("evaluation_")}
    assert set(own) == {"roc_auc_score_train", "roc_auc_score_test", "training_accuracy", "test_accuracy"}
    found = run.data.metrics["roc_auc_score_train"], run.data.metrics["roc_auc_score_test"]
    assert found == pytest.approx(EXPECTED[run.info.run_name], abs=0.003)
    assert own == pytest.approx(trained["scores"][run.info.run_name])
    assert 0.82 < run.data.metrics["test_accuracy"] < 0.835


def test_every_run_has_its_parameters(run: Run) -> None:
    assert run.data.params["seed"] == "42"
    assert run.data.params["test_size"] == "0.2"
    own = {
        "xgboost": {"learning_rate": "0.1", "max_depth": "4", "objective": "binary:logistic"},
        "logistic-regression": {"solver": "newton-cholesky", "C": "1.0"},
        "random-forest": {"n_estimators": "100", "max_depth": "None"},
        "decision-tree": {"min_samples_leaf": "1", "criterion": "gini"},
    }[run.info.run_name]
    assert own.items() <= run.data.params.items()


def test_autologging_recorded_the_use_of_each_column(trained: dict[str, dict]) -> None:
    importance = mlflow.artifacts.load_dict(f"runs:/{trained['runs']['xgboost']}/feature_importance_weight.json")
    assert "Relationship_Husband" in importance


def test_every_run_has_three_data_sets_that_load_back(run: Run) -> None:
    addresses = {data.context: data.uri for data in tracking.data_sets(run)}
    # MLflow's evaluation records its rows too, with the prefix of its metrics as the context.
    assert set(addresses) == {"training", "testing", "reference", "evaluation_"}
    assert addresses["evaluation_"] == addresses["testing"]
    assert all(uri.startswith("s3://mlflow-datasets/") for uri in addresses.values())
    sources = {entry.dataset.name: mlflow.data.get_source(entry) for entry in run.inputs.dataset_inputs}
    frames = {context: pd.read_parquet(sources[f"income-{context}"].load()) for context in tracking.CONTEXTS}
    assert [len(frames[context]) for context in tracking.CONTEXTS] == [24_129, 6_033, 30_162]
    both = pd.concat([frames["training"], frames["testing"]])
    pd.testing.assert_series_equal(both.value_counts().sort_index(), frames["reference"].value_counts().sort_index())


def test_every_run_has_one_model_of_raw_categories_and_no_pickle(run: Run) -> None:
    assert len(run.outputs.model_outputs) == 1
    uri = f"models:/{run.outputs.model_outputs[0].model_id}"
    info = mlflow.models.get_model_info(uri)
    assert info.signature.inputs.input_names() == list(income.COLUMNS)
    assert info.flavors["sklearn"]["serialization_format"] == "skops"
    stored = objectstore.list_objects(f"s3://mlflow-artifacts/{run.info.experiment_id}/")["uri"]
    files = stored[stored.str.contains(f"/{run.info.run_id}/|/{info.model_id}/")]
    assert files.str.endswith("/model.skops").sum() == 1
    assert set(files.map(lambda file: Path(file).suffix)) <= {"", ".skops", ".txt", ".yaml", ".json", ".png", ".md"}
    [requirements] = files[files.str.endswith("/requirements.txt")]
    assert b"cloudpickle" not in objectstore.read_bytes(requirements)


def test_the_best_model_reaches_the_five_fold_mean_that_is_asked_for(trained: dict[str, dict]) -> None:
    folds = trained["folds"]["xgboost"]
    assert len(folds) == 5
    assert sum(folds) / 5 >= 0.877


def test_the_champion_is_the_best_run_and_the_runner_up_was_turned_away(
    registered: dict[str, object], trained: dict[str, dict]
) -> None:
    best = max(trained["scores"], key=lambda name: trained["scores"][name]["roc_auc_score_test"])
    assert registered["champion_name"] == best == "xgboost"
    assert registered["champion_run"] == trained["runs"][best]
    assert registered["runner_up"]["reason"].startswith("not promoted")
    champion = registry.find("champion", name="income-above-50k")
    assert int(champion.version) == registered["champion"]
    assert registered["compared_rows"] == 6_033


def test_the_champion_loads_by_alias_and_scores_what_its_run_says(registered: dict[str, object]) -> None:
    model = registry.load_model()
    train, test = income.split(income.read_income(NOTEBOOKS.parent / "data" / "income_data.csv"), seed=42)
    assert modeling.scores(model, train, test) == pytest.approx(registered["scores"])


def test_both_decisions_are_listed(registered: dict[str, object]) -> None:
    events = registry.decisions().set_index("version")["event"]
    assert events.loc[registered["champion"]].startswith("promoted")
    assert "lead in AUC" in registered["runner_up"]["reason"]
    assert registered["runner_up"]["reason"] in set(events)


def test_registering_and_promoting_again_changes_nothing(registered: dict[str, object]) -> None:
    client, query = mlflow.MlflowClient(), "name = 'income-above-50k'"
    before, events = [entry.version for entry in client.search_model_versions(query)], registry.decisions()
    version = registry.register(registry.search().iloc[0]["run_id"])
    assert version == registered["champion"]
    assert not registry.promote(version).promoted
    assert [entry.version for entry in client.search_model_versions(query)] == before
    pd.testing.assert_frame_equal(registry.decisions(), events)


def test_models_come_through_mlflow_and_not_by_links_to_the_object_store(
    executed: dict[str, Path], embedded: EmbeddedPlatform
) -> None:
    """A client outside a cluster reaches MLflow, and knows no way to the object store that such a link names."""
    asked = (embedded.state / "logs" / "mlflow.log").read_text()
    assert "GET /api/2.0/mlflow-artifacts/artifacts/" in asked
    assert "/mlflow-artifacts/presigned/" not in asked
