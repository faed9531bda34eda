"""The rules by which an evaluation makes a version champion, and the measures behind them: no server needed."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest
import requests
from evaluations import FOLDS, make_evaluation
from sklearn.linear_model import LogisticRegression

# The module itself, since a name of it is replaced below.
import mlplatform.promotion.gate as gate
from mlplatform import income
from mlplatform.errors import RegistryError, ServiceDownError
from mlplatform.promotion import evaluation
from mlplatform.promotion.alias import mlflow_errors

CHAMPION = make_evaluation(auc=0.880)


def test_an_evaluation_that_passes_every_rule_breaks_none() -> None:
    assert gate.check(CHAMPION, None)[0] == []
    broken, figures = gate.check(make_evaluation(auc=0.884), CHAMPION)
    assert broken == []
    assert "lead in AUC +0.0040" in figures


def test_an_evaluation_that_could_not_be_read_is_not_taken_for_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(*_: object) -> dict[str, object]:
        raise requests.ReadTimeout("read timed out")

    monkeypatch.setattr(gate, "load_json", late)
    with pytest.raises(ServiceDownError, match=r"the MLflow server at .* does not answer"), mlflow_errors():
        gate.read_champion("challenger", "champion")
    with pytest.raises(ServiceDownError, match=r"the MLflow server at .* does not answer"), mlflow_errors():
        gate.read("challenger")
    monkeypatch.setattr(gate, "load_json", lambda *_: {})
    assert gate.read_champion("challenger", "champion") is None
    with pytest.raises(RegistryError, match="has no evaluation; run notebook"):
        gate.read("challenger")


@pytest.mark.parametrize("auc", [0.880, 0.870])
def test_no_lead_is_turned_away(auc: float) -> None:
    (reason,) = gate.check(make_evaluation(auc=auc), CHAMPION)[0]
    assert reason.startswith("lead in AUC")


def test_a_lead_that_may_be_chance_is_turned_away() -> None:
    scatter = np.tile([0.006, -0.004], 5)
    challenger = dataclasses.replace(CHAMPION, fold_auc=(np.array(CHAMPION.fold_auc) + scatter).tolist())
    (reason,) = gate.check(challenger, CHAMPION)[0]
    assert "lead in AUC +0.0010 (-0.0" in reason


@pytest.mark.parametrize("folds", [{}, FOLDS | {"seed": 7}])
def test_scores_on_other_folds_are_not_compared(folds: dict[str, int]) -> None:
    (reason,) = gate.check(make_evaluation(auc=0.99, folds=folds), CHAMPION)[0]
    assert "cannot be compared" in reason


def test_the_best_score_does_not_excuse_calibration_or_the_worst_group() -> None:
    assert "calibration error 0.0300 is above 0.02" in gate.check(make_evaluation(auc=0.99, error=0.03), None)[0]
    assert (
        "true positive rate 0.200 of Female is below 0.3" in gate.check(make_evaluation(auc=0.99, found=0.2), None)[0]
    )
    (reason,) = gate.check(make_evaluation(auc=0.99, found=0.4), CHAMPION)[0]
    assert "worst group is 0.100 below the champion's" in reason


def test_a_group_of_a_few_people_is_not_the_worst() -> None:
    few = {"column": "Race", "group": "Other", "positives": 3, "true_positive_rate": 0.0, "low": 0.0, "high": 0.6}
    assert dataclasses.replace(CHAMPION, groups=[*CHAMPION.groups, few]).worst_group["group"] == "Female"


def test_every_rule_has_a_reason() -> None:
    assert set(gate.RULES) == {"lead", "calibration", "worst_group", "worst_group_loss"}
    assert all(len(rule["reason"]) > 40 for rule in gate.RULES.values())


def test_a_calibrated_model_has_a_small_calibration_error_and_a_sure_one_a_large_one() -> None:
    rng = np.random.default_rng(0)
    probability = rng.uniform(0, 1, 20_000)
    truth = rng.binomial(1, probability)
    assert evaluation.calibration_error(truth, probability) < 0.01
    assert evaluation.calibration_error(truth, np.round(probability)) == pytest.approx(0.25, abs=0.01)


def table(n: int) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({column: rng.choice(["a", "b"], n) for column in income.COLUMNS})
    return frame.assign(Target=np.where(rng.uniform(size=n) < 0.2 + 0.6 * (frame["Sex"] == "a"), ">50K", "<=50K"))


def test_the_rate_of_a_group_is_the_share_of_its_high_earners_above_one_half() -> None:
    frame = table(400)
    rates = evaluation.group_rates(frame, np.where(frame["Sex"] == "a", 0.9, 0.1)).set_index(["column", "group"])
    assert rates.loc[("Sex", "a"), "true_positive_rate"] == 1
    assert rates.loc[("Sex", "b"), "true_positive_rate"] == 0
    assert rates.loc["Sex", "positives"].sum() == (frame["Target"] == ">50K").sum()
    assert (rates["low"] >= 0).all()
    assert (rates["high"] <= 1).all()
    # Wilson's interval of 5 of 10, from a table.
    ten = pd.DataFrame({"Sex": ["a"] * 10, "Race": ["b"] * 10, "Target": [">50K"] * 10})
    half = evaluation.group_rates(ten, np.repeat([0.9, 0.1], 5)).iloc[0]
    assert (half["low"], half["high"]) == pytest.approx((0.2366, 0.7634), abs=1e-4)


def test_fold_scores_are_those_of_one_model_after_the_other() -> None:
    frame = table(300)
    models = {"strong": LogisticRegression(), "weak": LogisticRegression(C=1e-4)}
    both = evaluation.fold_scores(models, frame, seed=1)
    alone = evaluation.fold_scores({"weak": models["weak"]}, frame, seed=1)
    assert both.shape == (10, 2)
    assert both["weak"].tolist() == alone["weak"].tolist()
    assert both.attrs == {"folds": 5, "repeats": 2, "seed": 1, "rows": 300}


def test_the_interval_is_wider_than_that_of_independent_folds() -> None:
    difference = np.array([0.001, 0.002, 0.003, 0.002, 0.001, 0.003, 0.002, 0.002, 0.001, 0.003])
    mean, low, high = evaluation.paired_interval(difference, folds=5)
    usual = 2.262 * difference.std(ddof=1) / np.sqrt(10)
    assert mean == pytest.approx(0.002)
    assert (high - low) / 2 == pytest.approx(usual * np.sqrt(1 + 10 / 4), rel=1e-3)
