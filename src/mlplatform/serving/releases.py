"""How a new version comes to answer requests: in the shadow, for a share of users, for all; and back again.

The registry is the one record: aliases say which versions, a tag of the registered model says how. Every endpoint reads
both in one request, so all replicas follow.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import mlflow

from mlplatform import registry, table
from mlplatform.errors import DataError, RegistryError
from mlplatform.promotion.alias import Promotion, mlflow_errors, note, sign
from mlplatform.settings import CHAMPION

CHALLENGER = "challenger"
RELEASE_TAG = "release"
SHADOW = "shadow"
CANARY = "canary"


@dataclass(frozen=True)
class Release:
    """Which versions answer, and how.

    Attributes:
        champion: The version that answers; none if there is no such alias.
        challenger: The version that is being released; none if there is none.
        mode: `shadow`, `canary`, or empty.
        share: The share of users whom the challenger answers, from 0 to 1.
    """

    champion: int | None
    challenger: int | None = None
    mode: str = ""
    share: float = 0.0


def read(*, name: str | None = None) -> Release:
    """Read the record, in one request.

    Raises:
        ServiceDownError: The MLflow server does not answer.
    """
    name = name or table.current().model
    with mlflow_errors():
        found = mlflow.MlflowClient().search_registered_models(f"name = '{name}'")
    if not found:
        return Release(None)
    aliases = {alias: int(version) for alias, version in found[0].aliases.items()}
    mode, _, share = found[0].tags.get(RELEASE_TAG, "").partition(" ")
    if CHALLENGER not in aliases or mode not in {SHADOW, CANARY}:
        return Release(aliases.get(CHAMPION))
    return Release(aliases.get(CHAMPION), aliases[CHALLENGER], mode, float(share or 0))


def in_canary(user: str, share: float) -> bool:
    """Say whether the challenger answers a user: by a hash of the id, so that a user never flips while a share stands.

    A larger share keeps the users of a smaller one.
    """
    return int.from_bytes(hashlib.sha256(user.encode()).digest()[:8], "big") < share * 2**64


def shadow(version: int, *, name: str | None = None) -> Release:
    """Let a version answer every request beside the champion, whose answers alone are sent.

    Raises:
        RegistryError: There is no such version.
    """
    return _release(version, f"{SHADOW}", "answers in the shadow of the champion", name)


def canary(version: int, share: float, *, name: str | None = None) -> Release:
    """Let a version answer a share of the users.

    Raises:
        DataError: The share is not above 0 and at most 1.
        RegistryError: There is no such version.
    """
    if not 0 < share <= 1:
        raise DataError(f"a share of {share} is none; give a number above 0 and up to 1, such as 0.1")
    return _release(version, f"{CANARY} {share}", f"answers {share:.0%} of the users", name)


def _release(version: int, tag: str, event: str, name: str | None) -> Release:
    name, client = name or table.current().model, mlflow.MlflowClient()
    with mlflow_errors():
        entry = client.get_model_version(name, str(version))
        sign(entry)
        # How the version before answers must not hold for this one: a reader in between sees no release.
        model = client.get_registered_model(name)
        if RELEASE_TAG in model.tags and model.aliases.get(CHALLENGER) != str(version):
            client.delete_registered_model_tag(name, RELEASE_TAG)
        client.set_registered_model_alias(name, CHALLENGER, str(version))
        client.set_registered_model_tag(name, RELEASE_TAG, tag)
        note(entry, event)
    return read(name=name)


def end(*, name: str | None = None) -> None:
    """End a release; the champion answers everybody."""
    name, client = name or table.current().model, mlflow.MlflowClient()
    with mlflow_errors():
        if read(name=name).challenger is not None:
            client.delete_registered_model_tag(name, RELEASE_TAG)
            client.delete_registered_model_alias(name, CHALLENGER)


def promote(*, name: str | None = None) -> Promotion:
    """Make the version that is being released the champion, if the registry's gate lets it pass, and end the release.

    Raises:
        RegistryError: Nothing is being released.
    """
    name = name or table.current().model
    release = read(name=name)
    if release.challenger is None:
        raise RegistryError(f"nothing of {name!r} is being released; start with 'release shadow VERSION'")
    outcome = registry.promote(release.challenger, name=name)
    if outcome.promoted:
        end(name=name)
    return outcome


def roll_back(reason: str, *, name: str | None = None) -> int:
    """Give the alias back to the version that held it before, and end a release.

    Args:
        reason: Why, in a few words; the registry records it.
        name: The registered model, by default the table's.

    Returns:
        The version that answers now.

    Raises:
        RegistryError: No version held the alias before.
    """
    outcome = registry.rollback(reason, name=name)
    end(name=name)
    return outcome.version
