"""Save the buckets and MLflow's SQLite files to a folder, and put them back.

`python -m mlplatform_ops backup save FOLDER` works on any platform that the environment names (`make env`, or
`make k8s-forward`). A Postgres database is saved with its own tools, before the buckets: then every artifact that it
names is in the copy.
"""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import boto3.exceptions

from mlplatform.errors import DataError, MissingObjectError, ServiceDownError
from mlplatform.objectstore import s3_errors
from mlplatform.settings import BUCKETS


def save(store: Any, folder: Path, *, databases: Iterable[Path] = ()) -> int:
    """Copy databases, then every object, into a folder, which gets its name only when the copy is complete.

    Args:
        store: A boto3 S3 client.
        folder: Where to; it must not be there yet.
        databases: SQLite files, which may be in use.

    Returns:
        How many objects the copy holds.

    Raises:
        DataError: The folder is there.
        MissingObjectError: A database or a bucket is not there.
        ServiceDownError: The object store does not answer.
    """
    folder = folder.resolve()
    if folder.exists():
        raise DataError(f"{folder} is there already; name a new folder for each copy")
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    (part / "databases").mkdir(parents=True)
    for database in databases:
        if not database.is_file():
            raise MissingObjectError(f"no database at {database}; name the platform's, .platform/mlflow/mlflow.db")
        copy_sqlite(database, part / "databases" / database.name)
    count = 0
    for bucket in BUCKETS:
        for key in _keys(store, bucket):
            path = _below(part / "buckets" / bucket, key)
            path.parent.mkdir(parents=True, exist_ok=True)
            with s3_errors(f"s3://{bucket}/{key}"):
                store.download_file(bucket, key, str(path))
            count += 1
    part.replace(folder)
    return count


def restore(store: Any, folder: Path) -> int:
    """Copy every saved object back to its bucket, which must be there.

    Args:
        store: A boto3 S3 client.
        folder: What `save` filled.

    Returns:
        How many objects were copied.

    Raises:
        MissingObjectError: The folder holds no copy, or a bucket is not there; nothing was copied.
        ServiceDownError: The object store does not answer.
    """
    if not (folder / "buckets").is_dir():
        raise MissingObjectError(
            f"no copy in {folder}; name a folder that 'python -m mlplatform_ops backup save' filled"
        )
    files = sorted(path for path in (folder / "buckets").rglob("*") if path.is_file())
    objects = {path: path.relative_to(folder / "buckets").parts for path in files}
    for bucket in {parts[0] for parts in objects.values()}:
        # Asked first: an upload that fails for want of a bucket has an error class of its own, and comes too late.
        next(_keys(store, bucket), None)
    for path, (bucket, *key) in objects.items():
        try:
            store.upload_file(str(path), bucket, "/".join(key))
        except boto3.exceptions.S3UploadFailedError as error:
            raise ServiceDownError(
                f"s3://{bucket}/{'/'.join(key)} was not copied back: {error}; restore again"
            ) from error
    return len(objects)


def copy_sqlite(source: Path, target: Path) -> None:
    """Copy a database that may be written to meanwhile, as of one moment."""
    target.unlink(missing_ok=True)
    with closing(sqlite3.connect(source)) as old, closing(sqlite3.connect(target)) as new:
        old.backup(new)


def _keys(store: Any, bucket: str) -> Iterator[str]:
    with s3_errors(f"s3://{bucket}"):
        for page in store.get_paginator("list_objects_v2").paginate(Bucket=bucket):
            yield from (entry["Key"] for entry in page.get("Contents", ()) if not entry["Key"].endswith("/"))


def _below(folder: Path, key: str) -> Path:
    """Turn a key into a path, which must not lead out of the folder."""
    path = (folder / key).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise MissingObjectError(f"the key {key!r} can't be a file's name; copy its bucket with another tool")
    return path
