"""Feast's feature server with every endpoint closed but those that read.

`python -m mlplatform_ops.feast_servers.feature_server --port 6566`, in the feature repository, serves online
features over HTTP. Feast's own server also writes (`/push`, `/materialize`, ...) for anyone who reaches it; here a list
says what is open, so that an endpoint that a later release adds stays shut. With `FEATURE_SERVER_TOKEN` set, reading
asks for that token too. The server starts before there are features, and answers 503 until they are registered.
"""

from __future__ import annotations

import argparse
import hmac
import json
import os
import threading
import time
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
WAITING = "no features are registered yet; run 'make features'"


class ReadOnly:
    """Passes on requests that read and answers the rest itself, as an ASGI application.

    Args:
        find: Gives the application behind it, or none while there is no registry to serve from.
        token: What a request must carry as `Authorization: Bearer <token>`; empty for nothing. `/health` needs none.
    """

    def __init__(self, find: Callable[[], App | None], *, token: str = "") -> None:
        self._find = find
        self._expected = f"Bearer {token}".encode() if token else b""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or take note of the server's start and end."""
        if scope["type"] == "lifespan":
            await _live(receive, send)
        elif scope["type"] != "http" or (scope["method"], scope["path"]) not in OPEN:
            reads = ", ".join(" ".join(pair) for pair in sorted(OPEN))
            await answer(scope, send, 403, f"this feature server only reads: {reads}")
        elif (scope["method"], scope["path"]) == HEALTH:
            await answer(scope, send, 200, "serving" if self._find() else WAITING)
        elif not self._knows(scope):
            await answer(scope, send, 401, f'send the token: -H "Authorization: Bearer ${TOKEN_VARIABLE}"')
        elif (app := self._find()) is None:
            await answer(scope, send, 503, WAITING)
        else:
            await app(scope, receive, send)

    def _knows(self, scope: Scope) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        return not self._expected or hmac.compare_digest(given, self._expected)


class Source:
    """Opens the feature store as soon as there is a registry, and keeps what it knows of the registry fresh.

    Args:
        repo: The folder of `feature_store.yaml`.
        refresh_s: How often to look, in seconds.
    """

    def __init__(self, repo: Path, *, refresh_s: float = 2.0) -> None:
        # Takes seconds, so it is done before the server listens, and not when the first request waits.
        from feast.feature_server import get_app

        from mlplatform.features import open_store

        self._open: Callable[[], Any] = lambda: open_store(repo)
        self._get_app: Callable[[Any], App] = get_app
        self._refresh_s = refresh_s
        self._store: Any = None
        self._app: App | None = None

    def app(self) -> App | None:
        """Give Feast's application, or none while there is no registry."""
        return self._app

    def look(self) -> None:
        """Open the store or refresh it, once; a service that is down is tried again the next time."""
        try:
            if self._store is None:
                store = self._open()
                # Notes in MLflow's active run are for notebooks; a server has no run and need not load MLflow.
                store.config.mlflow.enabled = False
                self._app, self._store = self._get_app(store), store
            self._store.refresh_registry()
        except PlatformError as error:
            print(f"waiting: {error}", flush=True)

    def watch(self) -> None:
        """Look again and again."""
        while True:
            self.look()
            time.sleep(self._refresh_s)


async def _live(receive: Receive, send: Send) -> None:
    while (message := await receive())["type"] != "lifespan.shutdown":
        await send({"type": f"{message['type']}.complete"})
    await send({"type": "lifespan.shutdown.complete"})


async def answer(scope: Scope, send: Send, status: int, detail: str) -> None:
    """Send a small JSON document, or close a websocket."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008})
        return
    body = json.dumps({"detail": detail}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def main(arguments: list[str] | None = None) -> None:
    """Serve until told to stop."""
    import uvicorn

    parser = argparse.ArgumentParser(description="Serve online features over HTTP, read-only.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=6566, help="port to listen on (default: %(default)s)")
    parser.add_argument("--repo", type=Path, default=Path(), help="the feature repository (default: this folder)")
    options = parser.parse_args(arguments)
    source = Source(options.repo)
    source.look()
    threading.Thread(target=source.watch, daemon=True).start()
    app = ReadOnly(source.app, token=os.environ.get(TOKEN_VARIABLE, ""))
    uvicorn.run(app, host=options.host, port=options.port, access_log=False, log_level="warning")


if __name__ == "__main__":
    main()
