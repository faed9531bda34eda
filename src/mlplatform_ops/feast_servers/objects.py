"""A browser of the object store: buckets, folders, objects and what they hold, to look at and nothing else.

The pages lie beside the Feast UI, under `/objects/`. Whoever asks must send the platform's user and password, the same
as MLflow's: the server reads with the platform's keys. What an object holds is never a page: it is shown as escaped
text, as a table, as an image in a page of ours, or is downloaded.

SeaweedFS brings a page of its own, `weed admin`. `docs/decisions/0015-pages-and-tiles.md` says why it is not used.
"""

from __future__ import annotations

import base64
import codecs
import hashlib
import hmac
import io
import re
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode

import botocore.exceptions
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.background import BackgroundTask
from starlette.convertors import PathConvertor, register_url_convertor
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

from mlplatform.errors import DataError, MissingObjectError, PlatformError
from mlplatform.storage.refusals import s3_errors

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

ROOT = "/objects/"
SIGN_IN = "sign in with the platform's user and password, as in MLflow: 'make password' prints it"
PAGE_ROWS = 200
PREVIEW_ROWS = 20
PREVIEW_BYTES = 2**16
CELL_CHARACTERS = 200
# Arrow decodes a column of a row group as a whole.
ROW_GROUP_BYTES = 2**27
PNG = b"\x89PNG\r\n\x1a\n"
PARQUET = b"PAR1"
# Whatever else boto3 takes for a bucket, such as an ARN, names another place than this store.
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_HERE = Path(__file__).parent
_STYLE = (_HERE / "objects.css").read_text()
_STYLE_DIGEST = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        f"default-src 'none'; style-src 'sha256-{_STYLE_DIGEST}'; img-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


def object_routes(connect: Callable[[], S3Client], *, user: str, password: str) -> list[Route]:
    """Make the routes of the pages.

    Args:
        connect: Makes the S3 client, at the first request.
        user: Who may look.
        password: The user's; without one, nobody may.
    """
    client = cache(connect)
    expected = f"{user}:{password}".encode()

    def answer(request: Request) -> Response:
        if not password or not hmac.compare_digest(_login(request), expected):
            challenge = {"WWW-Authenticate": 'Basic realm="object store", charset="UTF-8"'}
            return _page(401, "Who are you?", note=SIGN_IN, headers=challenge)
        path = request.path_params.get("path")
        if path is None:
            return RedirectResponse(ROOT, headers=HEADERS)
        try:
            return _show(client(), path, request)
        except (MissingObjectError, DataError) as error:
            return _page(404, "Not found", note=str(error), crumbs=_crumbs("", ""))
        except PlatformError as error:
            return _page(503, "The object store cannot be read", note=str(error))
        except (botocore.exceptions.ClientError, botocore.exceptions.ParamValidationError) as error:
            note = f"the object store does not take this address ({error}); begin at the buckets again"
            return _page(404, "Not found", note=note, crumbs=_crumbs("", ""))

    register_url_convertor("key", _AnyKey())
    return [Route(path, answer, methods=["GET"]) for path in (ROOT.rstrip("/"), f"{ROOT}{{path:key}}")]


class _AnyKey(PathConvertor):
    """Takes line ends too, which a key may hold."""

    regex = "(?s:.*)"


def page_of(bucket: str, key: str = "", **query: str) -> str:
    """Give the path of a page.

    Args:
        bucket: The bucket.
        key: An object, or the beginning of keys that ends in a slash.
        query: What else is asked.
    """
    # A browser resolves '.' and '..' between slashes before it asks.
    safe = "" if {".", ".."} & set(key.split("/")) else "/"
    return f"{ROOT}{bucket}/{quote(key, safe=safe)}{f'?{urlencode(query)}' if query else ''}"


def _login(request: Request) -> bytes:
    scheme, _, value = request.headers.get("authorization", "").partition(" ")
    try:
        return base64.b64decode(value, validate=True) if scheme.lower() == "basic" else b""
    except ValueError:
        return b""


