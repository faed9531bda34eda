"""The object store's pages over HTTP, on the real store: what is shown, and what never is."""

from __future__ import annotations

import http.client
import io
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from html import unescape
from typing import Any

import pandas as pd
import pytest
import requests
import uvicorn
from starlette.responses import PlainTextResponse

from mlplatform.connection import s3_client
from mlplatform.settings import DATASETS_BUCKET, Settings
from mlplatform_ops.feast_servers import objects
from mlplatform_ops.feast_servers.feature_ui import look_only

LOGIN = ("admin", "hush-1")
FOLDER = "object-pages"
MARKUP = b"<script>alert('ran')</script><b>bold</b>"
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'
PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256))
FRAME = pd.DataFrame({"number": range(50), "<i>text</i>": ["<u>x</u>", *[None] * 49]})
ODD = [
    "a..b",
    "..hidden",
    "größe 名前",
    "quotes \"'`",
    "<img src=x onerror=alert(1)>",
    "50% #1?a=b&c;d+e",
    "%2e%2e",
    "two\nlines",
    "/".join(["long" * 50] * 4 + ["z" * (1024 - len(FOLDER) - 5 - 4 * 201)]),
]


@pytest.fixture(scope="module")
def store(platform: Settings) -> Iterator[Any]:
    """A client, and a folder of objects that is deleted afterwards."""
    client = s3_client(platform)
    frame = io.BytesIO()
    FRAME.to_parquet(frame)
    bodies = {
        "page.html": MARKUP,
        "drawing.svg": SVG,
        "picture.png": PNG,
        "claims.png": MARKUP,
        "table.parquet": frame.getvalue(),
        "damaged.parquet": frame.getvalue()[:200],
        "numbers.csv": b"a,b\n" + b"1,2\n" * 20_000,
        "settings.json": json.dumps({"a": "<b>"}).encode(),
        "bytes.bin": b"\xff\x00",
        "empty": b"",
        **{f"odd/{name}": b"odd" for name in ODD},
    }
    for name, body in bodies.items():
        kind = "text/html" if name.endswith(("html", "svg")) else "application/x-any"
        client.put_object(
            Bucket=DATASETS_BUCKET, Key=f"{FOLDER}/{name}", Body=body, ContentType=kind, Metadata={"note": "<b>&"}
        )
    yield client
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=DATASETS_BUCKET, Prefix=FOLDER):
        client.delete_objects(
            Bucket=DATASETS_BUCKET, Delete={"Objects": [{"Key": entry["Key"]} for entry in page["Contents"]]}
        )


def serve(connect: Any) -> Iterator[str]:
    app = look_only(PlainTextResponse("Feast"), objects.object_routes(connect, user=LOGIN[0], password=LOGIN[1]))
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def url(store: Any) -> Iterator[str]:
    yield from serve(lambda: store)


def get(url: str, name: str, **query: str) -> requests.Response:
    path = objects.page_of(DATASETS_BUCKET, f"{FOLDER}/{name}", **query)
    return requests.get(url + path, auth=LOGIN, timeout=20)


def links(page: str) -> dict[str, str]:
    """The links of a page's table, by their words, as a browser reads them."""
    found = re.findall(r'<th scope="row"><a href="([^"]*)">(.*?)</a>', page, re.DOTALL)
    return {unescape(words): unescape(href) for href, words in found}


def test_from_the_buckets_each_object_is_reached_by_links_whatever_its_name(url: str) -> None:
    def follow(href: str) -> str:
        reply = requests.get(url + href, auth=LOGIN, timeout=20)
        assert reply.status_code == 200, href
        assert "<img src=x" not in reply.text
        return reply.text

    page = follow("/objects/")
    for step in (DATASETS_BUCKET, f"{FOLDER}/", "odd/"):
        page = follow(links(page)[step])
    assert {name for name in links(page) if not name.endswith("/")} == set(ODD[:-1])
    shown = [follow(href) for name, href in links(page).items() if not name.endswith("/")]
    assert all("odd</pre>" in page and "3 bytes" in page for page in shown)
    while len(links(page)) != 1 or not next(iter(links(page))).startswith("z"):
        page = follow(next(href for name, href in links(page).items() if name.startswith("long")))
    assert "odd</pre>" in follow(next(iter(links(page).values())))


