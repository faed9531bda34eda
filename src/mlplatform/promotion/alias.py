"""How the alias `champion` moves: the gate judges, both versions record it, and what a dying process left is mended."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime

import mlflow
import requests
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from mlplatform import table
from mlplatform.errors import MissingObjectError, RegistryError, ServiceDownError, credentials_refused, service_down
from mlplatform.promotion import gate, lock, signing
from mlplatform.settings import CHAMPION

PREVIOUS = "previous"
HISTORY = "history"  # a tag with this prefix holds one decision about its version, and its time
TEST_DATA = "test_data"
RECORDED = "champion"  # on the registered model: the version that took the alias last, by promotion or roll-back
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


def find(alias: str, *, name: str | None = None) -> ModelVersion | None:
    """Find the version that holds an alias; unlike `get_model_version_by_alias`, give `None` if there is none."""
    name, client = name or table.current().model, mlflow.MlflowClient()
    with mlflow_errors():
        models = client.search_registered_models(f"name = '{name}'")
        version = models[0].aliases.get(alias) if models else None
        return None if version is None else client.get_model_version(name, version)


def require(alias: str = CHAMPION, *, name: str | None = None) -> ModelVersion:
    """Find the version that holds an alias; unlike `find`, say what to run if there is none.

    An alias can move at any time. Who needs to know which version was loaded calls this once, and `load_version` with
    what it gave.

    Args:
        alias: The alias.
        name: The registered model, by default the table's.

    Raises:
        RegistryError: There is no such model or alias.
    """
    name = name or table.current().model
    version = find(alias, name=name)
    if version is None:
        raise RegistryError(f"no alias {alias!r} on {name!r}; run notebook 04_register_model, or 'make run'")
    return version


def sign(version: ModelVersion) -> None:
    """Sign a version, so that it can be loaded: a promotion and a release do it.

    Raises:
        UntrustedModelError: The version's files are not those that its training run logged.
    """
    client = mlflow.MlflowClient()
    client.set_model_version_tag(version.name, version.version, signing.TAG, signing.sign_version(version))


def move(version: ModelVersion, before: ModelVersion | None, reason: str, held: lock.Lock) -> None:
    """Move the alias, written down first, so that `mend` can finish or undo what a dying process began."""
    client, over = mlflow.MlflowClient(), before.version if before else None
    pending = json.dumps({"over": over, "reason": reason})
    client.set_model_version_tag(version.name, version.version, PENDING, pending)
    held.renew()
    client.set_registered_model_alias(version.name, CHAMPION, version.version)
    champion = mend(version.name)
    if champion is None or champion.version != version.version:
        raise RegistryError(
            f"{signing.label(version)} became champion, and another process moved the alias; promote again"
        )


def mend(name: str) -> ModelVersion | None:
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
            note(version, f"interrupted before the alias moved: {begun['reason']}")
        else:
            if begun["over"] is not None:
                client.set_registered_model_alias(name, PREVIOUS, begun["over"])
                note(client.get_model_version(name, begun["over"]), f"replaced by version {version.version}")
            note(version, begun["reason"])
            client.set_registered_model_tag(name, RECORDED, version.version)
        client.delete_model_version_tag(name, version.version, PENDING)
    return champion


def before(champion: ModelVersion) -> ModelVersion | None:
    """Find the version that served before: the one promoted last, if somebody moved the alias by hand."""
    client = mlflow.MlflowClient()
    recorded = client.get_registered_model(champion.name).tags.get(RECORDED, champion.version)
    if recorded != champion.version:
        return client.get_model_version(champion.name, recorded)
    return find(PREVIOUS, name=champion.name)


def ask_gate(version: int, *, name: str | None = None) -> Promotion:
    """Ask the gate about a version and record its answer; the alias stays, since a release comes next.

    Args:
        version: The challenger's number.
        name: The registered model, by default the table's.

    Returns:
        What a promotion would decide now.

    Raises:
        RegistryError: There is no such version, or its run or the champion's has no evaluation.
    """
    name = name or table.current().model
    with mlflow_errors(), lock.exclusive(f"promotion/{name}"):
        challenger = mlflow.MlflowClient().get_model_version(name, str(version))
        outcome = judge(challenger, mend(name), passed="passes the gate")
        note(challenger, outcome.reason)
    return outcome


def judge(challenger: ModelVersion, champion: ModelVersion | None, *, passed: str = "promoted") -> Promotion:
    """Decide by the evaluations of the two versions' runs, both on the same test rows."""
    version, holder = int(challenger.version), int(champion.version) if champion else None
    if holder == version:
        return Promotion(False, version, holder, f"version {version} is the champion already")
    if champion is None:
        rival = None
    elif challenger.tags.get(TEST_DATA) == champion.tags.get(TEST_DATA):
        rival = gate.read(str(champion.run_id))
    elif (rival := gate.read_champion(str(challenger.run_id), str(champion.run_id))) is None:
        reason = f"not promoted: tested on other rows than champion {holder}, so the scores cannot be compared"
        return Promotion(False, version, holder, reason)
    broken, figures = gate.check(gate.read(str(challenger.run_id)), rival)
    against = f"against champion {holder}" if champion else "there was no champion"
    if broken:
        return Promotion(False, version, holder, f"not promoted, {against}: {'; '.join(broken)}")
    return Promotion(True, version, holder, f"{passed}, {against}: {figures}")


def note(version: ModelVersion, text: str) -> None:
    """Write a decision to a version, unless the last one written there says the same."""
    events = sorted((key, value) for key, value in version.tags.items() if key.startswith(HISTORY))
    if not events or events[-1][1] != text:
        key = f"{HISTORY} {datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%fZ}"
        mlflow.MlflowClient().set_model_version_tag(version.name, version.version, key, text)


@contextmanager
def mlflow_errors() -> Iterator[None]:
    """Turn MLflow's errors into ours; those that mean nothing here pass unchanged."""
    try:
        yield
    except MlflowException as error:
        reason = " ".join(str(error.message).split())[:200]
        status = error.get_http_status_code()  # type: ignore[no-untyped-call]
        if status in {401, 403}:
            raise credentials_refused("MLflow server", mlflow.get_tracking_uri(), "MLFLOW_TRACKING_USERNAME") from error
        if "(sqlite3.DatabaseError)" in reason:  # the database is damaged; a locked one has another name
            raise ServiceDownError(
                f"the MLflow server at {mlflow.get_tracking_uri()} cannot read its database; run 'make up', which says "
                "what to do"
            ) from error
        if error.error_code in {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"}:
            said = reason.removeprefix(f"{error.error_code}: ")
            raise RegistryError(f"{said}; correct it, or run notebook 02_train_models") from error
        if "Max retries exceeded" in reason or status in {502, 503, 504}:
            raise service_down("MLflow server", mlflow.get_tracking_uri()) from error
        raise
    except requests.RequestException as error:
        # Artifacts pass through MLflow's server, whose client does not translate what is said about them.
        if error.response is None or error.response.status_code != 404:
            raise service_down("MLflow server", mlflow.get_tracking_uri()) from error
        raise MissingObjectError(
            f"the object store has not got what the MLflow server at {mlflow.get_tracking_uri()} keeps there; "
            "run 'make up', then put a backup back, or train again"
        ) from error