def _show(client: S3Client, path: str, request: Request) -> Response:
    """Answer somebody who is signed in."""
    bucket, _, key = path.partition("/")
    with s3_errors(f"s3://{path}"):
        if not bucket:
            return _show_buckets(client)
        if not _BUCKET.fullmatch(bucket):
            raise MissingObjectError(f"{bucket!r} is not the name of a bucket; begin at the buckets again")
        if not key or key.endswith("/"):
            return _show_folder(client, bucket, key, request.query_params.get("after", ""))
        kind = request.query_params.get("as", "")
        return _send(client, bucket, key, request) if kind else _show_object(client, bucket, key)


def _show_buckets(client: S3Client) -> Response:
    rows = [
        {"name": bucket["Name"], "url": page_of(bucket["Name"]), "size": "", "time": _time(bucket["CreationDate"])}
        for bucket in client.list_buckets()["Buckets"]
    ]
    return _page(200, "Buckets", rows=rows, dated="Made", note="" if rows else "No bucket yet; run 'make up'.")


def _show_folder(client: S3Client, bucket: str, prefix: str, after: str) -> Response:
    more: Any = {"ContinuationToken": after} if after else {}
    found: Any = client.list_objects_v2(Bucket=bucket, Prefix=prefix, Delimiter="/", MaxKeys=PAGE_ROWS, **more)
    folders = [entry["Prefix"] for entry in found.get("CommonPrefixes", ())]
    rows = [{"name": key[len(prefix) :], "url": page_of(bucket, key), "size": "", "time": ""} for key in folders]
    rows += [
        {
            "name": entry["Key"][len(prefix) :],
            "url": page_of(bucket, entry["Key"]),
            "size": f"{entry['Size']:,} bytes",
            "time": _time(entry["LastModified"]),
        }
        for entry in found.get("Contents", ())
        if entry["Key"] != prefix  # an empty object that stands for the folder
    ]
    if prefix and not found["KeyCount"] and not after:
        raise MissingObjectError(f"s3://{bucket}/{prefix} holds nothing; begin at the bucket again")
    token = found.get("NextContinuationToken") if found["IsTruncated"] else None
    return _page(
        200,
        f"s3://{bucket}/{prefix}",
        crumbs=_crumbs(bucket, prefix),
        rows=rows,
        dated="Last modified",
        next=page_of(bucket, prefix, after=token) if token else "",
        note="" if rows else "Nothing here.",
    )


def _show_object(client: S3Client, bucket: str, key: str) -> Response:
    head = client.head_object(Bucket=bucket, Key=key)
    facts = [
        ("Size", f"{head['ContentLength']:,} bytes"),
        ("Last modified", _time(head["LastModified"])),
        ("Stored as", head.get("ContentType", "")),
        ("ETag", head["ETag"].strip('"')),
        *sorted(head["Metadata"].items()),
    ]
    return _page(
        200,
        f"s3://{bucket}/{key}",
        crumbs=_crumbs(bucket, key),
        facts=facts,
        download=page_of(bucket, key, **{"as": "download"}),
        **_preview(client, bucket, key, head["ContentLength"]),
    )


def _preview(client: S3Client, bucket: str, key: str, size_bytes: int) -> dict[str, Any]:
    """Look at an object's first bytes, whatever its name and its type claim, and give what the page shows of it."""
    if not size_bytes:
        return {"note": "It is empty."}
    begin = _Ranges(client, bucket, key, size_bytes).read(PREVIEW_BYTES)
    if begin.startswith(PNG):
        return {"image": page_of(bucket, key, **{"as": "image"})}
    if begin.startswith(PARQUET):
        return _tables(_Ranges(client, bucket, key, size_bytes))
    whole = len(begin) == size_bytes
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(begin, final=whole)
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        return {"note": "It is neither text, nor parquet, nor a PNG image; download it to look inside."}
    return {"text": text, "heading": "What it holds" if whole else f"The first {PREVIEW_BYTES:,} bytes"}


