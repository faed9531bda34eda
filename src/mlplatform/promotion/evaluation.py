"""How good a model is, and for whom: calibration, groups of people, and a lead over another model with its interval."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.stats import t as student
from sklearn.base import BaseEstimator, clone
from sklearn.calibration import calibration_curve
from sklearn.inspection import permutation_importance
from sklearn.metrics import log_loss, precision_score, recall_score, roc_auc_score
from sklearn.model_selection import RepeatedStratifiedKFold
from sklearn.pipeline import Pipeline
from threadpoolctl import threadpool_limits

from mlplatform import table
from mlplatform.modeling import labels, make_encoder, probabilities

CARD_FILE = "model_card.md"


def calibration_error(truth: NDArray[np.int64], probability: NDArray[np.float64]) -> float:
    """Average the distance between predicted and observed rates over ten bins of equally many rows."""
    observed, predicted = calibration_curve(truth, probability, n_bins=10, strategy="quantile")
    edges = np.quantile(probability, np.linspace(0, 1, 11))  # the bins of calibration_curve, which hides their sizes
    sizes = np.bincount(np.searchsorted(edges[1:-1], probability), minlength=10)
    return float(np.average(np.abs(observed - predicted), weights=sizes[sizes > 0]))


def group_rates(test: pd.DataFrame, probability: NDArray[np.float64]) -> pd.DataFrame:
    """Give each group's true positive rate: the share of its positive rows whose probability is above 0.5.

    Returns:
        One row per group of the described `groups` that has positive rows, or one for all rows where none is
        described: `column`, `group`, `positives`, `true_positive_rate`, and `low`, `high`, its 95 % interval after
        Wilson (1927), which stays within 0 and 1.
    """
    groups = list(table.current().groups)
    if not groups:
        test, groups = test.assign(rows="all rows"), ["rows"]
    found = test.assign(found=probability > 0.5)[labels(test) == 1].melt("found", groups, "column", "group")
    rates = found.groupby(["column", "group"])["found"].agg(positives="size", true_positive_rate="mean")
    counted: pd.DataFrame = rates.reset_index()
    n, rate, z = counted["positives"], counted["true_positive_rate"], 1.959964
    middle, half = rate + z**2 / (2 * n), z * np.sqrt(rate * (1 - rate) / n + z**2 / (4 * n**2))
    return counted.assign(low=(middle - half) / (1 + z**2 / n), high=(middle + half) / (1 + z**2 / n))


def fold_scores(
    estimators: Mapping[str, BaseEstimator], frame: pd.DataFrame, *, folds: int = 5, repeats: int = 2, seed: int
) -> pd.DataFrame:
    """Score several estimators on the same folds; `cross_val_score` encodes the rows again for each.

    Args:
        estimators: What comes behind the encoder, by name; they are cloned.
        frame: All rows, with the target.
        folds: How many parts, each with the same share of positives.
        repeats: How often the rows are divided again.
        seed: Number that fixes the folds.

    Returns:
        Area under the ROC curve: one row per fold, one column per estimator. `attrs` says which folds these are.
    """
    truth, scores = labels(frame), []
    # Categories become columns without any statistics, so encoding all rows at once leaks nothing. A number is scaled.
    encoded = make_encoder().fit_transform(frame).to_numpy()
    splits = RepeatedStratifiedKFold(n_splits=folds, n_repeats=repeats, random_state=seed).split(frame, truth)
    # On busy cores the threads of a small matrix product wait for each other ten times as long.
    with threadpool_limits(1):
        for known, held in splits:
            if table.current().numbers:
                encoded = make_encoder().fit(frame.iloc[known]).transform(frame).to_numpy()
            fitted = {name: clone(model).fit(encoded[known], truth[known]) for name, model in estimators.items()}
            answers = {name: model.predict_proba(encoded[held])[:, 1] for name, model in fitted.items()}
            scores.append({name: roc_auc_score(truth[held], answer) for name, answer in answers.items()})
    result = pd.DataFrame(scores)
    result.attrs = {"folds": folds, "repeats": repeats, "seed": seed, "rows": len(frame)}
    return result


def fitted_fold_scores(model: Pipeline, frame: pd.DataFrame, *, like: Mapping[str, int]) -> list[float]:
    """Score a model as it is on the parts that `fold_scores` holds back, so that the two compare fold by fold.

    A model that serves already is asked how it does on rows of a later time; it is not fitted again.

    Args:
        model: A fitted pipeline.
        frame: The rows that `fold_scores` divided, with the target.
        like: What names these folds: the `attrs` of its result.
    """
    truth, answers = labels(frame), probabilities(model, frame)
    parts = RepeatedStratifiedKFold(n_splits=like["folds"], n_repeats=like["repeats"], random_state=like["seed"])
    return [float(roc_auc_score(truth[held], answers[held])) for _, held in parts.split(frame, truth)]


def paired_interval(difference: NDArray[np.float64], *, folds: int) -> tuple[float, float, float]:
    """Give mean, lower and upper end of the 95 % interval of a difference between two models on repeated folds.

    The folds share training rows, so their scores are not independent, and the usual interval is too narrow. The
    variance is corrected as Nadeau and Bengio (2003) do: 1/n becomes 1/n + 1/(folds - 1).
    """
    n, mean = len(difference), float(np.mean(difference))
    half = float(student.ppf(0.975, n - 1) * np.std(difference, ddof=1) * np.sqrt(1 / n + 1 / (folds - 1)))
    return mean, mean - half, mean + half


def model_card(
    name: str,
    rows: int,
    measures: Mapping[str, float],
    importance: pd.Series,
    groups: pd.DataFrame,
    *,
    miss: float,
    false_alarm: float,
) -> str:
    """Fill the template model_card.md beside this file, whose every figure is a result.

    Args:
        name: What the card calls the model.
        rows: Number of test rows.
        measures: `roc_auc`, `precision`, `recall`, `log_loss` and `calibration_error` on these rows.
        importance: Area under the curve that is lost when a column is shuffled, by column, the largest first.
        groups: What `group_rates` gives.
        miss: Cost of a positive row that is not found.
        false_alarm: Cost of acting on a negative one.
    """
    described = table.current()
    said = {name: described.text(name) for name in ("does", "purpose", "data", "inputs", "positives", "rows")}
    shares = [
        f"- {g.column} {g.group}: {g.true_positive_rate:.3f} ({g.low:.3f} to {g.high:.3f}), "
        f"{g.positives} {said['rows']}"
        for g in groups.itertuples()
    ]
    template = Path(__file__).with_name(CARD_FILE).read_text()
    return template.format(
        **said | {"name": name, "rows": rows},
        **measures,
        missed=1 - measures["recall"],
        threshold=false_alarm / (false_alarm + miss),
        costs=f"a miss costs {miss:g} and a false alarm {false_alarm:g}",
        importance=", ".join(f"{column} {loss:.3f}" for column, loss in importance.head(3).items()),
        groups="\n".join(shares),
    )


def describe(model: Pipeline, test: pd.DataFrame, *, name: str, miss: float = 3.0, false_alarm: float = 1.0) -> str:
    """Write the model card of a model, as notebook 3 does step by step.

    Args:
        model: A fitted pipeline.
        test: The rows held back, with the target.
        name: What the card calls it.
        miss: Cost of a positive row that is not found.
        false_alarm: Cost of acting on a negative one.
    """
    truth, probability = labels(test), probabilities(model, test)
    chosen, columns = probability > 0.5, list(table.current().columns)
    shuffled = permutation_importance(
        model, test[columns], truth, scoring="roc_auc", n_repeats=3, random_state=0, n_jobs=1
    )
    importance = pd.Series(shuffled.importances_mean, index=columns).sort_values(ascending=False)
    measures = {
        "roc_auc": roc_auc_score(truth, probability),
        "precision": precision_score(truth, chosen),
        "recall": recall_score(truth, chosen),
        "log_loss": log_loss(truth, probability),
        "calibration_error": calibration_error(truth, probability),
    }
    groups = group_rates(test, probability)
    return model_card(name, len(test), measures, importance, groups, miss=miss, false_alarm=false_alarm)
