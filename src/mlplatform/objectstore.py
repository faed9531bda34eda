"""Data frames in the object store, each under a name that holds the digest of its content.

`write_frame(frame, "s3://bucket/folder/name.parquet")` stores `s3://bucket/folder/name-<digest>.parquet`. The same data
gets the same name and is stored once. Other data gets another name, so no data set is ever overwritten.
"""

from __future__ import annotations

import hashlib
import os
import re
from functools import lru_cache
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

import botocore.exceptions
import pandas as pd

from mlplatform.connection import s3_client
from mlplatform.errors import DataError
from mlplatform.storage.parquet import decode as decode
from mlplatform.storage.parquet import encode as encode
from mlplatform.storage.refusals import s3_errors as s3_errors

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

DIGEST_LENGTH = 16  # hexadecimal digits of the sha256: 64 bits, so two equal ones by chance need about 10^9 objects
KEY_BYTES = 1024  # what S3 allows
_UNKEPT = re.compile(r"[\x00-\x1f\x7f\\\ud800-\udfff\ufffe\uffff]")
ADDRESSED = re.compile(rf"-(?P<digest>[0-9a-f]{{{DIGEST_LENGTH}}})\.parquet$")

_PRESENT = {"PreconditionFailed", "412"}


def write_frame(frame: pd.DataFrame, uri: str, *, client: S3Client | None = None) -> str:
    """Store a frame as parquet; unlike `DataFrame.to_parquet`, under a name that holds its digest, and only once.

    Args:
        frame: The data; its row index is kept.
        uri: `s3://bucket/folder/name.parquet`.
        client: The S3 client, by default one from the environment.

    Returns:
        Where it is: `s3://bucket/folder/name-<digest>.parquet`.

    Raises:
        DataError: Parquet cannot hold the frame as it is, or the name does not end in `.parquet`.
        MissingObjectError: There is no such bucket.
        CredentialsError: The object store refuses the keys.
        ServiceDownError: The object store does not answer.
    """
    body = encode(frame, uri)
    target = addressed(uri, body)
    bucket, key = split_uri(target)
    with s3_errors(target):
        try:
            (client or _default_client()).put_object(Bucket=bucket, Key=key, Body=body, IfNoneMatch="*")
        except botocore.exceptions.ClientError as error:
            if error.response["Error"]["Code"] not in _PRESENT:
                raise
    return target


def read_frame(uri: str, *, client: S3Client | None = None) -> pd.DataFrame:
    """Read a frame; unlike `pandas.read_parquet`, compare the bytes with the digest in the name first.

    Args:
        uri: What `write_frame` returned, or any other parquet object.
        client: The S3 client, by default one from the environment.

    Raises:
        MissingObjectError: There is no such bucket or object.
        DataError: The bytes are damaged, or are no parquet file.
        CredentialsError: The object store refuses the keys.
        ServiceDownError: The object store does not answer.
    """
    body = read_bytes(uri, client=client)
    match = ADDRESSED.search(uri)
    if match and match["digest"] != _digest(body):
        raise DataError(f"{uri} holds other bytes than its name says; delete it and write it again")
    return decode(body, uri)


def write_bytes(body: bytes, uri: str, *, client: S3Client | None = None) -> str:
    """Store bytes under exactly this name, over what was there; adds clear errors to boto3's `put_object`.

    Raises:
        MissingObjectError: There is no such bucket.
        CredentialsError: The object store refuses the keys.
        ServiceDownError: The object store does not answer.
    """
    bucket, key = split_uri(uri)
    with s3_errors(uri):
        (client or _default_client()).put_object(Bucket=bucket, Key=key, Body=body)
    return uri


def read_bytes(uri: str, *, client: S3Client | None = None) -> bytes:
    """Read an object whole; adds clear errors to boto3's `get_object`.

    Raises:
        MissingObjectError: There is no such bucket or object.
        CredentialsError: The object store refuses the keys.
        ServiceDownError: The object store does not answer.
    """
    bucket, key = split_uri(uri)
    with s3_errors(uri):
        return (client or _default_client()).get_object(Bucket=bucket, Key=key)["Body"].read()


def list_objects(uri: str, *, client: S3Client | None = None) -> pd.DataFrame:
    """List the objects below an address as a table; boto3 answers in pages of a thousand.

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
    with s3_errors(uri):
        pages = (client or _default_client()).get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        rows = [
            (f"s3://{bucket}/{entry['Key']}", entry["Size"], entry["LastModified"])
            for page in pages
            for entry in page.get("Contents", [])
        ]
    return pd.DataFrame(rows, columns=["uri", "size_bytes", "modified"])


def split_uri(uri: str) -> tuple[str, str]:
    """Divide `s3://bucket/key` into bucket and key.

    Raises:
        DataError: It is not of that form, or its key is one that stores and clients write differently.
    """
    match = re.fullmatch(r"s3://([^/]+)/(.+)", uri, re.DOTALL)
    if match is None:
        raise DataError(f"{uri!r} is not an object's address; give s3://bucket/key")
    bucket, key = match.groups()
    # Some stores take a key for a path and resolve it, which may lead into another bucket; SeaweedFS takes a backslash
    # for a slash, and XML cannot list control characters.
    if {"", ".", ".."} & set(key.split("/")) or _UNKEPT.search(key):
        raise DataError(f"{uri!a} has an empty part, '.', '..', a backslash or a control character; give another name")
    if len(key.encode()) > KEY_BYTES:
        raise DataError(f"{uri[:60]!r}... has a key of more than {KEY_BYTES} bytes; shorten it")
    return bucket, key


def addressed(uri: str, body: bytes) -> str:
    """Put the digest of the content into a name: `name.parquet` becomes `name-<digest>.parquet`."""
    bucket, key = split_uri(uri)
    path = PurePosixPath(key)
    return f"s3://{bucket}/{path.with_name(f'{path.stem}-{_digest(body)}{path.suffix}')}"


def _digest(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()[:DIGEST_LENGTH]


def _default_client() -> S3Client:
    names = ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION")
    return _client_of(tuple(os.environ.get(name) for name in names))


@lru_cache(maxsize=4)
def _client_of(environment: tuple[str | None, ...]) -> S3Client:
    # Making a client takes longer than a small request, so one is kept until the environment names another platform.
    return s3_client()
