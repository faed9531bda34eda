"""The model registry's rules: which run is best, when a model becomes the champion, how a champion is loaded.

MLflow knows which version an alias points to and not which ones it pointed to before. So each decision is written as
a tag on the version that it concerns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

import mlflow
import pandas as pd
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models.model import ModelInfo
from mlflow.types import DataType
from sklearn.pipeline import Pipeline

from mlplatform.errors import CredentialsError, RegistryError, ServiceDownError
from mlplatform.income import COLUMNS
from mlplatform.modeling import SCORES
from mlplatform.tracking import EXPERIMENT, data_sets, model_uri

MODEL_NAME = "income-above-50k"
DESCRIPTION = (
    "Probability that a person of the 1994 census earned above 50,000 dollars a year, from eight raw categories. "
    "For teaching: it must decide nothing about anybody."
)
CHAMPION = "champion"
PREVIOUS = "previous"
METRIC = "roc_auc_score_test"
QUERY = "metrics.roc_auc_score_test > 0.8"
MARGIN = 0.001
HISTORY = "history"  # a tag with this prefix holds one decision about its version, and its time
TEST_DATA = "test_data"


@dataclass(frozen=True)
class Promotion:
    """The decision about one challenger.

    Attributes:
        promoted: Whether the version took the alias.
        version: The challenger.
        over: The version that held the alias before, if any.
        reason: One sentence, with the figures that decided.
    """

    promoted: bool
    version: int
    over: int | None
    reason: str


def search(query: str = QUERY, *, metric: str = METRIC, experiment: str = EXPERIMENT) -> pd.DataFrame:
    """Call `mlflow.search_runs` for finished runs only, best first, and of equals the oldest; say so if there is none.

    Args:
        query: A filter in MLflow's language, as typed into the search bar of its UI.
        metric: Name of the metric to order by, of which more is better.
        experiment: Name of the experiment.

    Returns:
        One row per run: `run_id`, `name`, `start_time` (UTC) and the four metrics of `modeling.SCORES`.

    Raises:
        RegistryError: There is no such experiment, or no run that matches, or the query is no query.
    """
    with _mlflow_errors():
        if mlflow.get_experiment_by_name(experiment) is None:
            raise RegistryError(f"there is no experiment {experiment!r}; run notebook 02_train_models, or 'make run'")
        runs = mlflow.search_runs(
            experiment_names=[experiment],
            filter_string=f"{query} and attributes.status = 'FINISHED'",
            order_by=[f"metrics.{metric} DESC", "attributes.start_time ASC"],
        )
    if runs.empty:
        raise RegistryError(
            f"no finished run of {experiment!r} has {query}; lower the bound, or run notebook 02_train_models"
        )
    runs = runs.rename(columns={"tags.mlflow.runName": "name"} | {f"metrics.{score}": score for score in SCORES})
    return runs[["run_id", "name", "start_time", *SCORES]]


def register(run_id: str, *, name: str = MODEL_NAME) -> int:
    """Register the one model of a run; unlike `mlflow.register_model`, make no second version when called again.

    Args:
        run_id: MLflow's id of the run.
        name: The registered model; it is made when it is not there yet.

    Returns:
        The version's number.

    Raises:
        RegistryError: There is no such run, or it does not have exactly one model.
    """
    client = mlflow.MlflowClient()
    with _mlflow_errors():
        run = client.get_run(run_id)
        models = run.outputs.model_outputs if run.outputs else []
        if len(models) != 1:
            raise RegistryError(f"run {run_id} has {len(models)} models, not one; run notebook 02_train_models again")
        present = client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'")
        if present:
            return int(present[0].version)
        if not client.search_registered_models(f"name = '{name}'"):
            client.create_registered_model(name, description=DESCRIPTION)
        model_id = models[0].model_id
        # The address holds a digest of the test rows, so equal addresses are equal rows.
        tested_on = ",".join(data.uri for data in data_sets(run) if data.context == "testing")
        tags = {TEST_DATA: tested_on, "run_name": run.info.run_name}
        made = client.create_model_version(
            name, model_uri(model_id), run_id, tags=tags, await_creation_for=0, model_id=model_id
        )
    return int(made.version)


def promote(version: int, *, name: str = MODEL_NAME, metric: str = METRIC, margin: float = MARGIN) -> Promotion:
    """Move the alias `champion` to a version, but only if it beats the champion by a margin on the same test rows.

    `set_registered_model_alias` alone would move it to any version. The champion before it gets the alias `previous`.
    The decision and its reason are written to both versions.

    Args:
        version: The challenger's number.
        name: The registered model.
        metric: Name of the metric, of which more is better.
        margin: How much better the challenger must be; a smaller lead can be chance.

    Raises:
        RegistryError: There is no such version, or it lacks the metric.
    """
    client = mlflow.MlflowClient()
    with _mlflow_errors():
        challenger = client.get_model_version(name, str(version))
        champion = find(CHAMPION, name=name)
        outcome = _judge(challenger, champion, metric=metric, margin=margin)
        if champion is not None and champion.version == challenger.version:
            return outcome
        if outcome.promoted:
            if champion is not None:
                client.set_registered_model_alias(name, PREVIOUS, champion.version)
                _note(champion, f"replaced by version {version}")
            client.set_registered_model_alias(name, CHAMPION, challenger.version)
        _note(challenger, outcome.reason)
    return outcome


def _judge(challenger: ModelVersion, champion: ModelVersion | None, *, metric: str, margin: float) -> Promotion:
    """Decide by the test rows that the two versions name and by the metric of their runs."""
    version, score = int(challenger.version), _score(challenger, metric)
    if champion is None:
        return Promotion(True, version, None, f"promoted with {metric} {score:.4f}: there was no champion")
    holder = int(champion.version)
    if holder == version:
        return Promotion(False, version, holder, f"version {version} is the champion already")
    if challenger.tags.get(TEST_DATA) != champion.tags.get(TEST_DATA):
        reason = f"not promoted: tested on other rows than champion {holder}, so the scores cannot be compared"
        return Promotion(False, version, holder, reason)
    gain = score - _score(champion, metric)
    compared = f"{metric} {score:.4f} is {gain:+.4f} against champion {holder}, margin {margin}"
    if gain > margin:
        return Promotion(True, version, holder, f"promoted: {compared}")
    return Promotion(False, version, holder, f"not promoted: {compared}")


def _score(version: ModelVersion, metric: str) -> float:
    run = mlflow.get_run(str(version.run_id))
    if metric not in run.data.metrics:
        known = ", ".join(sorted(run.data.metrics)) or "none"
        raise RegistryError(f"version {version.version} has no metric {metric!r}; its run recorded: {known}")
    return float(run.data.metrics[metric])


def _note(version: ModelVersion, text: str) -> None:
    """Write a decision to a version, unless the last one written there says the same."""
    events = sorted((key, value) for key, value in version.tags.items() if key.startswith(HISTORY))
    if not events or events[-1][1] != text:
        key = f"{HISTORY} {datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%fZ}"
        mlflow.MlflowClient().set_model_version_tag(version.name, version.version, key, text)


def decisions(*, name: str = MODEL_NAME) -> pd.DataFrame:
    """List the decisions about all versions, oldest first; MLflow itself keeps no history of an alias.

    Returns:
        One row per decision: `time` (UTC), `version`, `event`.
    """
    with _mlflow_errors():
        versions = mlflow.MlflowClient().search_model_versions(f"name = '{name}'")
    rows = [
        (pd.Timestamp(key.removeprefix(HISTORY).strip()), int(entry.version), value)
        for entry in versions
        for key, value in entry.tags.items()
        if key.startswith(HISTORY)
    ]
    return pd.DataFrame(sorted(rows), columns=["time", "version", "event"])


def find(alias: str, *, name: str = MODEL_NAME) -> ModelVersion | None:
    """Find the version that holds an alias; unlike `get_model_version_by_alias`, give `None` if there is none."""
    client = mlflow.MlflowClient()
    with _mlflow_errors():
        models = client.search_registered_models(f"name = '{name}'")
        version = models[0].aliases.get(alias) if models else None
        return None if version is None else client.get_model_version(name, version)


def load_model(alias: str = CHAMPION, *, name: str = MODEL_NAME, columns: Sequence[str] = COLUMNS) -> Pipeline:
    """Load the version that holds an alias; unlike `mlflow.sklearn.load_model`, compare its signature first.

    Args:
        alias: The alias.
        name: The registered model.
        columns: The raw columns that the caller will send, each text.

    Returns:
        The fitted pipeline; `modeling.probabilities` applies it.

    Raises:
        RegistryError: There is no such model or alias, or its model takes other columns, or is no pipeline.
    """
    version = find(alias, name=name)
    if version is None:
        raise RegistryError(f"no alias {alias!r} on {name!r}; run notebook 04_register_model, or 'make run'")
    uri = model_uri(name, version=version.version)
    with _mlflow_errors():
        info = mlflow.models.get_model_info(uri)
        _check_signature(info, columns, label=f"{name!r} version {version.version}")
        return mlflow.sklearn.load_model(uri)


def _check_signature(model: ModelInfo, columns: Sequence[str], *, label: str) -> None:
    inputs = model.signature.inputs if model.signature else None
    found = {entry.name: entry.type for entry in inputs.inputs} if inputs and not inputs.is_tensor_spec() else {}
    if list(found) != list(columns) or set(found.values()) != {DataType.string}:
        listed = ", ".join(f"{name} {kind.name}" for name, kind in found.items()) or "no named columns"
        raise RegistryError(
            f"{label} takes {listed}; asked for {', '.join(columns)} as text; promote a version that takes these"
        )
    if "sklearn" not in model.flavors:
        raise RegistryError(f"{label} is no scikit-learn pipeline; promote a version of notebook 02_train_models")


@contextmanager
def _mlflow_errors() -> Iterator[None]:
    """Turn MLflow's errors into ours; those that mean nothing here pass unchanged."""
    try:
        yield
    except MlflowException as error:
        reason = " ".join(str(error.message).split())[:200]
        status = error.get_http_status_code()  # type: ignore[no-untyped-call]
        if status in {401, 403}:
            raise CredentialsError(
                f"the MLflow server refuses the credentials at {mlflow.get_tracking_uri()}; "
                "check MLFLOW_TRACKING_USERNAME, or run 'make env' again"
            ) from error
        if error.error_code in {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"}:
            said = reason.removeprefix(f"{error.error_code}: ")
            raise RegistryError(f"{said}; correct it, or run notebook 02_train_models") from error
        if "Max retries exceeded" in reason or status in {502, 503, 504}:
            raise ServiceDownError(
                f"the MLflow server at {mlflow.get_tracking_uri()} does not answer; run 'make up', then 'make status'"
            ) from error
        raise
