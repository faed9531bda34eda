"""Loading the online store: Feast's local engine with a faster way into Redis.

Feast makes a protobuf message of every value of every row before it writes. Categories repeat, so this engine
serialises each distinct value once, asks for the stored event times in one pipeline, and writes what is newer in
another. What arrives in Redis is byte for byte what Feast would have written.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute
from feast import BatchFeatureView, FeatureView, RepoConfig, StreamFeatureView, ValueType
from feast.infra.common.materialization_job import MaterializationJobStatus, MaterializationTask
from feast.infra.compute_engines.local.compute import LocalComputeEngine, LocalComputeEngineConfig
from feast.infra.compute_engines.local.job import LocalMaterializationJob
from feast.infra.key_encoding_utils import serialize_entity_key_prefix
from feast.infra.online_stores.helpers import _mmh3
from feast.infra.online_stores.redis import RedisOnlineStore, RedisOnlineStoreConfig, RedisType
from feast.infra.registry.base_registry import BaseRegistry
from feast.protos.feast.types.Value_pb2 import ValueType as ValueTypeProto
from feast.type_map import python_values_to_proto_values
from google.protobuf.timestamp_pb2 import Timestamp  # type: ignore[import-untyped]
from pydantic import StrictStr

from mlplatform.errors import DataError

# Rows per pipeline: large enough that round trips do not count, small enough that a batch is a few megabytes.
BATCH_ROWS = 10_000


class PipelinedComputeEngineConfig(LocalComputeEngineConfig):
    """The engine's part of `feature_store.yaml`; it needs nothing but the type."""

    # Feast's class allows "local" only; a type of one's own is its documented way of naming an engine.
    type: StrictStr = "mlplatform.feast_plugins.compute_engine.PipelinedComputeEngine"  # type: ignore[assignment]


@dataclass(frozen=True)
class Written:
    """What materialising one view did.

    Attributes:
        view: The view's name.
        rows: Keys that had a value in the time range.
        changed: How many of them were new or newer than what was stored.
        seconds: How long reading and writing took.
    """

    view: str
    rows: int
    changed: int
    seconds: float


class PipelinedComputeEngine(LocalComputeEngine):
    """Materialises plain feature views into Redis in bulk, and leaves everything else to Feast's engine.

    Attributes:
        listener: Called after each view with what was done; `None` for nobody.
    """

    listener: Callable[[Written], None] | None = None

    def _materialize_one(
        self, registry: BaseRegistry, task: MaterializationTask, **kwargs: Any
    ) -> LocalMaterializationJob:
        if not _is_plain(task.feature_view, self.repo_config, self.online_store):
            return super()._materialize_one(registry, task, **kwargs)
        job_id = f"{task.feature_view.name}-{task.start_time}-{task.end_time}"
        try:
            self._load(task)
        except Exception as error:  # Feast raises what the job carries
            return LocalMaterializationJob(job_id, MaterializationJobStatus.ERROR, error)
        return LocalMaterializationJob(job_id, MaterializationJobStatus.SUCCEEDED)

    def _load(self, task: MaterializationTask) -> None:
        started = time.perf_counter()
        view = task.feature_view
        source = view.batch_source
        assert source is not None  # noqa: S101
        table = self.offline_store.pull_latest_from_table_or_query(
            config=self.repo_config,
            data_source=source,
            join_key_columns=list(view.join_keys),
            feature_name_columns=[field.name for field in view.features],
            timestamp_field=source.timestamp_field,
            created_timestamp_column=source.created_timestamp_column or None,
            start_date=task.start_time,
            end_date=task.end_time,
        ).to_arrow()
        online: Any = self.online_store
        client = online._get_client(self.repo_config.online_store)
        changed = sum(
            write_batch(client, self.repo_config.project, view, batch)
            for batch in table.combine_chunks().to_batches(max_chunksize=BATCH_ROWS)
        )
        if self.listener:
            self.listener(Written(view.name, len(table), changed, time.perf_counter() - started))