def _tables(source: _Ranges) -> dict[str, Any]:
    """Give a parquet file's schema and its first rows."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(source) as file:
            schema, about = file.schema_arrow, file.metadata
            types = ("Columns", ["name", "type"], [(field.name, str(field.type)) for field in schema])
            note = f"{about.num_rows:,} rows in {about.num_columns:,} columns."
            groups = [about.row_group(number).total_byte_size for number in range(about.num_row_groups)]
            if max(groups, default=0) > ROW_GROUP_BYTES:
                return {"note": f"{note} Its row groups are too large to show rows of.", "tables": [types]}
            batch = next(file.iter_batches(batch_size=PREVIEW_ROWS), None)
    except (pyarrow.ArrowException, OSError, ValueError, NotImplementedError) as error:
        return {"note": f"It begins like parquet and cannot be read ({' '.join(str(error).split())[:200]})."}
    rows = list(zip(*(column.to_pylist() for column in batch.columns), strict=True)) if batch else []
    shown = [[_cell(value) for value in row] for row in rows]
    return {"note": note, "tables": [types, (f"First {len(shown)} rows", schema.names, shown)]}


def _cell(value: object) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= CELL_CHARACTERS else f"{text[:CELL_CHARACTERS]}..."


def _send(client: S3Client, bucket: str, key: str, request: Request) -> Response:
    """Send an object: as a PNG image, if its bytes are one, or else for the browser to save."""
    found = client.get_object(Bucket=bucket, Key=key)
    body = found["Body"]
    begin = body.read(len(PNG))
    name = quote(key.rpartition("/")[2], safe="")
    headers = {**HEADERS, "Content-Length": str(found["ContentLength"])}
    if request.query_params["as"] == "image" and begin == PNG:
        kind = "image/png"
    else:
        kind = "application/octet-stream"
        headers["Content-Disposition"] = f"attachment; filename*=UTF-8''{name}"

    def pieces() -> Iterator[bytes]:
        yield begin
        yield from body.iter_chunks(2**18)

    sent = iter(()) if request.method == "HEAD" else pieces()
    return StreamingResponse(sent, media_type=kind, headers=headers, background=BackgroundTask(body.close))


class _Ranges(io.RawIOBase):
    """An object as a file that is read in the parts that are asked for."""

    def __init__(self, client: S3Client, bucket: str, key: str, size_bytes: int) -> None:
        self._client, self._bucket, self._key, self._size_bytes = client, bucket, key, size_bytes
        self._at = 0

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size_bytes}[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        end = self._size_bytes if size < 0 else min(self._at + size, self._size_bytes)
        if end <= self._at:
            return b""
        span = f"bytes={self._at}-{end - 1}"
        part = self._client.get_object(Bucket=self._bucket, Key=self._key, Range=span)["Body"].read()
        self._at += len(part)
        return part


def _crumbs(bucket: str, key: str) -> list[tuple[str, str]]:
    """Name every page above this one."""
    crumbs = [("Buckets", ROOT), *([(bucket, page_of(bucket))] if bucket else [])]
    parts = key.split("/")[: -2 if key.endswith("/") else -1]
    above = ["/".join(parts[: number + 1]) + "/" for number in range(len(parts))]
    return crumbs + [(part or "(no name)", page_of(bucket, path)) for part, path in zip(parts, above, strict=True)]


def _time(moment: datetime) -> str:
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"


def _page(
    status: int,
    title: str,
    *,
    headers: dict[str, str] | None = None,
    crumbs: Sequence[tuple[str, str]] = (),
    **shown: Any,
) -> HTMLResponse:
    content = {"note": "", "tables": (), "image": "", "next": ""} | shown
    text = _template().render(title=title, crumbs=crumbs, style=_STYLE, **content)
    return HTMLResponse(text, status, {**HEADERS, **(headers or {})})


@cache
def _template() -> Any:
    # Whatever a page is given is escaped. A name that it is not given is an error.
    loader = FileSystemLoader(_HERE)
    pages = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return pages.get_template("objects.html")
