"""What notebooks 8 and 10 made and claimed: the batch as a pipeline, and the drift watch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import exercises
import mlflow
import pandas as pd
import pytest

from mlplatform import lineage, objectstore, results
from mlplatform_ops import runner
from mlplatform_pipeline import steps

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def shown(executed: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The two notebooks, run with their exercises on what the core ones made."""
    output = tmp_path_factory.mktemp("notebooks")
    chosen = [ROOT / "notebooks" / f"{name}.ipynb" for name in ("08_run_pipeline", "10_watch_drift")]
    chosen = exercises.done(chosen, output / "exercises")
    parameters = {"08_run_pipeline": {"root": str(tmp_path_factory.mktemp("pipeline"))}}
    executions = runner.run_all(chosen, output, parameters=parameters)
    assert [f"{entry.name}: {entry.error}" for entry in executions if entry.error] == []
    return {entry.name: results.read_results(entry.executed) for entry in executions}


def test_the_pipeline_gives_the_predictions_of_notebook_7(
    shown: dict[str, dict[str, Any]], executed: dict[str, Path]
) -> None:
    piped, by_hand = shown["08_run_pipeline"], results.read_results(executed["07_predict_income"])
    assert piped["scored"] == 28_066
    assert piped["predictions"] == by_hand["predictions"]
    pd.testing.assert_frame_equal(
        objectstore.read_frame(piped["predictions"]), objectstore.read_frame(by_hand["predictions"]), check_exact=True
    )


def test_the_run_of_a_batch_names_pipeline_steps_inputs_and_outputs(shown: dict[str, dict[str, Any]]) -> None:
    run = mlflow.get_run(shown["08_run_pipeline"]["run_id"])
    tags = run.data.tags
    assert tags[steps.PIPELINE_TAG] == "income-batch"
    assert json.loads(tags[steps.STEPS_TAG]) == list(steps.BATCH_STEPS)
    assert len(objectstore.read_frame(json.loads(tags[steps.INPUTS_TAG])["people"])) == 28_066
    record = json.loads(objectstore.read_bytes(json.loads(tags[steps.OUTPUTS_TAG])["lineage"]))
    assert record["predictions"] == shown["08_run_pipeline"]["predictions"]
    assert lineage.trace(run.info.run_id)["step"].tolist()[-1] == "prediction"


def test_a_stopped_batch_is_marked_as_failed_and_only_first_and_last_step_run_again(
    shown: dict[str, dict[str, Any]],
) -> None:
    assert (
        "step summarise failed: BatchStoppedError: 2.09% of 28,666 people are unknown"
        in shown["08_run_pipeline"]["stopped"]
    )
    assert shown["08_run_pipeline"]["resumed"] == ["read-people", "summarise"]
    runs = mlflow.search_runs(experiment_names=[steps.EXPERIMENT])
    # The exercises add one that is scored in four parts, and one that is stopped.
    assert sorted(runs["status"]) == ["FAILED"] * 2 + ["FINISHED"] * 3


def test_the_drift_notebook_shows_the_default_alarm_failing_and_ours_holding(shown: dict[str, dict[str, Any]]) -> None:
    watched = shown["10_watch_drift"]
    assert watched["evidently_false_alarms"] > 0.5
    assert set(watched["evidently_drifted"].values()) == {0}
    assert max(watched["false_alarms"].values()) <= 0.01
    assert watched["drifted"]["equal"] == []
    assert all(watched["drifted"][name] == ["Occupation"] for name in ("5 % moved", "2 % new", "10 % missing"))
    assert watched["smallest"]["moved to the commonest category"]["500"] > 0.05
    for run_id in watched["runs"].values():
        assert mlflow.artifacts.load_dict(f"runs:/{run_id}/drift/verdict.json")["source"]