def test_a_folder_is_shown_page_by_page_with_each_name_once(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = list(links(get(url, "").text))
    assert {"odd/", "page.html", "empty"} <= set(whole)
    monkeypatch.setattr(objects, "PAGE_ROWS", 4)
    seen, href = [], objects.page_of(DATASETS_BUCKET, f"{FOLDER}/")
    while href:
        page = requests.get(url + href, auth=LOGIN, timeout=20).text
        assert 0 < len(links(page)) <= 4
        seen += links(page)
        following = re.search(r'<a href="([^"]*)">Next page</a>', page)
        href = unescape(following[1]) if following else ""
    assert sorted(seen) == sorted(whole)


def test_what_an_object_holds_is_text_and_never_a_page(url: str) -> None:
    for name in ("page.html", "drawing.svg", "claims.png", "settings.json"):
        page = get(url, name)
        assert page.headers["Content-Type"] == "text/html; charset=utf-8"
        assert not {"<script", "<b>", "<svg"} & set(re.findall(r"<\w+>?", page.text)), name
        assert "&lt;b&gt;&amp;" in page.text  # what somebody wrote into its metadata
        assert {key: page.headers[key] for key in objects.HEADERS} == objects.HEADERS
    for kind in ("download", "image", "html"):
        sent = get(url, "page.html", **{"as": kind})
        assert sent.content == MARKUP
        assert sent.headers["Content-Type"] == "application/octet-stream"
        assert sent.headers["Content-Disposition"] == "attachment; filename*=UTF-8''page.html"
        assert {key: sent.headers[key] for key in objects.HEADERS} == objects.HEADERS


def test_a_table_shows_its_columns_its_rows_and_the_first_twenty(url: str) -> None:
    page = get(url, "table.parquet").text
    assert "50 rows in 2 columns." in page
    assert "<td>number</td><td>int64</td>" in page
    assert "<tr><td>0</td><td>&lt;u&gt;x&lt;/u&gt;</td></tr>" in page
    assert "<tr><td>19</td><td>null</td></tr>" in page
    assert "<td>20</td>" not in page
    assert "It begins like parquet and cannot be read (" in get(url, "damaged.parquet").text


def test_long_text_is_cut_images_are_shown_and_the_rest_is_offered_to_download(url: str) -> None:
    page = get(url, "numbers.csv").text
    assert "The first 65,536 bytes" in page
    text = re.search(r"<pre>\n(.*)</pre>", page, re.DOTALL)
    assert text
    assert len(text[1]) == 65_536
    page = get(url, "picture.png").text
    source = re.search(r'<img src="([^"]*)"', page)
    assert source
    sent = requests.get(url + unescape(source[1]), auth=LOGIN, timeout=20)
    assert (sent.headers["Content-Type"], sent.content) == ("image/png", PNG)
    assert "download it to look inside" in get(url, "bytes.bin").text
    assert "It is empty." in get(url, "empty").text
    assert get(url, "empty", **{"as": "download"}).content == b""


def test_head_tells_of_a_download_without_its_bytes(url: str) -> None:
    path = objects.page_of(DATASETS_BUCKET, f"{FOLDER}/numbers.csv", **{"as": "download"})
    reply = requests.head(url + path, auth=LOGIN, timeout=20)
    assert (reply.status_code, reply.headers["Content-Length"], reply.content) == (200, "80004", b"")


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("no-such-bucket/", "there is no bucket no-such-bucket; run &#39;make up&#39;"),
        ("no-such-bucket/a.txt", "is not there; run"),
        (f"{DATASETS_BUCKET}/gone.txt", "is not there; run"),
        (f"{DATASETS_BUCKET}/gone/", "holds nothing; begin at the bucket again"),
        (f"{DATASETS_BUCKET}/?after=nonsense%00", ""),
        ("arn:aws:s3:us-east-1:123456789012:accesspoint:x/", "is not the name of a bucket"),
    ],
)
def test_what_is_not_there_is_said_in_a_line(url: str, path: str, line: str) -> None:
    reply = requests.get(f"{url}/objects/{path}", auth=LOGIN, timeout=20)
    assert reply.status_code == 404 or not line
    assert line in reply.text
    assert "Traceback" not in reply.text


def test_a_store_that_is_away_is_named_with_what_to_type(platform: Settings) -> None:
    away = replace(platform, s3_endpoint="http://127.0.0.1:9")
    with closing(serve(lambda: s3_client(away))) as running:
        reply = requests.get(f"{next(running)}/objects/", auth=LOGIN, timeout=20)
    assert reply.status_code == 503
    assert "the object store does not answer for s3://; run &#39;make up&#39;" in reply.text


@pytest.mark.parametrize("login", [True, False], ids=["signed in", "a stranger"])
def test_no_disguise_of_a_path_leads_to_an_object_without_a_login_or_breaks_the_server(url: str, login: bool) -> None:
    host = url.removeprefix("http://")
    inside = f"{DATASETS_BUCKET}/{FOLDER}/settings.json"
    for path in (
        f"/objects/{inside}",
        f"//objects/{inside}",
        f"/x/../objects/{inside}",
        f"/objects/../objects/{inside}",
        f"/objects/x/..%2f{inside}",
        f"/%6fbjects/{inside}",
        f"/objects%2f{inside}",
        f"/OBJECTS/{inside}",
        f"/objects;/{inside}",
        f"/objects/{DATASETS_BUCKET}/..%2f..%2f..%2fetc%2fpasswd",
        f"/objects/{DATASETS_BUCKET}/..%2fmlflow-artifacts/",
        "/objects/..%2f/",
        "/objects/%2e%2e/settings.json",
        "/objects/%00",
        f"/objects/{DATASETS_BUCKET}/%00%ff%0a",
        f"/objects/{DATASETS_BUCKET}/{'a' * 3000}",
    ):
        connection = http.client.HTTPConnection(host, timeout=20)
        connection._validate_path = lambda _: None  # type: ignore[attr-defined]
        headers = {"Authorization": requests.auth._basic_auth_str(*LOGIN)} if login else {}
        connection.request("GET", path, headers=headers)
        reply = connection.getresponse()
        text = reply.read().decode()
        assert reply.status < 500, path
        assert "root:" not in text
        if not login:
            assert reply.status in {401, 403, 404} or text == "Feast", path
        connection.close()
