"""What stands in front of the service: a list of what is open, the token, the media type and the size of a body."""

from __future__ import annotations

import hmac
import json
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from mlplatform.serving.model_client import TOKEN_VARIABLE
from mlplatform_serving import metrics

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN = frozenset({"/healthz", "/docs.json"})
GUARDED = frozenset({"/predict", "/predict_users"})
METRICS = "/metrics"
READY = "/readyz"
LIMIT_BYTES = 1_000_000


class Gate:
    """Passes on what is open and well-formed, and answers the rest itself, as an ASGI application.

    BentoML's own start page loads a tag manager from elsewhere, and it parses media types other than JSON; neither is
    reached.

    Args:
        app: BentoML's application.
        problem: Says why no model answers yet; empty when one does.
        tokens: What a request for a prediction carries one of, as `Authorization: Bearer <token>`; empty for nothing.
    """

    def __init__(self, app: App, problem: Callable[[], str], *, tokens: Sequence[str] = ()) -> None:
        self._app = app
        self._problem = problem
        self._expected = [f"Bearer {token}".encode() for token in tokens]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or pass on the server's start and end."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        elif scope["path"] in GUARDED and scope["method"] == "POST":
            await self._guarded(scope, receive, send)
        elif scope["path"] in OPEN and scope["method"] == "GET":
            await self._app(scope, receive, send)
        elif scope["path"] == METRICS and scope["method"] == "GET":
            await answer(send, 200, metrics.page(), b"text/plain; version=0.0.4; charset=utf-8")
        elif scope["path"] == READY and scope["method"] == "GET":
            problem = self._problem()
            await explain(send, 503 if problem else 200, problem or "ready")
        else:
            known = ", ".join(sorted(GUARDED))
            await explain(send, 404, f"there is no {scope['method']} {scope['path']}; POST to {known}, see /docs.json")

    async def _guarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        started, status = time.perf_counter(), 500

        async def counted(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self._check(scope, receive, counted)
        finally:
            metrics.REQUESTS.labels(scope["path"], str(status)).inc()
            metrics.SECONDS.labels(scope["path"]).observe(time.perf_counter() - started)

    async def _check(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        given = headers.get(b"authorization", b"")
        if self._expected and not any(hmac.compare_digest(given, expected) for expected in self._expected):
            await explain(send, 401, f'send the token: -H "Authorization: Bearer ${TOKEN_VARIABLE}"')
            return
        # A parser chosen by the media type is how a request gets itself unpickled.
        if headers.get(b"content-type", b"").partition(b";")[0].strip().lower() != b"application/json":
            await explain(send, 415, "send JSON: -H 'Content-Type: application/json'")
            return
        body = await self._body(headers.get(b"content-length", b"0"), receive)
        if body is None:
            await explain(send, 413, f"the body is larger than {LIMIT_BYTES} bytes; ask in several requests")
            return
        await self._app(scope, _replay(body, receive), send)

    async def _body(self, declared: bytes, receive: Receive) -> bytes | None:
        """Read a body, and stop at the limit: none for a larger one, of which nothing is read if it says its size."""
        if not declared.isdigit() or int(declared) > LIMIT_BYTES:
            return None
        body = bytearray()
        more = True
        while more:
            message = await receive()
            body += message.get("body", b"")
            if len(body) > LIMIT_BYTES:
                return None
            more = message["type"] == "http.request" and message.get("more_body", False)
        return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return messages.pop() if messages else await receive()

    return again


async def explain(send: Send, status: int, detail: str) -> None:
    """Send a small JSON document that says one thing."""
    await answer(send, status, json.dumps({"detail": detail}).encode(), b"application/json")


async def answer(send: Send, status: int, body: bytes, media_type: bytes) -> None:
    """Send a whole answer."""
    headers = [(b"content-type", media_type), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
