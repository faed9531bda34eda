"""Ask the endpoint that serves the champion, with nothing but requests."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import requests

from mlplatform import table
from mlplatform.errors import CredentialsError, DataError, ServiceDownError

URL_VARIABLE = "MODEL_ENDPOINT_URL"
TOKEN_VARIABLE = "MODEL_ENDPOINT_TOKEN"  # noqa: S105 - the variable's name


def predict(people: pd.DataFrame, *, environ: Mapping[str, str] = os.environ, timeout_s: float = 10.0) -> pd.DataFrame:
    """Ask for people by their raw columns.

    Args:
        people: The described columns among any others.
        environ: Where `MODEL_ENDPOINT_URL` and, if the endpoint wants one, `MODEL_ENDPOINT_TOKEN` are looked up.
        timeout_s: How long the endpoint may take, in seconds.

    Returns:
        One row per person, in the order asked: `score`, `reason`, `model_version`.

    Raises:
        DataError: A column is missing, or the endpoint refuses a value.
        CredentialsError: The endpoint wants another token.
        ServiceDownError: The endpoint does not answer, or has no model yet.
    """
    columns = list(table.current().columns)
    missing = [column for column in columns if column not in people.columns]
    if missing:
        raise DataError(f"the rows lack {', '.join(missing)}; give the columns {', '.join(columns)}")
    asked = people[columns].to_dict("records")
    return pd.DataFrame(_ask("predict", {"people": asked}, environ, timeout_s)["predictions"])


def predict_users(
    users: Sequence[str], *, environ: Mapping[str, str] = os.environ, timeout_s: float = 10.0
) -> pd.DataFrame:
    """Ask for users by their online features.

    Args:
        users: User ids.
        environ: As in `predict`.
        timeout_s: As in `predict`.

    Returns:
        One row per user, in the order asked: the key, `score`, which is null for a user who is not known, `reason`,
        `model_version`.

    Raises:
        DataError: No user was asked about, or an id is no text.
        CredentialsError: As in `predict`.
        ServiceDownError: As in `predict`.
    """
    frame = pd.DataFrame(_ask("predict_users", {"users": list(users)}, environ, timeout_s)["predictions"])
    frame.insert(0, table.current().entity.key, list(users))
    return frame


def readiness(environ: Mapping[str, str] = os.environ, *, timeout_s: float = 10.0) -> str:
    """Say whether the endpoint is ready, and why it is not, in its own words.

    Raises:
        ServiceDownError: The endpoint does not answer.
    """
    url = _address(environ)
    try:
        return str(requests.get(f"{url}/readyz", timeout=timeout_s).json()["detail"])
    except (requests.RequestException, KeyError) as error:
        raise ServiceDownError(_down(url)) from error


def _ask(path: str, body: dict[str, Any], environ: Mapping[str, str], timeout_s: float) -> dict[str, Any]:
    url, token = _address(environ), environ.get(TOKEN_VARIABLE)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        reply = requests.post(f"{url}/{path}", json=body, headers=headers, timeout=timeout_s)
    except requests.RequestException as error:
        raise ServiceDownError(_down(url)) from error
    if reply.status_code == 401:
        raise CredentialsError(f"the endpoint at {url} refuses the token; check {TOKEN_VARIABLE}")
    if not reply.ok:
        reason = " ".join(reply.text.split())[:300]
        kind = DataError if reply.status_code < 500 else ServiceDownError
        raise kind(f"the endpoint at {url} answers {reply.status_code} ({reason}); correct it, or see its log")
    answer: dict[str, Any] = reply.json()
    return answer


def _address(environ: Mapping[str, str]) -> str:
    if not environ.get(URL_VARIABLE):
        raise ServiceDownError(f"{URL_VARIABLE} names no endpoint; run 'make serve-model'")
    return environ[URL_VARIABLE]


def _down(url: str) -> str:
    return f"the endpoint at {url} does not answer; run 'make serve-model'"
