"""Frames in the object store: where they lie is their content's name, so that a data set is stored once.

`write_frame("s3://bucket/folder/name.parquet")` stores `s3://bucket/folder/name-<digest>.parquet`. The same data gives
the same name and is not stored again; other data gets another name, so nothing is ever overwritten.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import boto3.session
import botocore.exceptions
import pandas as pd
import pyarrow
from botocore.config import Config

from mlplatform.connection import s3_client
from mlplatform.errors import CredentialsError, DataError, MissingObjectError, ServiceDownError
from mlplatform.settings import Settings

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

DIGEST_LENGTH = 16  # hexadecimal digits of the sha256 in a name: 64 bits, no accidental twin below 10^9 objects
ADDRESSED = re.compile(rf"-(?P<digest>[0-9a-f]{{{DIGEST_LENGTH}}})\.(?:parquet|csv)$")
DTYPES = "dtypes"  # CSV keeps no types: they travel in the object's metadata under this key

_REFUSED = {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "403"}
_ABSENT = {"NoSuchKey", "404"}
_PRESENT = {"PreconditionFailed", "412"}
_FAILING = {"InternalError", "ServiceUnavailable", "SlowDown", "500", "502", "503", "504"}


def client(settings: Settings | None = None) -> S3Client:
    """Give an S3 client that reports a service that is down within seconds.

    Args:
        settings: The platform; by default the standard `AWS_*` variables decide, as for any other tool.
    """
    config = Config(connect_timeout=5, read_timeout=60, retries={"total_max_attempts": 3, "mode": "standard"})
    if settings is not None:
        return s3_client(settings, config)
    made: S3Client = boto3.session.Session().client("s3", config=config)
    return made


def split_uri(uri: str) -> tuple[str, str]:
    """Divide `s3://bucket/key` into bucket and key.

    Raises:
        DataError: It is not of that form.
    """
    match = re.fullmatch(r"s3://([^/]+)/(.+)", uri)
    if match is None:
        raise DataError(f"{uri!r} is not an object's address; give s3://bucket/key")
    return match[1], match[2]


def write_frame(frame: pd.DataFrame, uri: str, *, client: S3Client | None = None) -> str:
    """Store a frame under a name that holds its digest, unless it is there already.

    Args:
        frame: The data; its row index is kept in parquet, and must be the plain one for CSV.
        uri: `s3://bucket/folder/name.parquet` or `.csv`.
        client: The S3 client, by default one from the environment.

    Returns:
        Where it is: `s3://bucket/folder/name-<digest>.parquet`.

    Raises:
        DataError: The frame would not come back from that format as it is.
        MissingObjectError: There is no such bucket.
        CredentialsError: The object store refuses the keys.
        ServiceDownError: The object store does not answer.
    """
    body, metadata = encode(frame, uri)
    target = addressed(uri, body)
    _put(target, body, metadata=metadata, client=client, only_new=True)
    return target


def put_frame(frame: pd.DataFrame, uri: str, *, client: S3Client | None = None) -> str:
    """Store a frame under exactly this name, in one step, in place of what was there.

    Args:
        frame: The data, as in `write_frame`.
        uri: `s3://bucket/folder/name.parquet` or `.csv`.
        client: The S3 client, by default one from the environment.

    Returns:
        The address given.

    Raises:
        DataError: The name is a content-addressed one, or as in `write_frame`.
        MissingObjectError: As in `write_frame`.
        CredentialsError: As in `write_frame`.
        ServiceDownError: As in `write_frame`.
    """
    if ADDRESSED.search(uri):
        raise DataError(f"{uri} is named by its content and is never replaced; call write_frame")
    body, metadata = encode(frame, uri)
    _put(uri, body, metadata=metadata, client=client)
    return uri


def read_frame(uri: str, *, columns: Sequence[str] | None = None, client: S3Client | None = None) -> pd.DataFrame:
    """Read a frame back with its dtypes, checking a content-addressed one against its name.

    Args:
        uri: What `write_frame` or `put_frame` returned.
        columns: The columns wanted, in this order; all by default.
        client: The S3 client, by default one from the environment.

    Raises:
        MissingObjectError: There is no such bucket or object.
        DataError: The bytes are damaged, are no such file, or lack a column.
        CredentialsError: The object store refuses the keys.
        ServiceDownError: The object store does not answer.
    """
    body, metadata = _get(uri, client=client)
    match = ADDRESSED.search(uri)
    if match and match["digest"] != _digest(body):
        raise DataError(f"{uri} holds other bytes than its name says; delete it and write it again")
    frame = decode(body, uri, metadata=metadata)
    if columns is None:
        return frame
    missing = [column for column in columns if column not in frame.columns]
    if missing:
        raise DataError(f"{uri} has no column {', '.join(missing)}; it has {', '.join(map(str, frame.columns))}")
    return frame[list(columns)]


def write_bytes(body: bytes, uri: str, *, client: S3Client | None = None) -> str:
    """Store bytes under exactly this name, in one step, in place of what was there.

    Raises:
        MissingObjectError: There is no such bucket.
        CredentialsError: The object store refuses the keys.
        ServiceDownError: The object store does not answer.
    """
    _put(uri, body, client=client)
    return uri


def read_bytes(uri: str, *, client: S3Client | None = None) -> bytes:
    """Read an object whole.

    Raises:
        MissingObjectError: There is no such bucket or object.
        CredentialsError: The object store refuses the keys.
        ServiceDownError: The object store does not answer.
    """
    return _get(uri, client=client)[0]


def list_objects(uri: str, *, client: S3Client | None = None) -> pd.DataFrame:
    """List the objects below an address.

    Args:
        uri: `s3://bucket` or `s3://bucket/prefix`.
        client: The S3 client, by default one from the environment.

    Returns:
        One row per object: `uri`, `size_bytes`, `modified` (UTC); no rows if there is none.

    Raises:
        MissingObjectError: There is no such bucket.
        CredentialsError: The object store refuses the keys.
        ServiceDownError: The object store does not answer.
    """
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    with translated(uri):
        pages = (client or _default()).get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        rows = [
            (f"s3://{bucket}/{entry['Key']}", entry["Size"], entry["LastModified"])
            for page in pages
            for entry in page.get("Contents", [])
        ]
    return pd.DataFrame(rows, columns=["uri", "size_bytes", "modified"])


def addressed(uri: str, body: bytes) -> str:
    """Put the digest of the content into a name: `name.csv` becomes `name-<digest>.csv`."""
    bucket, key = split_uri(uri)
    path = PurePosixPath(key)
    return f"s3://{bucket}/{path.with_name(f'{path.stem}-{_digest(body)}{path.suffix}')}"


def encode(frame: pd.DataFrame, uri: str) -> tuple[bytes, dict[str, str]]:
    """Turn a frame into the bytes of the format that the name asks for, and check that nothing is lost.

    Args:
        frame: The data.
        uri: A name that ends in `.parquet` or `.csv`.

    Returns:
        The bytes, and what must be kept beside them as metadata.

    Raises:
        DataError: Another ending, or the frame would come back different.
    """
    suffix = _suffix(uri)
    try:
        if suffix == ".parquet":
            body, metadata = frame.to_parquet(), {}
        else:
            body = frame.to_csv(index=False, lineterminator="\n").encode()
            metadata = {DTYPES: json.dumps([str(dtype) for dtype in frame.dtypes])}
        with warnings.catch_warnings():
            # A file knows one kind of null: None comes back as NaN, or NaN as None.
            warnings.filterwarnings("ignore", "Mismatched null-like values", FutureWarning)
            pd.testing.assert_frame_equal(decode(body, uri, metadata=metadata), frame, check_freq=False)
    except (AssertionError, TypeError, ValueError, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split())[:200]
        hint = "write parquet, or reset the index" if suffix == ".csv" else "convert the column first"
        raise DataError(f"the frame for {uri} would not come back the same ({reason}); {hint}") from error
    return body, metadata


def decode(body: bytes, uri: str, *, metadata: Mapping[str, str] | None = None) -> pd.DataFrame:
    """Turn the bytes of a parquet or CSV file into a frame.

    Args:
        body: The file.
        uri: Its name, which ends in `.parquet` or `.csv`.
        metadata: What `encode` returned beside the bytes; without it a CSV's types are guessed.

    Raises:
        DataError: Another ending, or bytes that are no such file.
    """
    try:
        if _suffix(uri) == ".parquet":
            return pd.read_parquet(io.BytesIO(body))
        return _decode_csv(body, json.loads((metadata or {}).get(DTYPES, "null")))
    except (pyarrow.ArrowException, pd.errors.EmptyDataError, pd.errors.ParserError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{uri} cannot be read ({reason}); write it again") from error


def _decode_csv(body: bytes, dtypes: list[str] | None) -> pd.DataFrame:
    if dtypes is None:
        return pd.read_csv(io.BytesIO(body))
    header = pd.read_csv(io.BytesIO(body), nrows=0).columns
    kinds = dict(zip(header, dtypes, strict=True))
    times = {name: kind for name, kind in kinds.items() if kind.startswith("datetime64")}
    read_as = kinds | dict.fromkeys(times, "str")
    frame = pd.read_csv(io.BytesIO(body), dtype=read_as, keep_default_na=False, na_values=[""])
    parsed = {name: pd.to_datetime(frame[name], format="ISO8601") for name in times}
    return frame.assign(**parsed).astype(times)


def _suffix(uri: str) -> str:
    suffix = PurePosixPath(uri).suffix
    if suffix not in {".parquet", ".csv"}:
        raise DataError(f"{uri} names no known format; end it in .parquet or .csv")
    return suffix


def _digest(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()[:DIGEST_LENGTH]


@lru_cache(maxsize=4)
def _cached(environment: tuple[str | None, ...]) -> S3Client:
    # Making a client costs more than a small request; one serves until the environment names another platform.
    return client()


def _default() -> S3Client:
    names = ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION")
    return _cached(tuple(os.environ.get(name) for name in names))


def _put(
    uri: str,
    body: bytes,
    *,
    metadata: Mapping[str, str] | None = None,
    client: S3Client | None,
    only_new: bool = False,
) -> None:
    bucket, key = split_uri(uri)
    condition: dict[str, Any] = {"IfNoneMatch": "*"} if only_new else {}
    with translated(uri):
        try:
            (client or _default()).put_object(Bucket=bucket, Key=key, Body=body, Metadata=metadata or {}, **condition)
        except botocore.exceptions.ClientError as error:
            if not (only_new and error.response["Error"]["Code"] in _PRESENT):
                raise


def _get(uri: str, *, client: S3Client | None) -> tuple[bytes, dict[str, str]]:
    bucket, key = split_uri(uri)
    with translated(uri):
        answer = (client or _default()).get_object(Bucket=bucket, Key=key)
        return answer["Body"].read(), answer["Metadata"]


@contextmanager
def translated(uri: str) -> Iterator[None]:
    """Turn boto3's errors into ours; those without a meaning here pass unchanged.

    Args:
        uri: What is read or written, for the message.

    Raises:
        MissingObjectError: The bucket or the object is not there.
        CredentialsError: The object store refuses the keys.
        ServiceDownError: The object store does not answer, or fails.
    """
    try:
        yield
    except botocore.exceptions.ClientError as error:
        code = error.response["Error"]["Code"]
        if code in _REFUSED:
            raise CredentialsError(
                f"the object store refuses the credentials for {uri}; check AWS_ACCESS_KEY_ID, or run 'make env' again"
            ) from error
        if code == "NoSuchBucket":
            bucket = uri.removeprefix("s3://").partition("/")[0]
            raise MissingObjectError(f"{uri}: there is no bucket {bucket}; run 'make up', which makes it") from error
        if code in _ABSENT:
            raise MissingObjectError(f"{uri} is not there; run the notebook that writes it, or 'make run'") from error
        if code in _FAILING:
            raise ServiceDownError(f"the object store fails on {uri} ({code}); see 'make status'") from error
        raise
    except (botocore.exceptions.NoCredentialsError, botocore.exceptions.PartialCredentialsError) as error:
        raise CredentialsError(f"no credentials for {uri}; call connect(), or run 'make env'") from error
    except (botocore.exceptions.ConnectionError, botocore.exceptions.HTTPClientError) as error:
        raise ServiceDownError(
            f"the object store does not answer for {uri}; run 'make up', then 'make status'"
        ) from error
