"""Where a prediction comes from: its inputs' service, the model, the run that made it, and that run's data."""

from __future__ import annotations

import mlflow
import pandas as pd
from mlflow.entities import Run
from mlflow.entities.model_registry import ModelVersion

from mlplatform.errors import RegistryError

MODEL_TAG = "model"
VERSION_TAG = "model_version"
ALIAS_TAG = "model_alias"
PREDICTIONS_TAG = "predictions"
# Feast writes this one by itself when features are fetched within a run.
SERVICE_TAG = "feast.feature_service"


def note_prediction(version: ModelVersion, alias: str, predictions_uri: str) -> None:
    """Write to the active run which model it asked and where the answers are, so that `trace` can follow."""
    mlflow.set_tags(
        {
            MODEL_TAG: version.name,
            VERSION_TAG: str(version.version),
            ALIAS_TAG: alias,
            PREDICTIONS_TAG: predictions_uri,
        }
    )


def trace(run_id: str) -> pd.DataFrame:
    """Follow a prediction back to the data its model was trained on, by what MLflow has recorded.

    Args:
        run_id: The run that predicted.

    Returns:
        One row per step, from the data to the prediction: `step`, `name`, `where`.

    Raises:
        RegistryError: The run says too little about itself.
    """
    prediction = mlflow.get_run(run_id)
    tags = prediction.data.tags
    missing = [tag for tag in (MODEL_TAG, VERSION_TAG, PREDICTIONS_TAG, SERVICE_TAG) if tag not in tags]
    if missing:
        raise RegistryError(f"run {run_id} has no tag {', '.join(missing)}; run notebook 07_predict_income")
    version = mlflow.MlflowClient().get_model_version(tags[MODEL_TAG], tags[VERSION_TAG])
    training = mlflow.get_run(str(version.run_id))
    model_uri = f"models:/{version.name}/{version.version}"
    rows = [
        *_data_sets(training),
        ("run", training.info.run_name, f"runs:/{training.info.run_id}"),
        ("model version", f"{version.name} version {version.version}, alias {tags[ALIAS_TAG]}", model_uri),
        ("feature service", tags[SERVICE_TAG], f"feast project {tags['feast.project']}"),
        ("prediction", prediction.info.run_name, tags[PREDICTIONS_TAG]),
    ]
    return pd.DataFrame(rows, columns=["step", "name", "where"])


def _data_sets(training: Run) -> list[tuple[str, str, str]]:
    inputs = training.inputs.dataset_inputs if training.inputs else []
    return [
        (
            f"{entry.tags[0].value} data",
            f"{entry.dataset.name}, digest {entry.dataset.digest}",
            str(mlflow.data.get_source(entry).to_dict()["uri"]),
        )
        for entry in inputs
    ]
