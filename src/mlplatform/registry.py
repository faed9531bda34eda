"""The model registry's rules: which run is best, when a model becomes the champion, how a champion is loaded.

MLflow knows which version an alias points to and not which ones it pointed to before. So each decision is written as
a tag on the version that it concerns.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

import mlflow
import pandas as pd
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models import Model
from mlflow.types import DataType
from sklearn.pipeline import Pipeline

from mlplatform.errors import CredentialsError, RegistryError, ServiceDownError
from mlplatform.income import COLUMNS
from mlplatform.modeling import SCORES
from mlplatform.promotion import gate, lock, signing
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
HISTORY = "history"  # a tag with this prefix holds one decision about its version, and its time
TEST_DATA = "test_data"
PENDING = "promotion_pending"  # on a version while the aliases move; one that is left over tells of a process that died


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
        model_id = models[0].model_id
        # The address holds a digest of the test rows, so equal addresses are equal rows.
        tested_on = ",".join(data.uri for data in data_sets(run) if data.context == "testing")
        tags = {TEST_DATA: tested_on, "run_name": run.info.run_name}
        with lock.exclusive(f"promotion/{name}"):
            present = client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'")
            if present:
                return int(present[0].version)
            if not client.search_registered_models(f"name = '{name}'"):
                client.create_registered_model(name, description=DESCRIPTION)
            made = client.create_model_version(
                name, model_uri(model_id), run_id, tags=tags, await_creation_for=0, model_id=model_id
            )
    return int(made.version)


def promote(version: int, *, name: str = MODEL_NAME) -> Promotion:
    """Move the alias `champion` to a version, but only if its evaluation passes the gate.

    `set_registered_model_alias` alone would move it to any version. One promotion runs at a time per model, on all
    machines of the platform. The version's files are signed, and must be those that its training run logged. The
    champion before it gets the alias `previous`. The decision and its reason are written to both versions.

    Args:
        version: The challenger's number.
        name: The registered model.

    Raises:
        RegistryError: There is no such version, or its run or the champion's has no evaluation.
        UntrustedModelError: The version's files are not those that its training run logged.
    """
    client = mlflow.MlflowClient()
    with _mlflow_errors(), lock.exclusive(f"promotion/{name}") as held:
        champion = _mend(name)
        challenger = client.get_model_version(name, str(version))
        outcome = _judge(challenger, champion)
        if outcome.promoted:
            sign(version, name=name)
            _move(challenger, champion, outcome.reason, held)
        elif outcome.over != outcome.version:
            _note(challenger, outcome.reason)
    return outcome


def sign(version: int, *, name: str = MODEL_NAME) -> None:
    """Sign a version, so that it can be loaded: `promote` and a release do it.

    Raises:
        RegistryError: There is no such version.
        UntrustedModelError: The version's files are not those that its training run logged.
    """
    client = mlflow.MlflowClient()
    with _mlflow_errors():
        signature = signing.sign_version(client.get_model_version(name, str(version)))
        client.set_model_version_tag(name, str(version), signing.TAG, signature)


def rollback(reason: str, *, name: str = MODEL_NAME) -> Promotion:
    """Make the version before the champion the champion again, whatever the gate says, and record why.

    Args:
        reason: Why, in a few words.
        name: The registered model.

    Raises:
        RegistryError: There is no champion, or none before it.
        UntrustedModelError: The version's files are not those that were signed when it was promoted.
    """
    with _mlflow_errors(), lock.exclusive(f"promotion/{name}") as held:
        champion, previous = _mend(name), find(PREVIOUS, name=name)
        if champion is None or previous is None or previous.version == champion.version:
            raise RegistryError(f"{name!r} has no champion before the present one; promote another version")
        with TemporaryDirectory() as folder:
            signing.fetch_verified(previous, Path(folder))
        text = f"rolled back from version {champion.version}: {reason}"
        _move(previous, champion, text, held)
    return Promotion(True, int(previous.version), int(champion.version), text)


def _move(version: ModelVersion, before: ModelVersion | None, reason: str, held: lock.Lock) -> None:
    """Move the alias, written down first, so that `_mend` can finish or undo what a dying process began."""
    client, over = mlflow.MlflowClient(), before.version if before else None
    pending = json.dumps({"over": over, "reason": reason})
    client.set_model_version_tag(version.name, version.version, PENDING, pending)
    held.renew()
    client.set_registered_model_alias(version.name, CHAMPION, version.version)
    champion = _mend(version.name)
    if champion is None or champion.version != version.version:
        raise RegistryError(
            f"{signing.label(version)} became champion, and another process moved the alias; promote again"
        )


def _mend(name: str) -> ModelVersion | None:
    """Finish every promotion that was begun: record one whose alias has moved, and give up one whose has not.

    Returns:
        The champion, as it is read after that.
    """
    client, champion = mlflow.MlflowClient(), find(CHAMPION, name=name)
    for version in client.search_model_versions(f"name = '{name}'"):
        if PENDING not in version.tags:
            continue
        begun = json.loads(version.tags[PENDING])
        if champion is None or champion.version != version.version:
            _note(version, f"interrupted before the alias moved: {begun['reason']}")
        else:
            if begun["over"] is not None:
                client.set_registered_model_alias(name, PREVIOUS, begun["over"])
                _note(client.get_model_version(name, begun["over"]), f"replaced by version {version.version}")
            _note(version, begun["reason"])
        client.delete_model_version_tag(name, version.version, PENDING)
    return champion


def _judge(challenger: ModelVersion, champion: ModelVersion | None) -> Promotion:
    """Decide by the test rows that the two versions name and by the evaluations of their runs."""
    version, holder = int(challenger.version), int(champion.version) if champion else None
    if holder == version:
        return Promotion(False, version, holder, f"version {version} is the champion already")
    if champion is not None and challenger.tags.get(TEST_DATA) != champion.tags.get(TEST_DATA):
        reason = f"not promoted: tested on other rows than champion {holder}, so the scores cannot be compared"
        return Promotion(False, version, holder, reason)
    before = gate.read(str(champion.run_id)) if champion else None
    broken, figures = gate.check(gate.read(str(challenger.run_id)), before)
    against = f"against champion {holder}" if champion else "there was no champion"
    if broken:
        return Promotion(False, version, holder, f"not promoted, {against}: {'; '.join(broken)}")
    return Promotion(True, version, holder, f"promoted, {against}: {figures}")


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
    """Load the version that holds an alias; unlike `mlflow.sklearn.load_model`, verify its files before reading them.

    Args:
        alias: The alias.
        name: The registered model.
        columns: The raw columns that the caller will send, each text.

    Returns:
        The fitted pipeline; `modeling.probabilities` applies it.

    Raises:
        RegistryError: There is no such model or alias, or its model takes other columns.
        UntrustedModelError: The files are not those that were signed when the version was promoted.
    """
    version = find(alias, name=name)
    if version is None:
        raise RegistryError(f"no alias {alias!r} on {name!r}; run notebook 04_register_model, or 'make run'")
    with TemporaryDirectory() as folder:
        files = fetch_verified(version, Path(folder))
        _check_columns(Model.load(str(files)), columns, label=signing.label(version))
        return signing.load(files)


def fetch_verified(version: ModelVersion, into: Path) -> Path:
    """Download a version's files into a folder and verify them; `signing.load` loads what this returns.

    Args:
        version: The registered version, as `find` gives it.
        into: An existing folder that nobody else can write to.

    Raises:
        UntrustedModelError: The files are not those that were signed when the version was promoted.
    """
    with _mlflow_errors():
        return signing.fetch_verified(version, into)


def _check_columns(model: Model, columns: Sequence[str], *, label: str) -> None:
    inputs = model.signature.inputs if model.signature else None
    found = {entry.name: entry.type for entry in inputs.inputs} if inputs and not inputs.is_tensor_spec() else {}
    if list(found) != list(columns) or set(found.values()) != {DataType.string}:
        listed = ", ".join(f"{name} {kind.name}" for name, kind in found.items()) or "no named columns"
        raise RegistryError(
            f"{label} takes {listed}; asked for {', '.join(columns)} as text; promote a version that takes these"
        )


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
