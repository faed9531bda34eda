"""The doors of the object store's pages, and what may be shown there, without a store."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import httpx
import pytest
from starlette.responses import PlainTextResponse

from mlplatform_ops.feast_servers.feature_ui import look_only
from mlplatform_ops.feast_servers.objects import HEADERS, object_routes, page_of

LOGIN = ("admin", "hush-1")


def no_store() -> Any:
    raise AssertionError("the object store was asked")


def ask(method: str, path: str, *, password: str = LOGIN[1], **options: Any) -> httpx.Response:
    app = look_only(PlainTextResponse("Feast"), object_routes(no_store, user=LOGIN[0], password=password))

    async def request() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app)) as session:
            return await session.request(method, f"http://127.0.0.1{path}", **options)

    return asyncio.run(request())


@pytest.mark.parametrize(
    "header",
    [
        "",
        "Basic",
        "Basic !",
        "Basic YWRtaW46d3Jvbmc=",  # admin:wrong
        "Basic YWRtaW46",  # admin, with no password
        "Basic Og==",
        "Bearer YWRtaW46aHVzaC0x",  # the right words, in another way
    ],
)
@pytest.mark.parametrize(
    "path", ["/objects", "/objects/", "/objects/mlflow-datasets/", "/objects//", "/objects/a?as=x"]
)
def test_nobody_is_shown_anything_without_the_right_password(path: str, header: str) -> None:
    for password in (LOGIN[1], ""):
        reply = ask("GET", path, password=password, headers={"Authorization": header})
        assert reply.status_code == 401
        assert "make password" in reply.text
        assert reply.headers["WWW-Authenticate"].startswith("Basic ")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "COPY"])
def test_somebody_signed_in_can_do_nothing_but_look(method: str) -> None:
    assert ask(method, "/objects/mlflow-datasets/a.txt", auth=LOGIN).status_code == 403


def test_the_pages_answer_to_this_machines_names_only() -> None:
    assert ask("GET", "/objects/", auth=LOGIN, headers={"Host": "elsewhere.example"}).status_code == 400


def test_a_refusal_forbids_scripts_guessed_types_and_frames_as_every_page_does() -> None:
    reply = ask("GET", "/objects/")
    assert {name: reply.headers[name] for name in HEADERS} == HEADERS
    policy = reply.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; ")
    assert not re.search(r"script|unsafe|\*|https?:", policy)


@pytest.mark.parametrize(
    ("key", "path"),
    [
        ("a/b.txt", "a/b.txt"),
        ("a/../b", "a%2F..%2Fb"),  # a browser would ask for /objects/bucket/b
        ("./b", ".%2Fb"),
        ("a//b", "a//b"),
        ('<b>"?#%2F ', "%3Cb%3E%22%3F%23%252F%20"),
        ("größe", "gr%C3%B6%C3%9Fe"),
    ],
)
def test_a_link_leads_to_exactly_its_key(key: str, path: str) -> None:
    assert page_of("bucket", key) == f"/objects/bucket/{path}"


def test_a_token_for_the_next_page_is_passed_on_whole() -> None:
    assert page_of("bucket", "a/", after="x&y=/+") == "/objects/bucket/a/?after=x%26y%3D%2F%2B"