def write_batch(client: Any, project: str, view: FeatureView, batch: pa.RecordBatch) -> int:
    """Store the rows whose event time is later than the one stored for their key.

    Reading the stored times and writing are two steps, as in Feast: of two commands that load the same key at the
    same time, either may win.

    Args:
        client: A redis-py client.
        project: Feast's project, part of every key.
        view: The view; its one join key is text.
        batch: Join key, features and event time; no key twice.

    Returns:
        How many rows were stored.

    Raises:
        DataError: A column holds another type than the view says.
    """
    source = view.batch_source
    assert source is not None  # noqa: S101
    keys = _redis_keys(project, view.join_keys[0], batch.column(view.join_keys[0]))
    moments = _timestamps(batch.column(source.timestamp_field))
    time_field = f"_ts:{view.name}".encode()
    fields = [_mmh3(f"{view.name}:{field.name}") for field in view.features]
    columns = [_serialised(view, field.name, field.dtype.to_value_type(), batch) for field in view.features]

    pipeline = client.pipeline(transaction=False)
    for key in keys:
        pipeline.execute_command("HGET", key, time_field)
    stored = pipeline.execute()

    changed = 0
    for key, moment, known, values in zip(keys, moments, stored, zip(*columns, strict=True), strict=True):
        if known is not None and not _is_later(moment, known):
            continue
        pairs = [part for pair in zip(fields, values, strict=True) for part in pair]
        pipeline.execute_command("HSET", key, time_field, moment, *pairs)
        changed += 1
    pipeline.execute()
    return changed


def _is_plain(view: FeatureView, config: RepoConfig, store: Any) -> bool:
    """Say whether a view is one that this engine knows: parquet columns as they are, one text key, a single Redis."""
    online: Any = config.online_store
    return (
        isinstance(store, RedisOnlineStore)
        and isinstance(online, RedisOnlineStoreConfig)
        and online.redis_type == RedisType.redis
        and online.key_ttl_seconds is None
        and not config.registry.enable_online_feature_view_versioning
        and not isinstance(view, (BatchFeatureView, StreamFeatureView))
        and view.batch_source is not None
        and not view.batch_source.field_mapping
        and view.online
        and not view.offline
        and [entity.dtype.to_value_type() for entity in view.entity_columns] == [ValueType.STRING]
    )


def _redis_keys(project: str, join_key: str, ids: pa.Array) -> list[bytes]:
    """Build Feast's keys, entity key serialisation version 3: key name, type, length, id, then the project."""
    if not (pa.types.is_string(ids.type) or pa.types.is_large_string(ids.type)):
        raise DataError(f"{join_key} is {ids.type} and not text; run 'make features'")
    start = serialize_entity_key_prefix([join_key]) + struct.pack("<I", ValueTypeProto.STRING)
    end = project.encode()
    encoded = [user.encode() for user in ids.to_pylist()]
    return [b"".join((start, struct.pack("<I", len(user)), user, end)) for user in encoded]


def _timestamps(times: pa.Array) -> list[bytes]:
    moments = times.cast(pa.timestamp("us", "UTC")).cast(pa.int64()).to_pylist()
    return [
        Timestamp(seconds=moment // 1_000_000, nanos=moment % 1_000_000 * 1_000).SerializeToString()
        for moment in moments
    ]


def _is_later(moment: bytes, known: bytes) -> bool:
    if moment == known:
        return False
    new, old = Timestamp.FromString(moment), Timestamp.FromString(known)
    return bool((new.seconds, new.nanos) > (old.seconds, old.nanos))


def _serialised(view: FeatureView, name: str, kind: ValueType, batch: pa.RecordBatch) -> list[bytes]:
    """Serialise a column, each distinct value once; a null becomes an empty message, which Feast reads as null."""
    column = batch.column(name)
    is_text = pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
    # Feast's conversion would write the number 1 as the text "1".
    if kind == ValueType.STRING and not is_text and column.null_count < len(column):
        raise DataError(f"{view.name}:{name} is {column.type}, and its view says {kind.name}; run 'make features'")
    encoded = pa.compute.dictionary_encode(column, null_encoding="encode")
    distinct = python_values_to_proto_values(encoded.dictionary.to_pylist(), kind)
    messages = [value.SerializeToString() for value in distinct]
    return [messages[index] for index in encoded.indices.to_pylist()]
