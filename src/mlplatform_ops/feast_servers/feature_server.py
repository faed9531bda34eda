"""Feast's feature server with every endpoint closed but those that read.

`python -m mlplatform_ops.feast_servers.feature_server --port 6566`, in the feature repository, serves online features
over HTTP, on a laptop and on a cluster. With `FEATURE_SERVER_TOKEN` set, reading asks for that token; while a token is
replaced, `FEATURE_SERVER_TOKEN_PREVIOUS` is accepted too. The server starts before there are features, and answers 503
until they are registered.
"""

from __future__ import annotations

import argparse
import hmac
import json
import os
import re
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from mlplatform.errors import RegistryError
from mlplatform_ops.feast_servers.gate import AllowList, read_body, replay

TOKEN_VARIABLES = ("FEATURE_SERVER_TOKEN", "FEATURE_SERVER_TOKEN_PREVIOUS")
REFUSAL = "this feature server only reads: GET /health, POST /get-online-features"
WAITING = "no features are registered yet; run 'make features'"
NOT_LOADED = "the features are not loaded yet; if this lasts, the server's log says why"
# Room for 25,000 user ids. Feast parses a body in the thread that serves everybody: 100 MB held it for a minute.
LIMIT_BYTES = 2**20
_NAME = re.compile(r"[^:]+:[^:]+")


class StoreWatcher:
    """Opens the feature store as soon as there is a registry, and reads the registry again every few seconds.

    Args:
        repo: The folder of `feature_store.yaml`.
        refresh_s: How often the registry is read, in seconds.

    Attributes:
        app: Feast's application, or none while there is no registry.
        join_keys: What entities are asked for by, such as `user_id`; known once there is an application.
        ready: Whether the server may get requests: the features are loaded, or there are none to load yet. A server
            that can't reach the store, or is refused by it, is not ready.
    """

    def __init__(self, repo: Path, *, refresh_s: float = 2.0) -> None:
        self.app: ASGIApp | None = None
        self.join_keys: frozenset[str] = frozenset()
        self.ready = False
        self._repo = repo
        self._refresh_s = refresh_s
        self._store: Any = None
        # By name, until the registry is read again: Feast takes 1.5 ms to make one of its message.
        self._services: dict[str, Any] = {}
        self._said = ""

    def look(self) -> None:
        """Open the store or read its registry again, once. What fails is tried again the next time."""
        try:
            # Feast takes seconds to import, and on a busy node a minute; the server listens meanwhile.
            from feast.feature_server import get_app

            from mlplatform.features import open_store

            if self._store is None:
                store = open_store(self._repo)
                # Feast notes retrievals in MLflow's active run; a server has none, and need not load MLflow.
                store.config.mlflow.enabled = False
                self._store = store
            self._store.refresh_registry()
            self._services.clear()
            self.join_keys = frozenset(entity.join_key for entity in self._store.list_entities(allow_cache=True))
            self.app = self.app or get_app(self._store)
            self.ready = True
        except Exception as error:
            # Whatever it is, the thread must go on: the next registry may be readable.
            self.ready = self.ready or isinstance(error, RegistryError)
            said = f"waiting: {type(error).__name__}: {error}"
            if said != self._said:
                print(said, flush=True)
            self._said = said

    def read_plain(self, question: Mapping[str, Any]) -> JSONResponse | None:
        """Answer a question about plain views as Feast does, byte for byte, without the layers before its store.

        Returns:
            The answer; `None` where Feast must give it, errors included.
        """
        from feast.feature_server_utils import convert_response_to_dict

        service, full_names = question.get("feature_service"), question.get("full_feature_names", False)
        known = {"entities", "features", "feature_service", "full_feature_names"}
        if not known.issuperset(question) or type(full_names) is not bool or not isinstance(service, str | None):
            return None
        try:
            store = self._store
            features = self._service(service) if service else question["features"]
            read = store._get_provider().online_store.read_plain
            found = read(store.config, features, question["entities"], store.registry, store.project, full_names)
            return JSONResponse(convert_response_to_dict(found.proto)) if found else None
        except Exception:
            # Feast then meets the same, and says so in its own words.
            return None

    def _service(self, name: str) -> Any:
        if name not in self._services:
            self._services[name] = self._store.get_feature_service(name, allow_cache=True)
        return self._services[name]

    def watch(self) -> None:
        """Look again and again."""
        while True:
            self.look()
            time.sleep(self._refresh_s)


