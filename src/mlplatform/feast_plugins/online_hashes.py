"""The hashes in which Feast keeps the online values of entities with one text key: their names, and one read of all."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

from feast.infra.key_encoding_utils import serialize_entity_key_prefix
from feast.protos.feast.types.Value_pb2 import ValueType


class HashNames:
    """Names the hashes as Feast's `serialize_entity_key` of version 3 does, in a tenth of its time.

    Args:
        key: The join key, such as `user_id`.
        project: Feast's project.
    """

    def __init__(self, key: str, project: str) -> None:
        # The key's name, then type, length and text of the id, then the project.
        self._start = serialize_entity_key_prefix([key]) + struct.pack("<I", ValueType.STRING)
        self._end = project.encode()

    def __call__(self, ids: Sequence[bytes]) -> list[bytes]:
        """Name the hash of each id, which is given in UTF-8."""
        return [b"".join((self._start, struct.pack("<I", len(text)), text, self._end)) for text in ids]


def read_hashes(client: Any, names: Sequence[bytes], fields: Sequence[str | bytes]) -> list[Sequence[bytes | None]]:
    """Read the same fields of several hashes in one round trip."""
    if len(names) == 1:
        return [client.execute_command("HMGET", names[0], *fields)]
    pipeline = client.pipeline(transaction=False)
    for name in names:
        pipeline.execute_command("HMGET", name, *fields)
    found: list[Sequence[bytes | None]] = pipeline.execute()
    return found
