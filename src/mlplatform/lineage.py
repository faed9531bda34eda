"""Where a prediction comes from: the features, the model, the run that trained it, and that run's data."""

from __future__ import annotations

import mlflow
import pandas as pd
from mlflow.entities.model_registry import ModelVersion

from mlplatform.errors import RegistryError
from mlplatform.tracking import CONTEXTS, data_sets, model_uri

MODEL_TAG = "model"
VERSION_TAG = "model_version"
ALIAS_TAG = "model_alias"
PREDICTIONS_TAG = "predictions"
# Feast writes this one by itself when features are read inside a run.
SERVICE_TAG = "feast.feature_service"


def note_prediction(version: ModelVersion, alias: str, predictions_uri: str) -> None:
    """Call `mlflow.set_tags` with the four tags that `trace` reads: the model, its version and alias, the answers."""
    mlflow.set_tags(
        {
            MODEL_TAG: version.name,
            VERSION_TAG: str(version.version),
            ALIAS_TAG: alias,
            PREDICTIONS_TAG: predictions_uri,
        }
    )


def trace(run_id: str) -> pd.DataFrame:
    """Follow a prediction back to the data its model was trained on; MLflow records each step, and no call joins them.

    Args:
        run_id: The run that predicted.

    Returns:
        One row per step, from the data to the prediction: `step`, `name`, `where`.

    Raises:
        RegistryError: The run lacks a tag that says where the prediction comes from.
    """
    prediction = mlflow.get_run(run_id)
    tags = prediction.data.tags
    missing = [tag for tag in (MODEL_TAG, VERSION_TAG, PREDICTIONS_TAG, SERVICE_TAG) if tag not in tags]
    if missing:
        raise RegistryError(f"run {run_id} has no tag {', '.join(missing)}; run notebook 07_predict_income")
    version = mlflow.MlflowClient().get_model_version(tags[MODEL_TAG], tags[VERSION_TAG])
    training = mlflow.get_run(str(version.run_id))
    rows = [
        *(
            (f"{data.context} data", f"{data.name}, digest {data.digest}", data.uri)
            for data in data_sets(training)
            if data.context in CONTEXTS  # an evaluation adds the test rows once more, as `eval`
        ),
        ("run", training.info.run_name, f"runs:/{training.info.run_id}"),
        (
            "model version",
            f"{version.name} version {version.version}, alias {tags[ALIAS_TAG]}",
            model_uri(version.name, version=version.version),
        ),
        ("feature service", tags[SERVICE_TAG], f"feast project {tags['feast.project']}"),
        ("prediction", prediction.info.run_name, tags[PREDICTIONS_TAG]),
    ]
    return pd.DataFrame(rows, columns=["step", "name", "where"])
