"""What the feature server and the UI let through, without a server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from mlplatform_ops.feast_servers.feature_server import (
    LIMIT_BYTES,
    NOT_LOADED,
    REFUSAL,
    WAITING,
    StoreWatcher,
    create_app,
    main,
    tokens_of,
)
from mlplatform_ops.feast_servers.feature_ui import look_only

QUESTION = {"features": ["a:b"], "entities": {"user_id": ["x"]}}


class Feast:
    """Stands in for Feast's application: whatever reaches it is answered 200, with the body that came."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = (await receive())["body"] if scope["method"] == "POST" else b""
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"reached " + body})


FEAST = Feast()


class Client:
    """Sends requests to an application."""

    def __init__(self, app: ASGIApp, address: str = "http://127.0.0.1") -> None:
        self.app, self._address = app, address

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        async def ask() -> httpx.Response:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(self.app)) as session:
                return await session.request(method, f"{self._address}{path}", **options)

        return asyncio.run(ask())

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.request("GET", path, **options)

    def post(self, path: str, **options: Any) -> httpx.Response:
        return self.request("POST", path, **options)


def client(*tokens: str, app: Any = FEAST, ready: bool = True) -> Client:
    watcher = StoreWatcher(Path())
    watcher.app, watcher.ready, watcher.join_keys = app, ready, frozenset({"user_id"})
    return Client(create_app(watcher, tokens))


def ui() -> Client:
    return Client(look_only(FEAST))


WRITES = ["/push", "/write-to-online-store", "/materialize", "/materialize-incremental", "/chat", "/search"]


@pytest.mark.parametrize("path", WRITES)
def test_the_feature_server_takes_no_writes(path: str) -> None:
    reply = client().post(path, json=QUESTION)
    assert (reply.status_code, reply.json()) == (403, {"detail": REFUSAL})


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/docs"),
        ("GET", "/get-online-features"),
        ("POST", "/health"),
        ("POST", "/get-online-features/"),
        ("POST", "//get-online-features"),
        ("OPTIONS", "/get-online-features"),
        ("DELETE", "/health"),
    ],
)
def test_an_endpoint_is_closed_unless_it_is_listed(method: str, path: str) -> None:
    assert client().request(method, path).status_code == 403


def test_websockets_are_closed() -> None:
    sent: list[Any] = []

    async def keep(message: Any) -> None:
        sent.append(message["type"])

    scope = {"type": "websocket", "path": "/ws/chat", "headers": [(b"host", b"127.0.0.1")]}
    for opened in (client(), ui()):
        asyncio.run(opened.app(dict(scope), None, keep))  # type: ignore[arg-type]
    assert sent == ["websocket.close"] * 2


def test_reading_asks_for_the_token_when_there_is_one() -> None:
    server = client("secret", "the-one-before")
    for token in ("secret", "the-one-before"):
        reply = server.post("/get-online-features", json=QUESTION, headers={"Authorization": f"Bearer {token}"})
        assert (reply.status_code, reply.text) == (200, f"reached {reply.request.content.decode()}")
    for wrong in ({}, {"Authorization": "Bearer secret2"}, {"Authorization": "secret"}, {"Authorization": b"\xff"}):
        reply = server.post("/get-online-features", json=QUESTION, headers=wrong)
        assert reply.status_code == 401
        assert '-H "Authorization: Bearer $FEATURE_SERVER_TOKEN"' in reply.json()["detail"]
    assert server.get("/health").json() == {"detail": "serving"}


def test_two_tokens_are_valid_while_one_is_replaced() -> None:
    both = {"FEATURE_SERVER_TOKEN": "new", "FEATURE_SERVER_TOKEN_PREVIOUS": "old", "OTHER": "x"}
    assert tokens_of(both) == ["new", "old"]
    assert tokens_of({"FEATURE_SERVER_TOKEN": ""}) == []


def test_without_a_token_reading_is_open_on_this_machine_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    # A platform that another test started has one; the server would then listen, and this test never end.
    monkeypatch.delenv("FEATURE_SERVER_TOKEN", raising=False)
    assert client().post("/get-online-features", json=QUESTION).status_code == 200
    with pytest.raises(SystemExit, match=r"anyone who reaches 0\.0\.0\.0 could read; set FEATURE_SERVER_TOKEN"):
        main(["--host", "0.0.0.0"])  # noqa: S104 - which is refused


