"""MLflow runs: the data sets, parameters, metrics and the one model of each training run."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata

import mlflow
import pandas as pd
from mlflow.data.pandas_dataset import PandasDataset, from_pandas
from sklearn.base import BaseEstimator
from sklearn.pipeline import Pipeline

from mlplatform import objectstore
from mlplatform.income import TARGET
from mlplatform.modeling import describe_encoder, features, labels, make_pipeline, probabilities, scores
from mlplatform.settings import DATASETS_BUCKET

EXPERIMENT = "income-classifier"


CONTEXTS = ("training", "testing", "reference")


ENCODER_FILE = "encoder.json"


ANSWERS_FILE = "test_probabilities.json"  # what the model in memory said, to hold a reloaded one against


MODEL_ARTIFACT = "model"


# What skops may load beside its own list. It travels with the model: it keeps a pickle out, and is no sandbox.
TRUSTED_TYPES = ["sklearn.tree._tree.Tree", "xgboost.core.Booster", "xgboost.sklearn.XGBClassifier"]


REQUIRED_PACKAGES = ("mlflow", "numpy", "pandas", "scikit-learn", "skops")


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
