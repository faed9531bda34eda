"""MLflow runs: the data sets, parameters, metrics and the one model of each training run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import NamedTuple

import mlflow
import pandas as pd
from mlflow.data.pandas_dataset import PandasDataset, from_pandas
from mlflow.entities import Run
from mlflow.models.model import ModelInfo
from mlflow.tracking.default_experiment import DEFAULT_EXPERIMENT_ID
from sklearn.base import BaseEstimator
from sklearn.pipeline import Pipeline

from mlplatform import objectstore, table
from mlplatform.engines import EngineName
from mlplatform.engines.training import fitting
from mlplatform.errors import RegistryError
from mlplatform.modeling import describe_encoder, inputs, make_pipeline, probabilities, scores
from mlplatform.promotion.signing import TRUSTED_TYPES, seal
from mlplatform.settings import DATASETS_BUCKET

__getattr__ = table.names(__name__, EXPERIMENT=lambda described: described.experiment)
CONTEXTS = ("training", "testing", "reference")
ENCODER_FILE = "encoder.json"
ANSWERS_FILE = "test_probabilities.json"  # what the model in memory answered, to compare a reloaded model with
MODEL_ARTIFACT = "model"

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
    """

    run_id: str
    name: str
    model_uri: str
    model: Pipeline
    scores: dict[str, float]


class DataSet(NamedTuple):
    """A data set as a run recorded it: its context, such as `testing`, its name, MLflow's digest, and its address."""

    context: str
    name: str
    digest: str
    uri: str


def write_datasets(train: pd.DataFrame, test: pd.DataFrame, reference: pd.DataFrame) -> list[PandasDataset]:
    """Call `mlflow.data.from_pandas` for three frames after storing each under a name that holds its digest.

    They go to `s3://mlflow-datasets/<table>/<context>-<digest>.parquet`.

    Args:
        train: The rows to fit on.
        test: The rows held back.
        reference: All rows, which later data is compared with.

    Returns:
        MLflow's description of each, in the order of `CONTEXTS`, with the `s3://` address as its source.
    """
    said, described = table.current(), []
    for context, frame in zip(CONTEXTS, (train, test, reference), strict=True):
        uri = objectstore.write_frame(frame, f"s3://{DATASETS_BUCKET}/{said.name}/{context}.parquet")
        dataset = from_pandas(frame, source=uri, targets=said.target.column, name=f"{said.name}-{context}")
        # By itself MLflow reads every value of every row to find that it is text, which takes a second.
        dataset.schema = mlflow.models.infer_signature(frame.head()).inputs
        described.append(dataset)
    return described


def fit_and_log(
    name: str,
    estimator: BaseEstimator,
    datasets: Sequence[PandasDataset],
    *,
    params: Mapping[str, object] | None = None,
    engine: EngineName = "local",
) -> LoggedRun:
    """Do in one call what notebook 2 does by hand: start a run, log the parameters, fit, and call `log_fitted`.

    MLflow marks the run as failed if this raises. There is no run if the engine cannot train this estimator.

    Args:
        name: The run's name.
        estimator: What comes after the encoder.
        datasets: What `write_datasets` returned.
        params: Parameters to record beside the estimator's own.
        engine: Who fits; `dask` is the cluster that DASK_SCHEDULER_ADDRESS names. `engines.training` says more.
    """
    train, address = datasets[0].df, str(datasets[0].source.to_dict().get("uri", ""))
    with fitting(engine, estimator) as fit, mlflow.start_run(run_name=name):
        mlflow.log_params({**estimator.get_params(), "engine": engine})
        model = fit(make_pipeline(estimator), train, address)
        return log_fitted(model, datasets, params=params)


def log_fitted(
    model: Pipeline, datasets: Sequence[PandasDataset], *, params: Mapping[str, object] | None = None
) -> LoggedRun:
    """Log in the active run what every run of ours must hold, so that any two of them can be compared.

    These are the kind of estimator, the three data sets by context, the model, the four metrics, the encoder's columns
    and the answers for the test rows.

    Args:
        model: A pipeline of `modeling.make_pipeline`, fitted on the first data set.
        datasets: What `write_datasets` returned.
        params: Parameters to record.

    Raises:
        RegistryError: There is no active run, or it is in MLflow's experiment Default, where nobody looks for it.
    """
    train, test, _ = (dataset.df for dataset in datasets)
    run = mlflow.active_run()
    if run is None:
        raise RegistryError("no run is active; call log_fitted inside `with mlflow.start_run():`")
    if run.info.experiment_id == DEFAULT_EXPERIMENT_ID:
        # Also where another process made the experiment at the same moment: mlflow.set_experiment then sets nothing.
        raise RegistryError("this run is in MLflow's experiment Default; call mlflow.set_experiment and try again")
    mlflow.log_params({"estimator": type(model.named_steps["estimator"]).__name__, **(params or {})})
    mlflow.log_inputs(datasets=list(datasets), contexts=list(CONTEXTS), tags_list=[None] * len(datasets))
    logged = log_model(model, train)
    mlflow.log_dict(describe_encoder(model), ENCODER_FILE)
    mlflow.log_dict({"probability": probabilities(model, test).tolist()}, ANSWERS_FILE)
    measured = scores(model, train, test)
    mlflow.log_metrics(measured, model_id=logged.model_id)
    return LoggedRun(run.info.run_id, run.info.run_name, logged.model_uri, model, measured)


def log_model(model: Pipeline, sample: pd.DataFrame) -> ModelInfo:
    """Call `mlflow.sklearn.log_model` in the skops format, with a schema and stated requirements, and sign the files.

    By itself MLflow loads the model in another process to find its requirements, which takes longer than training it.

    Args:
        model: A fitted pipeline.
        sample: Rows that show the model's inputs.
    """
    example = inputs(sample.head(5))
    logged: ModelInfo = mlflow.sklearn.log_model(
        model,
        name=MODEL_ARTIFACT,
        serialization_format="skops",
        skops_trusted_types=TRUSTED_TYPES,
        signature=mlflow.models.infer_signature(example, model.predict_proba(example)),
        pip_requirements=requirements(model),
        pyfunc_predict_fn="predict_proba",
    )
    seal(logged.model_id)
    return logged


def requirements(model: Pipeline) -> list[str]:
    """List the packages that a process needs to load a pipeline, each in the version installed here."""
    library = type(model.named_steps["estimator"]).__module__.partition(".")[0]
    packages = (*REQUIRED_PACKAGES, "xgboost") if library == "xgboost" else REQUIRED_PACKAGES
    return [f"{package}=={metadata.version(package)}" for package in packages]


def data_sets(run: Run) -> list[DataSet]:
    """List a run's data sets with their addresses, which MLflow keeps as JSON inside `run.inputs`."""
    entries = run.inputs.dataset_inputs if run.inputs else []
    return [
        DataSet(
            next((tag.value for tag in entry.tags if tag.key == "mlflow.data.context"), ""),
            entry.dataset.name,
            entry.dataset.digest,
            str(mlflow.data.get_source(entry).to_dict()["uri"]),
        )
        for entry in entries
    ]


def model_uri(name: str, *, version: int | str | None = None) -> str:
    """Build the address of a model: of a registered one by its version, or of a logged one by its id alone."""
    return f"models:/{name}" if version is None else f"models:/{name}/{version}"
