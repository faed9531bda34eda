"""The model registry's rules: which run is best, when a model becomes the champion, how a champion is loaded.

MLflow knows which version an alias points to and not which ones it pointed to before. So each decision is written as
a tag on the version that it concerns.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import mlflow
import pandas as pd
from mlflow.entities.model_registry import ModelVersion
from mlflow.models import Model
from mlflow.types import DataType
from sklearn.pipeline import Pipeline

from mlplatform import table
from mlplatform.errors import RegistryError
from mlplatform.modeling import SCORES
from mlplatform.promotion import lock, signing
from mlplatform.promotion.alias import HISTORY, TEST_DATA, before, judge, mend, mlflow_errors, move, note, sign
from mlplatform.promotion.alias import PREVIOUS as PREVIOUS
from mlplatform.promotion.alias import Promotion as Promotion
from mlplatform.promotion.alias import find as find
from mlplatform.promotion.alias import require as require
from mlplatform.settings import CHAMPION as CHAMPION
from mlplatform.tracking import data_sets, model_uri

TYPES = {"category": DataType.string, "number": DataType.double}  # of a model's inputs, by kind
METRIC = "roc_auc_score_test"
QUERY = "metrics.roc_auc_score_test > 0.8"


def search(query: str = QUERY, *, metric: str = METRIC, experiment: str | None = None) -> pd.DataFrame:
    """Call `mlflow.search_runs` for finished runs only, best first, and of equals the oldest; say so if there is none.

    Args:
        query: A filter in MLflow's language, as typed into the search bar of its UI.
        metric: Name of the metric to order by, of which more is better.
        experiment: Name of the experiment, by default that of the training runs.

    Returns:
        One row per run: `run_id`, `name`, `start_time` (UTC) and the four metrics of `modeling.SCORES`.

    Raises:
        RegistryError: There is no such experiment, or no run that matches, or the query is no query.
    """
    experiment = experiment or table.current().experiment
    with mlflow_errors():
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


def register(run_id: str, *, name: str | None = None) -> int:
    """Register the one model of a run; unlike `mlflow.register_model`, make no second version when called again.

    Args:
        run_id: MLflow's id of the run.
        name: The registered model, by default the table's; it is made when it is not there yet.

    Returns:
        The version's number.

    Raises:
        RegistryError: There is no such run, or it does not have exactly one model.
    """
    name, client = name or table.current().model, mlflow.MlflowClient()
    with mlflow_errors():
        run = client.get_run(run_id)
        models = run.outputs.model_outputs if run.outputs else []
        if len(models) != 1:
            raise RegistryError(f"run {run_id} has {len(models)} models, not one; run notebook 02_train_models again")
        model_id = models[0].model_id
        # The address holds a digest of the test rows, so equal addresses are equal rows.
        tested_on = ",".join(data.uri for data in data_sets(run) if data.context == "testing")
        tags = {TEST_DATA: tested_on, "run_name": run.info.run_name}
        with lock.exclusive(f"promotion/{name}"):
            present = client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'")
            if present:
                return int(present[0].version)
            if not client.search_registered_models(f"name = '{name}'"):
                client.create_registered_model(name, description=table.current().text("model"))
            made = client.create_model_version(
                name, model_uri(model_id), run_id, tags=tags, await_creation_for=0, model_id=model_id
            )
    return int(made.version)


def promote(version: int, *, name: str | None = None) -> Promotion:
    """Move the alias `champion` to a version, but only if its evaluation passes the gate.

    `set_registered_model_alias` alone would move it to any version. One promotion runs at a time per model, on all
    machines of the platform. The version's files are signed, and must be those that its training run logged. The
    champion before it gets the alias `previous`. The decision and its reason are written to both versions.

    Args:
        version: The challenger's number.
        name: The registered model, by default the table's.

    Raises:
        RegistryError: There is no such version, or its run or the champion's has no evaluation.
        UntrustedModelError: The version's files are not those that its training run logged.
    """
    name, client = name or table.current().model, mlflow.MlflowClient()
    with mlflow_errors(), lock.exclusive(f"promotion/{name}") as held:
        champion = mend(name)
        challenger = client.get_model_version(name, str(version))
        outcome = judge(challenger, champion)
        if outcome.promoted:
            sign(challenger)
            move(challenger, champion, outcome.reason, held)
        elif outcome.over != outcome.version:
            note(challenger, outcome.reason)
    return outcome


def rollback(reason: str, *, name: str | None = None) -> Promotion:
    """Make the version before the champion the champion again, whatever the gate says, and record why.

    Args:
        reason: Why, in a few words.
        name: The registered model, by default the table's.

    Raises:
        RegistryError: There is no champion, or none before it.
        UntrustedModelError: The version's files are not those that were signed when it was promoted.
    """
    name = name or table.current().model
    with mlflow_errors(), lock.exclusive(f"promotion/{name}") as held:
        champion = mend(name)
        previous = before(champion) if champion else None
        if champion is None or previous is None or previous.version == champion.version:
            raise RegistryError(f"{name!r} has no champion before the present one; promote another version")
        with TemporaryDirectory() as folder:
            signing.fetch_verified(previous, Path(folder))
        text = f"rolled back from version {champion.version}: {reason}"
        move(previous, champion, text, held)
    return Promotion(True, int(previous.version), int(champion.version), text)


def decisions(*, name: str | None = None) -> pd.DataFrame:
    """List the decisions about all versions, oldest first; MLflow itself keeps no history of an alias.

    Returns:
        One row per decision: `time` (UTC), `version`, `event`.
    """
    name = name or table.current().model
    with mlflow_errors():
        versions = mlflow.MlflowClient().search_model_versions(f"name = '{name}'")
    rows = [
        (pd.Timestamp(key.removeprefix(HISTORY).strip()), int(entry.version), value)
        for entry in versions
        for key, value in entry.tags.items()
        if key.startswith(HISTORY)
    ]
    return pd.DataFrame(sorted(rows), columns=["time", "version", "event"])


def load_model(alias: str = CHAMPION, *, name: str | None = None, kinds: Mapping[str, str] | None = None) -> Pipeline:
    """Load the version that holds an alias; unlike `mlflow.sklearn.load_model`, verify its files before reading them.

    Args:
        alias: The alias.
        name: The registered model, by default the table's.
        kinds: The raw columns that the caller will send, and their kinds; by default those of the table.

    Returns:
        The fitted pipeline; `modeling.probabilities` applies it.

    Raises:
        RegistryError: There is no such model or alias, or its model takes other columns.
        UntrustedModelError: The files are not those that were signed when the version was promoted.
    """
    return load_version(require(alias, name=name), kinds=kinds)


def load_version(version: ModelVersion, *, kinds: Mapping[str, str] | None = None) -> Pipeline:
    """Load this version, whatever the alias says by now; its files are verified before one of them is read.

    Args:
        version: What `require` or MLflow's client gave.
        kinds: The raw columns that the caller will send, and their kinds; by default those of the table.

    Returns:
        The fitted pipeline; `modeling.probabilities` applies it.

    Raises:
        RegistryError: Its model takes other columns.
        UntrustedModelError: The files are not those that were signed when the version was promoted.
    """
    kinds = kinds or table.current().kinds
    with mlflow_errors(), TemporaryDirectory() as folder:
        files = signing.fetch_verified(version, Path(folder))
        _check_columns(Model.load(str(files)), kinds, label=signing.label(version))
        return signing.load(files)


def _check_columns(model: Model, kinds: Mapping[str, str], *, label: str) -> None:
    inputs = model.signature.inputs if model.signature else None
    found = {entry.name: entry.type for entry in inputs.inputs} if inputs and not inputs.is_tensor_spec() else {}
    asked = {name: TYPES[kind] for name, kind in kinds.items()}
    if list(found.items()) != list(asked.items()):
        listed = _listed(found) or "no named columns"
        raise RegistryError(f"{label} takes {listed}; asked for {_listed(asked)}; promote a version that takes these")


def _listed(types: Mapping[str, DataType]) -> str:
    return ", ".join(f"{name} {kind.name}" for name, kind in types.items())
