"""What the feature server and the UI let through, without a server."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from mlplatform_ops.feast_servers.feature_server import WAITING, App, ReadOnly
from mlplatform_ops.feast_servers.feature_ui import LookOnly


async def feast(scope: Any, receive: Any, send: Any) -> None:
    """Stand in for Feast's application: whatever reaches it is answered 200."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b'{"detail": "reached"}'})


def ask(app: App, method: str, path: str, token: str | None = None, kind: str = "http") -> tuple[int, str]:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {"type": "http.request", "body": b"{}"}

    headers = [(b"authorization", f"Bearer {token}".encode())] if token else []
    asyncio.run(app({"type": kind, "method": method, "path": path, "headers": headers}, receive, send))
    if kind == "websocket":
        return sent[0]["code"], sent[0]["type"]
    return sent[0]["status"], json.loads(sent[1]["body"])["detail"]


WRITES = ["/push", "/write-to-online-store", "/materialize", "/materialize-incremental", "/chat", "/search"]


@pytest.mark.parametrize("path", WRITES)
def test_the_feature_server_takes_no_writes(path: str):
    status, detail = ask(ReadOnly(lambda: feast), "POST", path)
    assert (status, detail) == (403, "this feature server only reads: GET /health, POST /get-online-features")


@pytest.mark.parametrize(("method", "path"), [("GET", "/docs"), ("GET", "/get-online-features"), ("POST", "/health")])
def test_an_endpoint_is_closed_unless_it_is_listed(method: str, path: str):
    assert ask(ReadOnly(lambda: feast), method, path)[0] == 403


def test_websockets_are_closed():
    assert ask(ReadOnly(lambda: feast), "", "/ws/chat", kind="websocket") == (1008, "websocket.close")
    assert ask(LookOnly(feast), "", "/ws", kind="websocket") == (1008, "websocket.close")


def test_reading_asks_for_the_token_when_there_is_one():
    app = ReadOnly(lambda: feast, token="secret")  # noqa: S106
    assert ask(app, "POST", "/get-online-features", "secret") == (200, "reached")
    for wrong in (None, "other", "secret2"):
        status, detail = ask(app, "POST", "/get-online-features", wrong)
        assert status == 401
        assert '-H "Authorization: Bearer $FEATURE_SERVER_TOKEN"' in detail
    assert ask(app, "GET", "/health") == (200, "serving")


def test_without_a_token_reading_is_open():
    assert ask(ReadOnly(lambda: feast), "POST", "/get-online-features") == (200, "reached")


def test_the_feature_server_waits_for_a_registry():
    app = ReadOnly(lambda: None)
    assert ask(app, "GET", "/health") == (200, WAITING)
    assert ask(app, "POST", "/get-online-features") == (503, WAITING)
    assert "run 'make features'" in WAITING


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/p/income"), ("HEAD", "/"), ("POST", "/api/v1/registry/refresh")]
)
def test_the_ui_shows(method: str, path: str):
    assert ask(LookOnly(feast), method, path) == (200, "reached")


@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/api/v1/entities"), ("DELETE", "/api/v1/feature_views/x"), ("POST", "/api/v1/push")]
)
def test_the_ui_changes_nothing(method: str, path: str):
    status, detail = ask(LookOnly(feast), method, path)
    assert status == 403
    assert "change feature_repo/features.py and run 'make features'" in detail
