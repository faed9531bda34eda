"""Read online features over HTTP from the feature server, without Feast: only requests and pandas."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from mlplatform import table
from mlplatform.errors import CredentialsError, DataError, RegistryError, ServiceDownError

__getattr__ = table.names(__name__, SERVICE=lambda described: described.service)

FOUND = "found"
NEXT_STEP = "run 'make features'"

# A dropped forward to a cluster is back within seconds, and one that is about to drop may take a request once more.
_RETRIES = Retry(4, read=2, backoff_factor=0.5, allowed_methods=None)


def read_server(
    users: Sequence[str],
    features: str | Sequence[str] | None = None,
    *,
    environ: Mapping[str, str] = os.environ,
    timeout_s: float = 10.0,
) -> pd.DataFrame:
    """Send the request of the `curl` that notebook 6 shows, and arrange the answer as `features.read_online` does.

    Args:
        users: User ids.
        features: The name of a feature service, by default the model's, or `view:feature` for each feature.
        environ: Variables by name: `FEATURE_SERVER_URL`, and `FEATURE_SERVER_TOKEN` if the server wants one.
        timeout_s: How long the server may take, in seconds; a connection that breaks is tried again, within 7 s.

    Returns:
        As `read_online`.

    Raises:
        DataError: As in `read_online`.
        RegistryError: The server knows no such service, view or feature.
        CredentialsError: The server wants another token.
        ServiceDownError: The server does not answer, or fails.
    """
    url, key = environ["FEATURE_SERVER_URL"], table.current().entity.key
    features = features or table.current().service
    asked = {"feature_service": features} if isinstance(features, str) else {"features": list(features)}
    token = environ.get("FEATURE_SERVER_TOKEN")
    try:
        with requests.Session() as session:
            session.mount(url, HTTPAdapter(max_retries=_RETRIES))
            reply = session.post(
                f"{url}/get-online-features",
                json={**asked, "entities": {key: list(checked_users(users))}},
                headers={"Authorization": f"Bearer {token}"} if token else {},
                timeout=timeout_s,
            )
    except requests.RequestException as error:
        raise ServiceDownError(f"the feature server at {url} does not answer; run 'make serve'") from error
    if reply.status_code == 401:
        raise CredentialsError(f"the feature server at {url} refuses the token; check FEATURE_SERVER_TOKEN")
    if not reply.ok:
        reason = " ".join(reply.text.split())[:200]
        kind = RegistryError if reply.status_code in {404, 422} or "not found" in reason else ServiceDownError
        raise kind(
            f"the feature server at {url} answers {reply.status_code} ({reason}); check the names, or {NEXT_STEP}"
        )
    answer = reply.json()
    named = dict(zip(answer["metadata"]["feature_names"], answer["results"], strict=True))
    named.pop(key, None)
    return online_frame(
        users,
        {name: column["values"] for name, column in named.items()},
        [[not moment.startswith("1970-01-01") for moment in column["event_timestamps"]] for column in named.values()],
    )


def require_found(online: pd.DataFrame) -> pd.DataFrame:
    """Return what `read_online` or `read_server` returned, but only if every user was found.

    Returns:
        The frame without its `found` column.

    Raises:
        RegistryError: A user is unknown to the online store; the message names the first ones.
    """
    unknown = online.loc[~online[FOUND], table.current().entity.key].tolist()
    if unknown:
        names = ", ".join(unknown[:3]) + (f" and {len(unknown) - 3} more" if len(unknown) > 3 else "")
        raise RegistryError(f"the online store knows nothing of user {names}; check the id, or {NEXT_STEP}")
    return online.drop(columns=FOUND)


def online_frame(
    users: Sequence[str], columns: Mapping[str, Sequence[Any]], stored: Sequence[Sequence[bool]]
) -> pd.DataFrame:
    """Arrange an online answer as a frame: user, `found`, and the features in our order."""
    found = [all(flags) for flags in zip(*stored, strict=True)]
    # Feast gives the features in an order that differs from call to call.
    known = list(table.current().features.values())
    order = sorted(columns, key=lambda name: known.index(name) if name in known else -1)
    return pd.DataFrame(
        {table.current().entity.key: list(users), FOUND: found, **{name: columns[name] for name in order}}
    )


def checked_users(users: Sequence[str]) -> Sequence[str]:
    """Refuse an empty list of users, and ids that are not text.

    Raises:
        DataError: The list is empty, or an id is not text, or no text that can be written.
    """
    if len(users) == 0:
        raise DataError(f"no user was asked about; give at least one {table.current().entity.key}")
    wrong = [user for user in users if not isinstance(user, str)]
    if wrong:
        raise DataError(f"user ids are text, and {wrong[0]!r} is not; convert them with str")
    if broken := [user for user in users if any("\ud800" <= sign <= "\udfff" for sign in user)]:
        raise DataError(f"the user id {broken[0]!r} holds half of a surrogate pair, which is no character; correct it")
    return users
