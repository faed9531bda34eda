"""Models of the income data: one pipeline from raw categories to a probability, scored and logged the same way each.

The encoder is part of the model, so whoever loads the model sends categories and never has to repeat an encoding.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.compose import ColumnTransformer
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import OneHotEncoder

from mlplatform.errors import DataError
from mlplatform.income import COLUMNS, POSITIVE, TARGET

SCORES = ("roc_auc_score_train", "roc_auc_score_test", "training_accuracy", "test_accuracy")


def make_encoder() -> ColumnTransformer:
    """Make the encoder: a column of 0 and 1 per category, `<column>_<category>`.

    A category that was not there when it was fitted sets none of its column's ones, and is no error.
    """
    onehot = OneHotEncoder(handle_unknown="ignore", sparse_output=False, dtype=np.float32)
    encoder = ColumnTransformer([("categories", onehot, list(COLUMNS))], verbose_feature_names_out=False)
    return encoder.set_output(transform="pandas")


def make_pipeline(estimator: BaseEstimator) -> Pipeline:
    """Put the encoder in front of an estimator, so that the two are fitted, stored and loaded as one."""
    return Pipeline([("encoder", make_encoder()), ("estimator", estimator)])


def describe_encoder(model: Pipeline) -> dict[str, Any]:
    """Describe a fitted pipeline's encoder in plain lists, to be kept as JSON.

    Args:
        model: A pipeline of `make_pipeline`, fitted.

    Returns:
        `categories`, by raw column; `columns`, the names of the encoded columns in order.
    """
    encoder = model.named_steps["encoder"]
    fitted = encoder.named_transformers_["categories"].categories_
    return {
        "categories": {column: list(map(str, known)) for column, known in zip(COLUMNS, fitted, strict=True)},
        "columns": list(map(str, encoder.get_feature_names_out())),
    }


def features(frame: pd.DataFrame) -> pd.DataFrame:
    """Pick the model's inputs out of a frame, in order, and refuse what a model would silently guess about.

    Args:
        frame: Any frame that holds the raw columns `COLUMNS`.

    Raises:
        DataError: A column is missing, or a value is null, as for a user whom the feature store does not know.
    """
    missing = [column for column in COLUMNS if column not in frame.columns]
    if missing:
        raise DataError(f"the model's input lacks {', '.join(missing)}; give the columns {', '.join(COLUMNS)}")
    chosen = frame[list(COLUMNS)]
    nulls = chosen.isna().any(axis=1)
    if nulls.any():
        raise DataError(
            f"{int(nulls.sum())} of {len(frame)} rows have null features; drop them: the model knows nothing about them"
        )
    return chosen


def labels(frame: pd.DataFrame) -> NDArray[np.int64]:
    """Give the target as 1 for an income above 50,000 dollars and 0 for the rest."""
    return np.asarray(frame[TARGET] == POSITIVE, dtype=np.int64)


def probabilities(model: Pipeline, frame: pd.DataFrame) -> NDArray[np.float64]:
    """Give each row's probability of an income above 50,000 dollars.

    Args:
        model: A fitted pipeline, in memory or loaded from the registry.
        frame: Any frame that holds the raw columns `COLUMNS`; other columns are ignored.

    Returns:
        One probability per row, in the frame's order.

    Raises:
        DataError: As in `features`.
    """
    return np.asarray(model.predict_proba(features(frame))[:, 1], dtype=np.float64)


def scores(model: Pipeline, train: pd.DataFrame, test: pd.DataFrame) -> dict[str, float]:
    """Score a fitted model on the rows it saw and on those it did not.

    The area under the ROC curve is taken on probabilities: on hard 0/1 answers it is another, lower number.

    Args:
        model: A fitted pipeline.
        train: The rows it was fitted on, with the target.
        test: The rows held back, with the target.

    Returns:
        The four metrics `SCORES`: area under the ROC curve, and share of right answers at a probability of 0.5.
    """
    train_auc, train_accuracy = _auc_and_accuracy(model, train)
    test_auc, test_accuracy = _auc_and_accuracy(model, test)
    return dict(zip(SCORES, (train_auc, test_auc, train_accuracy, test_accuracy), strict=True))


def _auc_and_accuracy(model: Pipeline, frame: pd.DataFrame) -> tuple[float, float]:
    truth, probability = labels(frame), probabilities(model, frame)
    return float(roc_auc_score(truth, probability)), float(np.mean((probability > 0.5) == truth))


def cross_validate(estimator: BaseEstimator, frame: pd.DataFrame, *, folds: int = 5, seed: int) -> NDArray[np.float64]:
    """Score an estimator on each of several folds, the encoder fitted anew on the rest each time.

    Args:
        estimator: What comes behind the encoder.
        frame: All rows, with the target.
        folds: How many parts, each with the same share of positives.
        seed: Number that fixes which row goes to which fold.

    Returns:
        The area under the ROC curve of each fold.
    """
    parts = StratifiedKFold(folds, shuffle=True, random_state=seed)
    scored = cross_val_score(make_pipeline(estimator), features(frame), labels(frame), cv=parts, scoring="roc_auc")
    return np.asarray(scored, dtype=np.float64)
