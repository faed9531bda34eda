"""One fast read of online features for several users."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import redis

from mlplatform import table
from mlplatform.errors import RegistryError, credentials_refused, service_down
from mlplatform.feature_client import checked_users


@dataclass(frozen=True)
class OnlineRow:
    """What the online store holds of one user.

    Attributes:
        row: The raw columns in the order of the description; none when the store does not hold all of them.
        oldest: The event time of the oldest of its features, in seconds since 1970; 0 when there is none.
    """

    row: Sequence[str | float] | None
    oldest: float


class OnlineReader:
    """Reads the features of a service for several users in one round trip.

    Feast's `get_online_features` takes 20 ms of CPU. This sends the same `HMGET`s in one pipeline, without Feast's
    registry, frames and protobuf answers in between; a test holds it equal to Feast's own answer for every user.

    Args:
        store: Feast's store, which says where the values lie.
        service: The name of the feature service.
        url: The online store as a URL.
        timeout_s: How long the store may take, in seconds.

    Raises:
        RegistryError: There is no such service, or it lacks one of the columns.
    """

    def __init__(self, store: Any, service: str, url: str, *, timeout_s: float = 2.0) -> None:
        from feast.errors import FeastObjectNotFoundException
        from feast.infra.online_stores.helpers import _mmh3
        from feast.protos.feast.types.Value_pb2 import Value

        from mlplatform.feast_plugins.online_hashes import HashNames, read_hashes

        self._value: Any = Value
        described = table.current()
        self._hashes, self._read_hashes = HashNames(described.entity.key, store.project), read_hashes
        try:
            projections = store.get_feature_service(service).feature_view_projections
        except FeastObjectNotFoundException as error:
            raise RegistryError(f"{error}; run 'make features'") from error
        where = {entry.name: view.name_to_use() for view in projections for entry in view.features}
        names = list(described.features.values())
        missing = [column for column, name in described.features.items() if name not in where]
        if missing:
            raise RegistryError(f"the feature service {service!r} lacks {', '.join(missing)}; run 'make features'")
        views = sorted({where[name] for name in names})
        self._fields: list[Any] = [_mmh3(f"{where[name]}:{name}") for name in names]
        self._kinds = ["double_val" if column in described.numbers else "string_val" for column in described.columns]
        self._fields += [f"_ts:{view}" for view in views]
        self._client = redis.Redis.from_url(url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s)
        self._address = url.rpartition("@")[2]

    def read(self, users: Sequence[str]) -> list[OnlineRow]:
        """Read what the store holds of some users, in the order asked.

        Raises:
            DataError: No user was asked about, or an id is no text.
            ServiceDownError: The online store does not answer.
            CredentialsError: It refuses the password.
        """
        names = self._hashes([user.encode() for user in checked_users(users)])
        try:
            return [self._decode(values) for values in self._read_hashes(self._client, names, self._fields)]
        except redis.AuthenticationError as error:
            raise credentials_refused("online store", self._address, "REDIS_CONNECTION_STRING") from error
        except redis.RedisError as error:
            raise service_down("online store", self._address) from error

    def _decode(self, values: Sequence[bytes | None]) -> OnlineRow:
        from google.protobuf.timestamp_pb2 import Timestamp  # type: ignore[import-untyped]

        stored, moments = values[: len(self._kinds)], values[len(self._kinds) :]
        if any(moment is None for moment in moments) or any(value is None for value in stored):
            return OnlineRow(None, 0.0)
        row = [getattr(self._value.FromString(value), kind) for value, kind in zip(stored, self._kinds, strict=True)]
        seconds = [Timestamp.FromString(moment) for moment in moments if moment is not None]
        return OnlineRow(row, min(moment.seconds + moment.nanos / 1e9 for moment in seconds))
