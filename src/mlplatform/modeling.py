"""Models of the income data: one pipeline from raw categories to a probability, scored and logged the same way each.

The encoder is part of the model, so whoever loads the model sends categories and never has to repeat an encoding.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import mlflow
import numpy as np
import pandas as pd
from mlflow.data.pandas_dataset import PandasDataset, from_pandas
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.compose import ColumnTransformer
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import OneHotEncoder

from mlplatform import objectstore
from mlplatform.errors import DataError
from mlplatform.income import COLUMNS, POSITIVE, TARGET
from mlplatform.settings import DATASETS_BUCKET

EXPERIMENT = "income-classifier"
CONTEXTS = ("training", "testing", "reference")
ENCODER_FILE = "encoder.json"
ANSWERS_FILE = "test_probabilities.json"  # what the model in memory said, to hold a reloaded one against
MODEL_ARTIFACT = "model"
# What skops may load beside its own list. It travels with the model: it keeps a pickle out, and is no sandbox.
TRUSTED_TYPES = ["sklearn.tree._tree.Tree", "xgboost.core.Booster", "xgboost.sklearn.XGBClassifier"]
REQUIRED_PACKAGES = ("mlflow", "numpy", "pandas", "scikit-learn", "skops")


SCORES = ("roc_auc_score_train", "roc_auc_score_test", "training_accuracy", "test_accuracy")


@dataclass(frozen=True)
class LoggedRun:
    """One model, fitted and logged.

    Attributes:
        run_id: MLflow's id of the run.
        name: The run's name.
        model_uri: Where the model is, as `models:/<id>`.
        model: The fitted pipeline itself.
        scores: Its four metrics.
        fit_seconds: Wall time of the fit.
        log_seconds: Wall time of everything else: scoring and logging.
    """

    run_id: str
    name: str
    model_uri: str
    model: Pipeline
    scores: dict[str, float]
    fit_seconds: float
    log_seconds: float


def make_encoder(categories: Mapping[str, Sequence[str]] | None = None) -> ColumnTransformer:
    """Make the encoder: a column of 0 and 1 per category, `<column>_<category>`.

    A category that was not there when it was fitted sets none of its column's ones, and is no error.

    Args:
        categories: Categories by raw column; by default what the data holds that it is fitted on.
    """
    known = "auto" if categories is None else [list(categories[column]) for column in COLUMNS]
    onehot = OneHotEncoder(categories=known, handle_unknown="ignore", sparse_output=False, dtype=np.float32)
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


def read_encoder(text: str) -> ColumnTransformer:
    """Make the fitted encoder again from its JSON description; nothing is unpickled.

    Args:
        text: What `describe_encoder` returned, as JSON.

    Raises:
        DataError: The text is not such a description, or contradicts itself.
    """
    try:
        described = json.loads(text)
        categories = {column: described["categories"][column] for column in COLUMNS}
        sample = pd.DataFrame({column: known[:1] for column, known in categories.items()})
        encoder = make_encoder(categories).fit(sample)
        columns = described["columns"]
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{ENCODER_FILE} is damaged ({error}); download it from the run again") from error
    if columns != list(encoder.get_feature_names_out()):
        raise DataError(f"{ENCODER_FILE} lists other columns than its categories give; download it from the run again")
    return encoder


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


def write_datasets(
    train: pd.DataFrame, test: pd.DataFrame, reference: pd.DataFrame, *, bucket: str = DATASETS_BUCKET
) -> list[PandasDataset]:
    """Store the three data sets by content and describe them to MLflow.

    Args:
        train: The rows to fit on.
        test: The rows held back.
        reference: All rows, which later data is compared with.
        bucket: Where they go, each as `s3://<bucket>/income/<context>-<digest>.parquet`.

    Returns:
        MLflow's description of each, in the order of `CONTEXTS`, with the `s3://` address as its source.
    """
    described = []
    for context, frame in zip(CONTEXTS, (train, test, reference), strict=True):
        uri = objectstore.write_frame(frame, f"s3://{bucket}/income/{context}.parquet")
        dataset = from_pandas(frame, source=uri, targets=TARGET, name=f"income-{context}")
        # Left to itself, MLflow looks at every value of every row to find that it is text, which takes a second.
        dataset.schema = mlflow.models.infer_signature(frame.head()).inputs
        described.append(dataset)
    return described


def fit_and_log(
    name: str,
    estimator: BaseEstimator,
    datasets: Sequence[PandasDataset],
    *,
    params: Mapping[str, object] | None = None,
    autologged: bool = False,
) -> LoggedRun:
    """Fit an estimator behind the encoder and record all there is to know about it in one MLflow run.

    The run holds the parameters, the four metrics, the three data sets by context, the encoder's column list, the
    answers for the test rows and one model that takes raw categories. MLflow marks the run as failed if this raises.

    Args:
        name: The run's name.
        estimator: What comes behind the encoder.
        datasets: What `write_datasets` returned.
        params: Parameters to record beside the estimator's own.
        autologged: Whether MLflow's autologging records the estimator's own parameters.
    """
    train, test, _ = (dataset.df for dataset in datasets)
    with mlflow.start_run(run_name=name) as run:
        model = make_pipeline(estimator)
        own = {} if autologged else estimator.get_params()
        mlflow.log_params({"estimator": type(estimator).__name__, **own, **(params or {})})
        started = time.perf_counter()
        model.fit(features(train), labels(train))
        fitted = time.perf_counter()
        mlflow.log_inputs(datasets=list(datasets), contexts=list(CONTEXTS), tags_list=[None] * len(datasets))
        model_uri = log_model(model, train)
        mlflow.log_dict(describe_encoder(model), ENCODER_FILE)
        mlflow.log_dict({"probability": probabilities(model, test).tolist()}, ANSWERS_FILE)
        measured = scores(model, train, test)
        mlflow.log_metrics(measured, model_id=model_uri.removeprefix("models:/"))
    seconds = fitted - started, time.perf_counter() - fitted
    return LoggedRun(run.info.run_id, name, model_uri, model, measured, *seconds)


def log_model(model: Pipeline, sample: pd.DataFrame) -> str:
    """Store a fitted pipeline in the active run, without pickle and without asking what it needs to run.

    MLflow finds requirements by loading the model in another process, which takes longer than training it. They are
    known here: the versions installed.

    Args:
        model: A fitted pipeline.
        sample: Rows that show the model's inputs.

    Returns:
        The model's address, `models:/<id>`.
    """
    inputs = features(sample.head(5))
    logged = mlflow.sklearn.log_model(
        model,
        name=MODEL_ARTIFACT,
        serialization_format="skops",
        skops_trusted_types=TRUSTED_TYPES,
        signature=mlflow.models.infer_signature(inputs, model.predict_proba(inputs)),
        pip_requirements=requirements(model),
        pyfunc_predict_fn="predict_proba",
    )
    return str(logged.model_uri)


def requirements(model: Pipeline) -> list[str]:
    """Name what a process must have installed to load a pipeline: the versions installed here."""
    library = type(model.named_steps["estimator"]).__module__.partition(".")[0]
    packages = (*REQUIRED_PACKAGES, "xgboost") if library == "xgboost" else REQUIRED_PACKAGES
    return [f"{package}=={metadata.version(package)}" for package in packages]