class OnlineFeatures:
    """Passes a question on to Feast after it has checked token, size and form, as an ASGI application.

    Args:
        watcher: Gives Feast's application.
        tokens: What a request may carry as `Authorization: Bearer <token>`; without any, a request needs none.
    """

    def __init__(self, watcher: StoreWatcher, tokens: Sequence[str]) -> None:
        self._watcher = watcher
        self._expected = [f"Bearer {token}".encode() for token in tokens]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        request = Request(scope, receive)
        given = request.headers.get("authorization", "").encode("latin-1")
        if self._expected and not any(hmac.compare_digest(given, expected) for expected in self._expected):
            raise HTTPException(401, f'send the token: -H "Authorization: Bearer ${TOKEN_VARIABLES[0]}"')
        if self._watcher.app is None:
            raise HTTPException(503, WAITING if self._watcher.ready else NOT_LOADED)
        body = await read_body(request, limit_bytes=LIMIT_BYTES)
        try:
            question = json.loads(body)
            problem = problem_of(question, self._watcher.join_keys)
        except (ValueError, RecursionError):
            problem = "the body is not JSON"
        if problem:
            raise HTTPException(422, problem)
        # Redis is asked in a thread, so that one that hangs keeps nobody else waiting.
        if answer := await run_in_threadpool(self._watcher.read_plain, question):
            await answer(scope, receive, send)
            return
        await self._watcher.app(scope, replay(body, receive), send)


def problem_of(question: object, join_keys: frozenset[str]) -> str:
    """Say what is wrong with a question that Feast would answer with a server error.

    Args:
        question: The body, parsed from JSON.
        join_keys: What entities are asked for by.

    Returns:
        The problem in a few words; empty when there is none.
    """
    if not isinstance(question, Mapping):
        return "the body is not a JSON object"
    if not _is_unicode(question):
        return "the body holds half of a surrogate pair, which is not a character"
    entities, features = question.get("entities"), question.get("features")
    if not isinstance(entities, Mapping) or not entities:
        return 'entities is not an object of lists, such as {"user_id": ["..."]}'
    for name, values in entities.items():
        if not isinstance(values, list) or not values:
            return f"entities.{name} is not a list with a value in it"
        if not all(isinstance(value, str | int) and not isinstance(value, bool) for value in values):
            return f"entities.{name} holds a value that is neither text nor a whole number"
    if len({len(values) for values in entities.values()}) > 1:
        return "the lists in entities are not equally long"
    if join_keys.isdisjoint(entities):
        return f"entities names none of: {', '.join(sorted(join_keys))}"
    if not question.get("feature_service"):
        if not isinstance(features, list) or not features:
            return "name a feature_service, or features as view:feature"
        if unclear := [name for name in features if not isinstance(name, str) or not _NAME.fullmatch(name)]:
            return f"features holds {unclear[0]!r}, which is not view:feature"
    return ""


def _is_unicode(value: object) -> bool:
    """Say whether every text in a JSON value can be written as UTF-8."""
    if isinstance(value, Mapping):
        return all(_is_unicode(part) for pair in value.items() for part in pair)
    if isinstance(value, list):
        return all(_is_unicode(part) for part in value)
    return not isinstance(value, str) or not any("\ud800" <= sign <= "\udfff" for sign in value)


def create_app(watcher: StoreWatcher, tokens: Sequence[str] = ()) -> AllowList:
    """Make the server's application.

    Args:
        watcher: Gives Feast's application.
        tokens: As in `OnlineFeatures`.
    """

    def health(_: Request) -> JSONResponse:
        detail = "serving" if watcher.app else WAITING if watcher.ready else NOT_LOADED
        return JSONResponse({"detail": detail}, 200 if watcher.ready else 503)

    routes = [
        Route("/health", health, methods=["GET"]),
        Route("/get-online-features", OnlineFeatures(watcher, tokens), methods=["POST"]),
    ]
    return AllowList(routes, refusal=REFUSAL)


def tokens_of(environ: Mapping[str, str]) -> list[str]:
    """List the tokens that a request may carry: two while one is being replaced."""
    return [environ[name] for name in TOKEN_VARIABLES if environ.get(name)]


def main(arguments: list[str] | None = None) -> None:
    """Serve until told to stop."""
    import uvicorn

    parser = argparse.ArgumentParser(description="Serve online features over HTTP, read-only.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=6566, help="port to listen on (default: %(default)s)")
    parser.add_argument("--repo", type=Path, default=Path(), help="the feature repository (default: this folder)")
    options = parser.parse_args(arguments)
    tokens = tokens_of(os.environ)
    if not tokens and options.host not in {"127.0.0.1", "::1", "localhost"}:
        sys.exit(f"error: anyone who reaches {options.host} could read; set {TOKEN_VARIABLES[0]}")
    watcher = StoreWatcher(options.repo)
    threading.Thread(target=watcher.watch, daemon=True).start()
    app = create_app(watcher, tokens)
    uvicorn.run(app, host=options.host, port=options.port, access_log=False, log_level="warning")


if __name__ == "__main__":
    main()
