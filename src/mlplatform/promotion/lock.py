"""A lock that every machine of a platform shares: an object that is only ever replaced if nobody else replaced it.

S3's conditional writes (`If-None-Match`, `If-Match`) make taking, renewing and freeing it one step each. Times are the
object store's own, so the clocks of the machines do not matter.
"""

from __future__ import annotations

import json
import os
import random
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import quote
from uuid import uuid4

import botocore.exceptions

from mlplatform.connection import s3_client
from mlplatform.errors import RegistryError
from mlplatform.objectstore import s3_errors
from mlplatform.settings import ARTIFACTS_BUCKET, find_settings

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

LEASE_S = 120.0  # a promotion takes seconds; whoever holds the lock longer is taken for dead
WAIT_S = 300.0
_CHANGED = {"PreconditionFailed", "ConditionalRequestConflict", "412", "409"}


@dataclass
class Lock:
    """A lock that this process holds.

    Attributes:
        client: The object store's client.
        key: Where the lock lies in the bucket of the artifacts.
        holder: Who holds it: host, process, and an id that occurs once.
        etag: What the object must still be for the next write to succeed.
    """

    client: S3Client
    key: str
    holder: str
    etag: str = ""

    def renew(self) -> None:
        """Start the lease again; call it before a write that only the holder may do.

        Raises:
            RegistryError: The lease ended and somebody else took the lock.
        """
        if not self.write(self.holder):
            raise RegistryError(f"{self.holder} lost the lock {self.key} to somebody else; run the command again")

    def write(self, holder: str) -> bool:
        """Write a holder, or none, if nobody else has written since; say whether it was done."""
        body = json.dumps({"holder": holder, "lease_s": LEASE_S, "nonce": uuid4().hex}).encode()
        condition: dict[str, Any] = {"IfMatch": self.etag} if self.etag else {"IfNoneMatch": "*"}
        try:
            self.etag = self.client.put_object(Bucket=ARTIFACTS_BUCKET, Key=self.key, Body=body, **condition)["ETag"]
        except botocore.exceptions.ClientError as error:
            if error.response["Error"]["Code"] not in _CHANGED:
                raise
            # A write whose answer was lost is repeated by the client, and then refused: it was done all the same.
            try:
                found = self.client.get_object(Bucket=ARTIFACTS_BUCKET, Key=self.key)
            except self.client.exceptions.NoSuchKey:
                return False
            if found["Body"].read() != body:
                return False
            self.etag = found["ETag"]
        return True


@contextmanager
def exclusive(name: str, *, wait_s: float = WAIT_S) -> Iterator[Lock]:
    """Hold the lock of a name; wait while another process holds it, and take it over once that one's lease has ended.

    Args:
        name: What is locked.
        wait_s: How long to wait, in seconds.

    Raises:
        RegistryError: It is still held after that time; the message names the holder.
    """
    holder = f"{socket.gethostname()}:{os.getpid()}:{uuid4().hex[:8]}"
    lock = Lock(s3_client(find_settings()), f"locks/{quote(name, safe='')}.json", holder)
    uri, deadline = f"s3://{ARTIFACTS_BUCKET}/{lock.key}", time.monotonic() + wait_s
    with s3_errors(uri):
        while other := _held_by_other(lock) or ("" if lock.write(holder) else "somebody"):
            if time.monotonic() > deadline:
                raise RegistryError(f"{other} holds the lock {uri} for over {wait_s:.0f} s; try again when it is done")
            time.sleep(random.uniform(0.05, 0.3))
    try:
        yield lock
    finally:
        with s3_errors(uri):
            lock.write("")


def _held_by_other(lock: Lock) -> str:
    """Read who holds the lock, and remember the state that was read; nobody when it is free, or its lease has ended."""
    try:
        answer = lock.client.get_object(Bucket=ARTIFACTS_BUCKET, Key=lock.key)
    except lock.client.exceptions.NoSuchKey:
        lock.etag = ""
        return ""
    now = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
    said, lock.etag = json.loads(answer["Body"].read()), answer["ETag"]
    ended = (now - answer["LastModified"]).total_seconds() > said["lease_s"]
    return "" if ended else str(said["holder"])
