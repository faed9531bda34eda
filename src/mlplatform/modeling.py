"""Models of the table: a scikit-learn pipeline from raw categories and numbers to a probability, and its scores.

The encoder is part of the pipeline, so whoever loads a model sends it raw values and never encodes anything.
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
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from mlplatform import table
from mlplatform.errors import DataError

SCORES = ("roc_auc_score_train", "roc_auc_score_test", "training_accuracy", "test_accuracy")


def make_encoder() -> ColumnTransformer:
    """Make a `OneHotEncoder` for categories whose output keeps names: `<column>_<category>`, each 0 or 1.

    A category that the encoder did not see when it was fitted gets 0 in every column, and is no error. Numbers keep
    their names, come after the categories, and are scaled to mean 0 and deviation 1, which a linear model needs.
    """
    described = table.current()
    onehot = OneHotEncoder(handle_unknown="ignore", sparse_output=False, dtype=np.float32)
    parts = [("categories", onehot, list(described.categories)), ("numbers", StandardScaler(), list(described.numbers))]
    encoder = ColumnTransformer([part for part in parts if part[2]], verbose_feature_names_out=False)
    return encoder.set_output(transform="pandas")


def make_pipeline(estimator: BaseEstimator) -> Pipeline:
    """Make a `Pipeline` of our encoder and an estimator, so that the two are fitted, stored and loaded as one."""
    return Pipeline([("encoder", make_encoder()), ("estimator", estimator)])


def describe_encoder(model: Pipeline) -> dict[str, Any]:
    """Give what a fitted encoder has learned as plain lists, which JSON can hold.

    Args:
        model: A pipeline of `make_pipeline`, fitted.

    Returns:
        `categories`, by raw column; `columns`, the names of the encoded columns in order; `numbers`, if there are any:
        mean and deviation, by raw column.
    """
    encoder = model.named_steps["encoder"]
    parts = {name: (part, columns) for name, part, columns in encoder.transformers_ if name != "remainder"}
    onehot, columns = parts.get("categories", (None, []))
    known = zip(columns, onehot.categories_ if onehot else [], strict=True)
    described: dict[str, Any] = {
        "categories": {column: list(map(str, values)) for column, values in known},
        "columns": list(map(str, encoder.get_feature_names_out())),
    }
    if "numbers" in parts:
        scaler, columns = parts["numbers"]
        scales = zip(columns, scaler.mean_.tolist(), scaler.scale_.tolist(), strict=True)
        described["numbers"] = {column: [mean, deviation] for column, mean, deviation in scales}
    return described


def inputs(frame: pd.DataFrame) -> pd.DataFrame:
    """Select the model's input columns in order; unlike plain indexing, refuse rows that the model knows nothing about.

    Args:
        frame: The described columns among any others, under the file's names or under the feature store's, such as
            `Marital_Status` for `Marital-Status`.

    Returns:
        The described columns under the file's names, numbers as floats.

    Raises:
        DataError: A column is missing, a number is none, or a value is null, as for a user whom the feature store does
            not know.
    """
    described = table.current()
    columns = list(described.columns)
    renamed = frame.rename(
        columns={feature: column for column, feature in described.features.items() if column not in frame.columns}
    )
    missing = [column for column in columns if column not in renamed.columns]
    if missing:
        raise DataError(f"the model's input lacks {', '.join(missing)}; give the columns {', '.join(columns)}")
    chosen = renamed[columns]
    nulls = int(chosen.isna().any(axis=1).sum())
    if nulls:
        raise DataError(
            f"{nulls} of {len(frame)} rows have null features; drop them: the model knows nothing about them"
        )
    return chosen.assign(**table.as_numbers(chosen, name="the model's input"))


def labels(frame: pd.DataFrame) -> NDArray[np.int64]:
    """Give the target as 1 for the positive class, an income above 50,000 dollars, and 0 for the rest."""
    target = table.current().target
    return np.asarray(frame[target.column] == target.positive, dtype=np.int64)


def probabilities(model: Pipeline, frame: pd.DataFrame) -> NDArray[np.float64]:
    """Give each row's probability of the positive class; adds the check of `inputs` to `predict_proba`.

    Args:
        model: A fitted pipeline, in memory or loaded from the registry.
        frame: As for `inputs`.

    Returns:
        One probability per row, in the frame's order.

    Raises:
        DataError: As in `inputs`.
    """
    return np.asarray(model.predict_proba(inputs(frame))[:, 1], dtype=np.float64)


def scores(model: Pipeline, train: pd.DataFrame, test: pd.DataFrame) -> dict[str, float]:
    """Compute the four metrics of a fitted model in one call, on the rows it was fitted on and on the rows held back.

    The area under the ROC curve is computed on probabilities. On 0/1 answers it would be another, lower number.

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
    """Call `cross_val_score` with our encoder, which each fold fits anew, on folds that the seed alone decides.

    Args:
        estimator: What comes after the encoder.
        frame: All rows, with the target.
        folds: How many parts, each with the same share of positives.
        seed: Number that fixes which row goes to which fold.

    Returns:
        The area under the ROC curve of each fold.
    """
    parts = StratifiedKFold(folds, shuffle=True, random_state=seed)
    scored = cross_val_score(make_pipeline(estimator), inputs(frame), labels(frame), cv=parts, scoring="roc_auc")
    return np.asarray(scored, dtype=np.float64)