@pytest.mark.parametrize(
    ("ready", "status", "detail"), [(True, 200, WAITING), (False, 503, NOT_LOADED)], ids=["no registry", "no store"]
)
def test_the_feature_server_is_ready_without_a_registry_and_not_without_a_store(
    ready: bool, status: int, detail: str
) -> None:
    server = client(app=None, ready=ready)
    health = server.get("/health")
    assert (health.status_code, health.json()) == (status, {"detail": detail})
    reply = server.post("/get-online-features", json=QUESTION)
    assert (reply.status_code, reply.json()) == (503, {"detail": detail})
    assert "run 'make features'" in WAITING


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("", "the body is not JSON"),
        ("{", "the body is not JSON"),
        ("[" * 100_000, "the body is not JSON"),
        ("[]", "the body is not a JSON object"),
        ("{}", "entities is not an object of lists"),
        ('{"entities": null}', "entities is not an object of lists"),
        ('{"entities": {}}', "entities is not an object of lists"),
        ('{"entities": {"user_id": "x"}}', "entities.user_id is not a list with a value in it"),
        ('{"entities": {"user_id": []}}', "entities.user_id is not a list with a value in it"),
        ('{"entities": {"user_id": [null]}}', "entities.user_id holds a value that is neither text nor"),
        ('{"entities": {"user_id": ["x", ["y"]]}}', "entities.user_id holds a value that is neither text nor"),
        ('{"entities": {"user_id": [{"val": "x"}]}}', "entities.user_id holds a value that is neither text nor"),
        ('{"entities": {"user_id": [NaN]}}', "entities.user_id holds a value that is neither text nor"),
        ('{"entities": {"user_id": ["x"], "other": ["y", "z"]}}', "the lists in entities are not equally long"),
        ('{"entities": {"other": ["x"]}}', "entities names none of: user_id"),
        ('{"entities": {"user_id": ["x"]}}', "name a feature_service, or features as view:feature"),
        ('{"entities": {"user_id": ["x"]}, "features": []}', "name a feature_service, or features as view:feature"),
        ('{"entities": {"user_id": ["x"]}, "features": ["a"]}', "features holds 'a', which is not view:feature"),
        ('{"entities": {"user_id": ["x"]}, "features": [":"]}', "features holds ':', which is not view:feature"),
        ('{"entities": {"user_id": ["\\ud800"]}}', "the body holds half of a surrogate pair"),
        ('{"features": ["\\udfff"], "entities": {"user_id": ["x"]}}', "the body holds half of a surrogate pair"),
    ],
)
def test_a_question_of_a_wrong_form_is_answered_with_what_is_wrong(body: str, problem: str) -> None:
    reply = client().post("/get-online-features", content=body)
    assert reply.status_code == 422
    assert reply.json()["detail"].startswith(problem)


def test_a_body_above_the_limit_is_refused_before_it_is_parsed() -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(2):
            yield b" " * LIMIT_BYTES

    at_the_limit = json.dumps(QUESTION).ljust(LIMIT_BYTES)
    assert client().post("/get-online-features", content=at_the_limit).status_code == 200
    # The last one says that more is to come, which is not waited for.
    for body, headers in (
        (at_the_limit + " ", {}),
        (pieces(), {}),
        (b"{", {"Content-Length": str(LIMIT_BYTES + 1)}),
        (b"{", {"Content-Length": "many"}),
    ):
        reply = client().post("/get-online-features", content=body, headers=headers)
        assert reply.status_code == 413
        assert f"larger than {LIMIT_BYTES} bytes" in reply.json()["detail"]


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/p/income"), ("HEAD", "/"), ("GET", "/"), ("POST", "/api/v1/registry/refresh")]
)
def test_the_ui_shows(method: str, path: str) -> None:
    assert ui().request(method, path).status_code == 200


@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/api/v1/entities"), ("DELETE", "/api/v1/feature_views/x"), ("POST", "/api/v1/push")]
)
def test_the_ui_changes_nothing(method: str, path: str) -> None:
    reply = ui().request(method, path)
    assert reply.status_code == 403
    assert "change feature_repo/features.py and run 'make features'" in reply.json()["detail"]


def test_the_ui_answers_to_this_machines_names_only() -> None:
    assert ui().get("/", headers={"Host": "localhost:6567"}).status_code == 200
    for method, path in (("GET", "/"), ("POST", "/api/v1/registry/refresh")):
        assert ui().request(method, path, headers={"Host": "elsewhere.example"}).status_code == 400
