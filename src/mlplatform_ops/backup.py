"""Save the buckets and MLflow's SQLite files to a folder, and put them back.

`python -m mlplatform_ops backup save FOLDER` works on any platform that the environment names (`make env`, or
`make k8s-forward`). A Postgres database is saved with its own tools, before the buckets: then every artifact that it
names is in the copy.
"""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import boto3.exceptions

from mlplatform.errors import DataError, MissingObjectError, ServiceDownError
from mlplatform.objectstore import s3_errors
from mlplatform.settings import BUCKETS
from mlplatform_ops.files import write_private

# Beside the objects: which ETag each had in the object store, by bucket and key.
ETAGS = "etags.json"
AT_ONCE = 4
# What one call deletes at most.
DELETED_AT_ONCE = 1000


def save(store: Any, folder: Path, *, databases: Iterable[Path] = (), buckets: Iterable[str] | None = None) -> int:
    """Copy databases, then every object, into a folder, which gets its name only when the copy is complete.

    Args:
        store: A boto3 S3 client.
        folder: Where to; it must not be there yet.
        databases: SQLite files, which may be in use.
        buckets: Which buckets; the platform's own by default.

    Returns:
        How many objects the copy holds.

    Raises:
        DataError: The folder is there, or two databases have one name.
        MissingObjectError: A database or a bucket is not there.
        ServiceDownError: The object store does not answer.
    """
    databases, folder = list(databases), folder.resolve()
    if len({database.name for database in databases}) < len(databases):
        raise DataError("two of the databases have one name; save each to a folder of its own")
    if folder.exists():
        raise DataError(f"{folder} is there already; name a new folder for each copy")
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    (part / "databases").mkdir(parents=True)
    for database in databases:
        if not database.is_file():
            raise MissingObjectError(f"no database at {database}; name the platform's, .platform/mlflow/mlflow.db")
        copy_sqlite(database, part / "databases" / database.name)
    buckets = list(BUCKETS if buckets is None else buckets)
    for bucket in buckets:
        (part / "buckets" / bucket).mkdir(parents=True)
    named = [(bucket, key) for bucket in buckets for key in _etags(store, bucket)]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        copied = list(pool.map(lambda name: _download(store, part / "buckets", *name), named))
    write_private(part / ETAGS, json.dumps([[*name, etag] for name, etag in zip(named, copied, strict=True)]))
    part.replace(folder)
    return len(named)


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
        _etags(store, bucket)
    for path, (bucket, *key) in objects.items():
        try:
            with s3_errors(f"s3://{bucket}/{'/'.join(key)}"):
                store.upload_file(str(path), bucket, "/".join(key))
        except boto3.exceptions.S3UploadFailedError as error:
            raise ServiceDownError(
                f"s3://{bucket}/{'/'.join(key)} was not copied back: {error}; restore again"
            ) from error
    return len(objects)


def delete(store: Any, bucket: str, keys: Sequence[str]) -> None:
    """Delete objects.

    Raises:
        ServiceDownError: The object store does not answer, or keeps one of them.
    """
    for start in range(0, len(keys), DELETED_AT_ONCE):
        named = [{"Key": key} for key in keys[start : start + DELETED_AT_ONCE]]
        with s3_errors(f"s3://{bucket}"):
            answer = store.delete_objects(Bucket=bucket, Delete={"Objects": named})
        if kept := answer.get("Errors"):
            raise ServiceDownError(
                f"the object store keeps {len(kept)} objects that are to go, such as s3://{bucket}/{kept[0]['Key']} "
                f"({kept[0].get('Code')}); see 'make status', then type this again"
            )


def put_back(store: Any, folder: Path) -> tuple[int, int]:
    """Bring the object store back to what `save` found: these buckets, these objects, and no others.

    An object that still has the ETag it had is left alone. What was interrupted is done by the next call.

    Args:
        store: A boto3 S3 client.
        folder: What `save` filled, with every bucket.

    Returns:
        How many objects were removed, and how many were written.

    Raises:
        ServiceDownError: The object store does not answer.
    """
    saved = {(bucket, key): etag for bucket, key, etag in json.loads((folder / ETAGS).read_text())}
    buckets = {path.name for path in (folder / "buckets").iterdir()}
    there = set(bucket_names(store))
    found = {(bucket, key): etag for bucket in there for key, etag in _etags(store, bucket).items()}
    later, changed = found.keys() - saved.keys(), {name for name in saved if found.get(name) != saved[name]}
    for bucket in there:
        delete(store, bucket, [key for owner, key in later if owner == bucket])
    for bucket in there ^ buckets:
        with s3_errors(f"s3://{bucket}"):
            (store.create_bucket if bucket in buckets else store.delete_bucket)(Bucket=bucket)
    for bucket, key in sorted(changed):
        with s3_errors(f"s3://{bucket}/{key}"), _below(folder / "buckets" / bucket, key).open("rb") as body:
            saved[bucket, key] = store.put_object(Bucket=bucket, Key=key, Body=body)["ETag"]
    # An object that was written in several parts has another ETag when it is written in one.
    write_private(folder / ETAGS, json.dumps([[*name, etag] for name, etag in saved.items()]))
    return len(later), len(changed)


def copy_sqlite(source: Path, target: Path) -> None:
    """Copy a database that may be written to meanwhile, as of one moment, over what the target holds, at once."""
    with closing(sqlite3.connect(source)) as old, closing(sqlite3.connect(target)) as new:
        old.backup(new)


def bucket_names(store: Any) -> list[str]:
    """List the buckets that are there."""
    with s3_errors("s3://"):
        return [entry["Name"] for entry in store.list_buckets()["Buckets"]]


def _download(store: Any, folder: Path, bucket: str, key: str) -> str:
    """Copy one object below a folder, and give its ETag."""
    path = _below(folder / bucket, key)
    path.parent.mkdir(parents=True, exist_ok=True)
    with s3_errors(f"s3://{bucket}/{key}"), path.open("wb") as file:
        answer = store.get_object(Bucket=bucket, Key=key)
        shutil.copyfileobj(answer["Body"], file)
    return str(answer["ETag"])


def _etags(store: Any, bucket: str) -> dict[str, str]:
    """Give the ETag of each object of a bucket, by key."""
    with s3_errors(f"s3://{bucket}"):
        return {
            entry["Key"]: entry["ETag"]
            for page in store.get_paginator("list_objects_v2").paginate(Bucket=bucket)
            for entry in page.get("Contents", ())
            if not entry["Key"].endswith("/")
        }


def _below(folder: Path, key: str) -> Path:
    """Turn a key into a path, which must not lead out of the folder."""
    path = (folder / key).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise MissingObjectError(f"the key {key!r} can't be a file's name; copy its bucket with another tool")
    return path
