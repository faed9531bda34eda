"""Files that servers read, in the form that laptop and cluster share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Identity:
    """Somebody whom the object store knows.

    Attributes:
        name: A name, for the store's log.
        keys: Pairs of access key and secret key; two pairs while one is being replaced.
        actions: What it may do: `Admin` for everything, or such as `Read:bucket`.
    """

    name: str
    keys: Sequence[tuple[str, str]]
    actions: Sequence[str] = ("Admin",)


def object_store_identities(*identities: Identity) -> str:
    """Write the file that names the object store's identities, for SeaweedFS's option `-s3.config`."""
    entries = [
        {
            "name": identity.name,
            "credentials": [{"accessKey": access, "secretKey": secret} for access, secret in identity.keys],
            "actions": list(identity.actions),
        }
        for identity in identities
    ]
    return json.dumps({"identities": entries}, indent=2) + "\n"


def mlflow_auth(*, username: str, password: str, database_uri: str, default_permission: str = "READ") -> str:
    """Write the file that configures MLflow's basic authentication, which `MLFLOW_AUTH_CONFIG_PATH` names.

    Args:
        username: The admin's name.
        password: The admin's password.
        database_uri: The database of users, as SQLAlchemy reads it.
        default_permission: What a user may do with whatever nobody has given them.
    """
    # An ini file doubles each %.
    username, password, database_uri = (text.replace("%", "%%") for text in (username, password, database_uri))
    # Without the cache every request pays for a password hash, a fifth of a second.
    return (
        f"[mlflow]\ndefault_permission = {default_permission}\ndatabase_uri = {database_uri}\n"
        f"admin_username = {username}\nadmin_password = {password}\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
        "auth_cache_ttl_seconds = 300\n"
    )
