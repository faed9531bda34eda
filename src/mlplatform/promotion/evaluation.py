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
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import RepeatedStratifiedKFold
from threadpoolctl import threadpool_limits

from mlplatform.modeling import labels, make_encoder

GROUPS = ("Sex", "Race")
CARD_FILE = "model_card.md"


def calibration_error(truth: NDArray[np.int64], probability: NDArray[np.float64]) -> float:
    """Average the distance between predicted and observed rates over ten bins of equally many rows."""
    observed, predicted = calibration_curve(truth, probability, n_bins=10, strategy="quantile")
    edges = np.quantile(probability, np.linspace(0, 1, 11))  # the bins of calibration_curve, which hides their sizes
    sizes = np.bincount(np.searchsorted(edges[1:-1], probability), minlength=10)
    return float(np.average(np.abs(observed - predicted), weights=sizes[sizes > 0]))


def group_rates(test: pd.DataFrame, probability: NDArray[np.float64]) -> pd.DataFrame:
    """Give each group's true positive rate: the share of its high earners whose probability is above 0.5.

    Returns:
        One row per group of `GROUPS` that has high earners: `column`, `group`, `positives`, `true_positive_rate`, and
        `low`, `high`, its 95 % interval after Wilson (1927), which stays within 0 and 1.
    """
    found = test.assign(found=probability > 0.5)[labels(test) == 1].melt("found", list(GROUPS), "column", "group")
    rates = found.groupby(["column", "group"])["found"].agg(positives="size", true_positive_rate="mean")
    table: pd.DataFrame = rates.reset_index()
    n, rate, z = table["positives"], table["true_positive_rate"], 1.959964
    middle, half = rate + z**2 / (2 * n), z * np.sqrt(rate * (1 - rate) / n + z**2 / (4 * n**2))
    return table.assign(low=(middle - half) / (1 + z**2 / n), high=(middle + half) / (1 + z**2 / n))


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
    # Categories become columns without any statistics, so encoding all rows at once leaks nothing.
    encoded = make_encoder().fit_transform(frame).to_numpy()
    splits = RepeatedStratifiedKFold(n_splits=folds, n_repeats=repeats, random_state=seed).split(frame, truth)
    with threadpool_limits(
        1
    ):  # on busy cores the threads of a small matrix product wait for each other ten times as long
        for known, held in splits:
            fitted = {name: clone(model).fit(encoded[known], truth[known]) for name, model in estimators.items()}
            answers = {name: model.predict_proba(encoded[held])[:, 1] for name, model in fitted.items()}
            scores.append({name: roc_auc_score(truth[held], answer) for name, answer in answers.items()})
    result = pd.DataFrame(scores)
    result.attrs = {"folds": folds, "repeats": repeats, "seed": seed, "rows": len(frame)}
    return result


def paired_interval(difference: NDArray[np.float64], *, folds: int) -> tuple[float, float, float]:
    """Give mean, lower and upper end of the 95 % interval of a difference between two models on repeated folds.

    The folds share training rows, so their scores are not independent, and the usual interval is too narrow. The
    variance is corrected as Nadeau and Bengio (2003) do: 1/n becomes 1/n + 1/(folds - 1).
    """
    n, mean = len(difference), float(np.mean(difference))
    half = float(student.ppf(0.975, n - 1) * np.std(difference, ddof=1) * np.sqrt(1 / n + 1 / (folds - 1)))
    return mean, mean - half, mean + half


def model_card(**results: object) -> str:
    """Fill the template model_card.md beside this file, whose every figure is a result."""
    return Path(__file__).with_name(CARD_FILE).read_text().format(**results)
