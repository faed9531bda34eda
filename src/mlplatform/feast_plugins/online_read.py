"""Online features of plain views in one round trip, as the very message that Feast itself would answer with.

Feast makes a message of each key, of each view's rows and of each time, and reads view by view. Where all views ask by
the same single text key, their values lie in one hash: one `HMGET` per key reads them, and what its fields are
called is worked out once. Whatever else is asked goes to Feast's own code: `plan` then says `None`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import feast.metrics
from feast import FeatureService, FeatureView, RepoConfig, ValueType, utils
from feast.infra.online_stores.helpers import _mmh3
from feast.infra.online_stores.online_store import OnlineStore
from feast.infra.online_stores.redis import RedisOnlineStoreConfig, RedisType
from feast.online_response import OnlineResponse
from feast.protos.feast.serving.ServingService_pb2 import FieldStatus, GetOnlineFeaturesResponse
from google.protobuf.timestamp_pb2 import Timestamp  # type: ignore[import-untyped]

from mlplatform.feast_plugins.online_hashes import HashNames, read_hashes


@dataclass(frozen=True, eq=False)
class OnlinePlan:
    """How to read some features of any number of keys.

    Attributes:
        key: The join key of all views, such as `user_id`.
        hashes: Names the hash of each id.
        fields: What is read from each hash: each view's event time, then the features.
        views: For each feature the place of its view's event time.
        head: The answer's names: the key, then the features, as a part of the answer's message.
        types: Feast's type of each feature, by name.
    """

    key: str
    hashes: HashNames
    fields: Sequence[str | bytes]
    views: Sequence[int]
    head: bytes
    types: Mapping[str, ValueType]

    def read(self, client: Any, ids: Sequence[str]) -> OnlineResponse:
        """Read the features of some keys, in the order asked."""
        encoded = [text.encode() for text in ids]
        return self._answer(encoded, read_hashes(client, self.hashes(encoded), self.fields))

    def _answer(self, ids: Sequence[bytes], rows: Sequence[Sequence[bytes | None]]) -> OnlineResponse:
        # What the store holds are messages already, so the answer is put together as bytes and parsed once.
        present = b"\x12" + _sized(bytes([FieldStatus.PRESENT]) * len(ids))  # as Feast says of null too
        columns = list(zip(*rows, strict=True))
        count = len(self.fields) - len(self.views)
        stored = {moment for column in columns[:count] for moment in column}
        moment_of = {moment: b"\x1a" + _sized(_rounded(moment)) for moment in stored}
        moments = [b"".join(map(moment_of.__getitem__, column)) for column in columns[:count]]
        asked = b"".join([b"\x0a" + _sized(b"\x12" + _sized(text)) for text in ids])
        vectors = [asked + present + b"\x1a\x00" * len(ids)]
        for column, view in zip(columns[count:], self.views, strict=True):
            values = b"".join([b"\x0a" + _sized(value or b"") for value in column])
            vectors.append(values + present + moments[view])
        results = [b"\x12" + _sized(vector) for vector in vectors]
        answer = GetOnlineFeaturesResponse.FromString(b"".join([self.head, *results]))
        return OnlineResponse(answer, feature_types=dict(self.types))


class OnlinePlans:
    """Works out how to read some features, once for each state of the registry."""

    def __init__(self) -> None:
        self._known: dict[Any, OnlinePlan | None] = {}
        self._registry_of: datetime | None = None

    def plan(
        self,
        config: RepoConfig,
        features: list[str] | FeatureService,
        registry: Any,
        project: str,
        full_names: bool,
    ) -> OnlinePlan | None:
        """Say how to read these features, or `None` where Feast must."""
        # A service is known by its name, and a registry by when it was read, as in Feast's own cache.
        asked = (features.name if isinstance(features, FeatureService) else tuple(features), project, full_names)
        read = registry.cached_registry_proto_created if hasattr(registry, "is_cache_valid") else None
        if read is None or read != self._registry_of or not registry.is_cache_valid() or len(self._known) >= 100:
            self._known.clear()  # a server is asked for anything, and must not keep it all
        if asked in self._known:
            return self._known[asked]
        context = utils._get_cached_request_context(registry, project, features, full_names)
        self._registry_of = getattr(registry, "cached_registry_proto_created", None)
        plan = self._known[asked] = _plan(config, features, context, project, full_names)
        return plan


def ids_of(rows: Any, key: str) -> list[str] | None:
    """Give the ids that Feast's entity rows ask about, if they hold this key and nothing else, and all are texts."""
    if isinstance(rows, Mapping):
        values = rows.get(key) if len(rows) == 1 else None
    else:
        values = [row.get(key) for row in rows] if all(len(row) == 1 for row in rows) else None
    if type(values) is not list or not values or any(type(value) is not str for value in values):
        return None
    return values


def _plan(
    config: RepoConfig, features: list[str] | FeatureService, context: tuple[Any, ...], project: str, full_names: bool
) -> OnlinePlan | None:
    _, on_demand, _, kinds, _, grouped, requested, request_data, entity_less = context
    online = config.online_store
    if (
        on_demand
        or request_data
        or entity_less
        or feast.metrics._config.enabled
        or getattr(features, "precompute_online", False)
        or config.entity_key_serialization_version != 3
        or config.registry.enable_online_feature_view_versioning
        or not isinstance(online, RedisOnlineStoreConfig)
        or online.redis_type == RedisType.redis_cluster
        or online.client != RedisOnlineStoreConfig.model_fields["client"].default
        or not all(_is_plain(view) for view, _ in grouped)
    ):
        return None
    keys = {view.entity_columns[0].name for view, _ in grouped}
    names = [
        f"{view.projection.name_to_use()}__{name}" if full_names else name
        for view, wanted in grouped
        for name in wanted
    ]
    key = keys.pop() if keys else ""
    if keys or kinds.get(key) != ValueType.STRING or key in names or len(names) != len(set(names)):
        return None
    if set(names) != set(requested):
        return None
    moments = [f"_ts:{view.name}" for view, _ in grouped]
    fields = [_mmh3(f"{view.name}:{name}") for view, wanted in grouped for name in wanted]
    views = [place for place, (_, wanted) in enumerate(grouped) for _ in wanted]
    types = OnlineStore._build_feature_types(grouped)
    head = GetOnlineFeaturesResponse()
    head.metadata.feature_names.val.extend([key, *names])
    return OnlinePlan(key, HashNames(key, project), [*moments, *fields], views, head.SerializeToString(), types)


def _is_plain(view: FeatureView) -> bool:
    projection = view.projection
    return (
        len(view.entity_columns) == 1
        and view.entity_columns[0].dtype.to_value_type() == ValueType.STRING
        and not projection.join_key_map
        and projection.version_tag is None
    )


def _rounded(stored: bytes | None) -> bytes:
    """Give an event time as Feast does, with the rounding of a float."""
    if not stored:
        return b""
    exact, rounded = Timestamp.FromString(stored), Timestamp()
    rounded.FromDatetime(datetime.fromtimestamp(exact.seconds + exact.nanos / 1_000_000_000.0, tz=UTC))
    return bytes(rounded.SerializeToString())


def _sized(body: bytes) -> bytes:
    """Put a message's length before it, as protobuf does: seven bits a byte, the last without the eighth."""
    size, head = len(body), b""
    while size > 127:
        head += bytes([size & 127 | 128])
        size >>= 7
    return head + bytes([size]) + body
