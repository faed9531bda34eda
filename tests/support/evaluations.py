"""Evaluations of a given quality, where a test is about the registry and not about a model."""

from __future__ import annotations

from collections.abc import Mapping

import mlflow
import numpy as np

from mlplatform.promotion import gate

FOLDS = {"folds": 5, "repeats": 2, "seed": 42, "rows": 1_000}


def make_evaluation(
    *, auc: float, found: float = 0.5, error: float = 0.01, folds: Mapping[str, int] = FOLDS
) -> gate.Evaluation:
    """One whose folds scatter around a score, by the same noise for all: the lead of one over another is exact."""
    noise = np.random.default_rng(1).normal(0, 0.003, 10)
    rates = {"Female": found, "Male": found + 0.1}
    groups = [
        {"column": "Sex", "group": group, "positives": 100, "true_positive_rate": rate, "low": 0.0, "high": 1.0}
        for group, rate in rates.items()
    ]
    return gate.Evaluation(1_000, error, groups, dict(folds), (auc + noise).tolist())


def log_evaluation(run_id: str, *, auc: float) -> None:
    """Write one to a run."""
    with mlflow.start_run(run_id=run_id):
        gate.log(make_evaluation(auc=auc))
