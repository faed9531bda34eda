"""The feature registry in the object store, safe against two writers at once.

Feast rewrites the whole registry file with every change, so the slower of two writers would undo the other's work in
silence. The class here makes each write conditional on the file still being the one that was read.
"""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import botocore.exceptions
from feast.infra.registry.registry_store import RegistryStore
from feast.protos.feast.core.Registry_pb2 import Registry as RegistryProto
from feast.repo_config import RegistryConfig
from feast.utils import _utc_now

from mlplatform import objectstore
from mlplatform.connection import s3_client
from mlplatform.errors import RegistryError
from mlplatform.objectstore import s3_errors


class ConditionalS3RegistryStore(RegistryStore):
    """Keeps the registry in one object and refuses to overwrite a change it has not seen.

    `feature_store.yaml` names this class, so Feast's own commands are protected too. The endpoint and the keys come
    from the standard `AWS_*` variables.

    Args:
        registry_config: Feast's configuration; `path` is `s3://bucket/key`.
        repo_path: Not used; part of Feast's interface.
    """

    def __init__(self, registry_config: RegistryConfig, repo_path: Path | None) -> None:
        self._uri = str(registry_config.path)
        self._bucket, self._key = objectstore.split_uri(self._uri)
        self._client = s3_client()
        self._etag: str | None = None

    def get_registry_proto(self) -> RegistryProto:
        """Read the registry and remember which version of it that was.

        Raises:
            MissingObjectError: There is none yet. It is a `FileNotFoundError`, upon which Feast makes an empty one.
        """
        self._etag = None
        with s3_errors(self._uri):
            answer = self._client.get_object(Bucket=self._bucket, Key=self._key)
            body = answer["Body"].read()
        self._etag = answer["ETag"]
        registry: RegistryProto = RegistryProto.FromString(body)
        return registry

    def update_registry_proto(self, registry_proto: RegistryProto) -> None:
        """Write the registry, provided that nobody wrote it since it was read.

        Raises:
            RegistryError: Somebody did; nothing is written.
        """
        registry_proto.version_id = str(uuid.uuid4())
        registry_proto.last_updated.FromDatetime(_utc_now())
        condition: dict[str, Any] = {"IfMatch": self._etag} if self._etag else {"IfNoneMatch": "*"}
        with s3_errors(self._uri):
            try:
                answer = self._client.put_object(
                    Bucket=self._bucket, Key=self._key, Body=registry_proto.SerializeToString(), **condition
                )
            except botocore.exceptions.ClientError as error:
                if error.response["Error"]["Code"] not in {"PreconditionFailed", "ConditionalRequestConflict", "412"}:
                    raise
                raise RegistryError(
                    f"{self._uri} was changed by another command meanwhile; nothing was written, run it again"
                ) from error
        self._etag = answer["ETag"]

    def teardown(self) -> None:
        """Delete the registry."""
        with s3_errors(self._uri):
            self._client.delete_object(Bucket=self._bucket, Key=self._key)
        self._etag = None
