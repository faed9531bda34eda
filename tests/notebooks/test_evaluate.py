"""What notebook 3 measured, and what it wrote to the runs."""

from __future__ import annotations

from pathlib import Path

import mlflow
import pytest

from mlplatform import results
from mlplatform.promotion import evaluation, gate


@pytest.fixture(scope="module")
def evaluated(executed: dict[str, Path]) -> dict[str, dict]:
    return results.read_results(executed["03_evaluate_models"])


@pytest.fixture(scope="module")
def groups(evaluated: dict[str, dict]) -> dict[str, dict]:
    return {row["group"]: row for row in evaluated["groups"]}


def test_the_best_model_misses_45_of_100_high_earners(evaluated: dict[str, dict]) -> None:
    found = evaluated["metrics"]["xgboost"]
    assert evaluated["best"] == "xgboost"
    assert found["recall_score"] == pytest.approx(0.553, abs=0.01)
    assert found["precision_score"] == pytest.approx(0.703, abs=0.01)
    assert found["log_loss"] == pytest.approx(0.359, abs=0.005)


def test_every_run_has_mlflows_metrics_and_five_plots(evaluated: dict[str, dict]) -> None:
    for run_id in evaluated["runs"].values():
        run = mlflow.get_run(run_id)
        assert {"evaluation_recall_score", "evaluation_roc_auc", "evaluation_calibration_error"} <= set(
            run.data.metrics
        )
        plots = {Path(entry.path).name for entry in mlflow.artifacts.list_artifacts(run_id=run_id)}
        named = ("roc_curve_plot", "precision_recall_curve_plot", "lift_curve_plot", "calibration_curve_plot")
        assert {f"evaluation_{name}.png" for name in (*named, "confusion_matrix")} <= plots


def test_women_and_black_people_with_a_high_income_are_found_less_often(groups: dict[str, dict]) -> None:
    expected = {"Female": 0.42, "Male": 0.58, "Black": 0.375, "White": 0.564}
    assert {name: groups[name]["true_positive_rate"] for name in expected} == pytest.approx(expected, abs=0.02)
    assert groups["Female"]["high"] < groups["Male"]["low"]
    assert groups["Black"]["high"] < groups["White"]["low"]


def test_three_columns_carry_the_model(evaluated: dict[str, dict]) -> None:
    expected = {"Marital-Status": 0.106, "Education": 0.053, "Occupation": 0.037}
    assert {name: evaluated["importance"][name] for name in expected} == pytest.approx(expected, abs=0.01)
    assert sorted(evaluated["importance"], key=evaluated["importance"].__getitem__)[:-4:-1] == list(expected)


def test_a_threshold_by_cost_is_cheaper_than_one_half(evaluated: dict[str, dict]) -> None:
    assert evaluated["threshold"] == 0.25
    by_cost, by_habit = evaluated["cost"]
    assert by_cost < 0.9 * by_habit


def test_the_lead_is_small_and_its_interval_is_above_zero(evaluated: dict[str, dict]) -> None:
    mean, low, high = evaluated["lead"]
    assert 0 < low < mean < high < 0.005
    assert len(evaluated["folds"]["xgboost"]) == 10


def test_the_gate_reads_what_the_notebook_wrote(evaluated: dict[str, dict]) -> None:
    known = {name: gate.read(run_id) for name, run_id in evaluated["runs"].items()}
    assert gate.check(known["xgboost"], None)[0] == []
    assert gate.check(known["xgboost"], known["logistic-regression"])[0] == []
    assert any("lead" in reason for reason in gate.check(known["logistic-regression"], known["xgboost"])[0])
    for name in ("random-forest", "decision-tree"):
        assert any("calibration" in reason for reason in gate.check(known[name], None)[0])


def test_the_model_card_says_what_was_measured(evaluated: dict[str, dict]) -> None:
    card = mlflow.artifacts.load_text(f"runs:/{evaluated['runs']['xgboost']}/{evaluation.CARD_FILE}")
    recall = evaluated["metrics"]["xgboost"]["recall_score"]
    assert f"{recall:.3f}: it misses {1 - recall:.0%} of the high earners" in card
    assert "Race Black: 0.375" in card
    assert "{" not in card
