"""Feast's feature server with every endpoint closed but those that read.

`python -m mlplatform.feature_server --port 6566`, in the feature repository, serves online features over HTTP. Feast's
own server also writes (`/push`, `/materialize`, ...) for anyone who reaches it; here a list says what is open, so that
an endpoint that a later release adds stays shut. With `FEATURE_SERVER_TOKEN` set, reading asks for that token too.
"""

from __future__ import annotations

import argparse
import hmac
import json
import os
import sys
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

from mlplatform.errors import PlatformError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

HEALTH = ("GET", "/health")
OPEN = frozenset({HEALTH, ("POST", "/get-online-features")})
TOKEN_VARIABLE = "FEATURE_SERVER_TOKEN"  # noqa: S105 - the variable's name


class ReadOnly:
    """Passes on requests that read and refuses the rest, as an ASGI application.

    Args:
        app: The application behind it.
        token: What a request must carry as `Authorization: Bearer <token>`; empty for nothing. `/health` needs none.
    """

    def __init__(self, app: App, *, token: str = "") -> None:
        self._app = app
        self._expected = f"Bearer {token}".encode() if token else b""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or pass on the start and the end of the server."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        asked = (scope.get("method"), scope["path"])
        if scope["type"] != "http" or asked not in OPEN:
            reads = ", ".join(" ".join(pair) for pair in sorted(OPEN))
            await _refuse(scope, send, 403, f"this feature server only reads: {reads}")
        elif asked != HEALTH and not self._knows(scope):
            await _refuse(scope, send, 401, f'send the token: -H "Authorization: Bearer ${TOKEN_VARIABLE}"')
        else:
            await self._app(scope, receive, send)

    def _knows(self, scope: Scope) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        return not self._expected or hmac.compare_digest(given, self._expected)


async def _refuse(scope: Scope, send: Send, status: int, detail: str) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    body = json.dumps({"detail": detail}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def create_app(repo: Path | None = None, *, token: str = "") -> ReadOnly:
    """Make the server for a feature repository.

    Args:
        repo: The folder of `feature_store.yaml`, by default that of the clone around the working directory.
        token: As in `ReadOnly`.

    Raises:
        RegistryError: There is no registry yet.
        ServiceDownError: The object store does not answer.
    """
    from feast.feature_server import get_app

    from mlplatform.features import open_store

    store = open_store(repo)
    # Notes in MLflow's active run are for notebooks; a server has no run, and need not load MLflow.
    store.config.mlflow.enabled = False
    return ReadOnly(get_app(store), token=token)


def main(arguments: list[str] | None = None) -> None:
    """Serve until told to stop."""
    import uvicorn

    parser = argparse.ArgumentParser(description="Serve online features over HTTP, read-only.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=6566, help="port to listen on (default: %(default)s)")
    parser.add_argument("--repo", type=Path, default=Path(), help="the feature repository (default: this folder)")
    options = parser.parse_args(arguments)
    try:
        app = create_app(options.repo, token=os.environ.get(TOKEN_VARIABLE, ""))
    except PlatformError as error:
        sys.exit(f"error: {error}")
    uvicorn.run(app, host=options.host, port=options.port, access_log=False, log_level="warning")


if __name__ == "__main__":
    main()
