"""Loading the online store: Feast's local engine with a faster way into Redis.

Feast makes a protobuf message of every value of every row before it writes. Categories repeat, so this engine
serialises each distinct value once and lets the online store write the rows in large batches. What arrives in Redis
is byte for byte what Feast would have written.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute
from feast import FeatureView, FileSource, RepoConfig, ValueType
from feast.infra.common.materialization_job import MaterializationJobStatus, MaterializationTask
from feast.infra.compute_engines.local.compute import LocalComputeEngine, LocalComputeEngineConfig
from feast.infra.compute_engines.local.job import LocalMaterializationJob
from feast.infra.online_stores.helpers import _redis_key
from feast.infra.registry.base_registry import BaseRegistry
from feast.type_map import python_values_to_proto_values
from feast.utils import _build_entity_keys, _columns_to_proto_values, _get_column_names, _validate_vector_field_lengths
from pydantic import StrictStr

from mlplatform.errors import DataError
from mlplatform.feast_plugins import distributed
from mlplatform.feast_plugins.offline_store import S3DuckDBOfflineStore
from mlplatform.feast_plugins.online_hashes import HashNames
from mlplatform.feast_plugins.online_store import ExpiringRedisOnlineStore
from mlplatform.feast_plugins.parquet_source import ARROW_TYPES, ParquetFile, as_declared

# Rows per batch: large enough that round trips do not count, small enough that a batch is a few megabytes.
BATCH_ROWS = 5_000


class PipelinedComputeEngineConfig(LocalComputeEngineConfig):
    """The engine's part of `feature_store.yaml`; it needs nothing but the type."""

    # Feast's class allows "local" only; a type of one's own is its documented way of naming an engine.
    type: StrictStr = "mlplatform.feast_plugins.compute_engine.PipelinedComputeEngine"  # type: ignore[assignment]


@dataclass(frozen=True)
class MaterialisedView:
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


@dataclass(frozen=True)
class _Origin:
    view: str
    file: ParquetFile


class PipelinedComputeEngine(LocalComputeEngine):
    """Materialises plain feature views into Redis in bulk, and leaves everything else to Feast's engine.

    Attributes:
        listener: Called after each view with what was done; `None` for nobody.
    """

    listener: Callable[[MaterialisedView], None] | None = None

    def _materialize_one(
        self, registry: BaseRegistry, task: MaterializationTask, **kwargs: Any
    ) -> LocalMaterializationJob:
        if task.start_time > task.end_time:
            # Feast's incremental load begins where the last one ended, and would write nothing, in silence.
            raise DataError(
                f"{task.feature_view.name} was loaded up to {task.start_time:%Y-%m-%d %H:%M} UTC, which is after "
                f"{task.end_time:%Y-%m-%d %H:%M}: is this machine's clock right? name both ends: 'feast materialize'"
            )
        if not is_plain(task.feature_view, self.repo_config, self.offline_store, self.online_store):
            return super()._materialize_one(registry, task, **kwargs)
        job_id = f"{task.feature_view.name}-{task.start_time}-{task.end_time}"
        try:
            self._load(registry, task)
        except Exception as error:  # Feast raises what the job carries
            return LocalMaterializationJob(job_id, MaterializationJobStatus.ERROR, error)
        return LocalMaterializationJob(job_id, MaterializationJobStatus.SUCCEEDED)

    def _load(self, registry: BaseRegistry, task: MaterializationTask) -> None:
        started = time.perf_counter()
        rows, changed = distributed.load(self, registry, task) or self.load(registry, task)
        if self.listener:
            self.listener(MaterialisedView(task.feature_view.name, rows, changed, time.perf_counter() - started))

    def load(self, registry: BaseRegistry, task: MaterializationTask) -> tuple[int, int]:
        """Load a view in this process.

        Returns:
            How many keys had a value, and how many of them were new or newer than what was stored.
        """
        view = task.feature_view
        table = self._latest(registry, task)
        rows = self.repo_config.materialization_config.online_write_batch_size or BATCH_ROWS
        online: Any = self.online_store
        batches = table.combine_chunks().to_batches(max_chunksize=rows)
        # The server stores one batch while another is made.
        with ThreadPoolExecutor(2) as writers:
            changed = sum(writers.map(partial(write_batch, online, self.repo_config, view), batches))
        return len(table), changed

    def _latest(self, registry: BaseRegistry, task: MaterializationTask) -> pa.Table:
        """Read the latest row of each key, under the view's names and with the view's types."""
        view, source = task.feature_view, task.feature_view.batch_source
        assert source is not None  # noqa: S101
        entities = [registry.get_entity(name, task.project, allow_cache=True) for name in view.entities]
        keys, features, timestamp_field, created = _get_column_names(view, entities)
        table = self.offline_store.pull_latest_from_table_or_query(
            config=self.repo_config,
            data_source=source,
            join_key_columns=keys,
            feature_name_columns=features,
            timestamp_field=timestamp_field,
            created_timestamp_column=created or None,
            start_date=task.start_time,
            end_date=task.end_time,
        ).to_arrow()
        table = table.rename_columns([source.field_mapping.get(name, name) for name in table.column_names])
        origin = _Origin(view.name, ParquetFile.of(source, self.repo_config))
        for field in view.features:
            place = table.column_names.index(field.name)
            exact = as_declared(table.column(place), field.dtype.to_value_type(), origin, field.name)
            table = table.set_column(place, field.name, exact)
        if view.entity_columns:
            # A row without a key is nobody's, in history too.
            known = [pa.compute.is_valid(table.column(entity.name)) for entity in view.entity_columns]
            for column in known:
                table = table if pa.compute.all(column).as_py() else table.filter(column)
        return table


def write_batch(online: ExpiringRedisOnlineStore, config: RepoConfig, view: FeatureView, batch: pa.RecordBatch) -> int:
    """Store the rows whose event time is later than the one stored for their key.

    Args:
        online: The online store.
        config: Feast's configuration; its project is part of every key.
        view: The view.
        batch: Join keys, features and event time, with the view's names and types; no key twice.

    Returns:
        How many rows were stored.
    """
    source = view.batch_source
    assert source is not None  # noqa: S101
    _validate_vector_field_lengths(pa.Table.from_batches([batch]), view)
    names = [field.name for field in view.features]
    columns = [_serialised(field.name, field.dtype.to_value_type(), batch) for field in view.features]
    times = batch.column(source.timestamp_field).cast(pa.timestamp("us", "UTC"), safe=False)
    moments = times.cast(pa.int64()).to_pylist()
    return online.write_rows(config, view, _redis_keys(config, view, batch), moments, names, zip(*columns, strict=True))


def is_plain(view: FeatureView, config: RepoConfig, offline: Any, online: Any) -> bool:
    """Say whether a view is one that this engine knows: columns of parquet files, as they are, into a single Redis.

    Whatever else a view or the configuration says goes to Feast's engine.
    """
    settings: Any = config.online_store
    return (
        isinstance(offline, S3DuckDBOfflineStore)
        and isinstance(online, ExpiringRedisOnlineStore)
        and settings.redis_type != "redis_cluster"
        and not settings.skip_dedup
        and settings.key_ttl_seconds is None
        and type(view) is FeatureView
        and isinstance(view.batch_source, FileSource)
        and not view.source_views
        and not getattr(view, "feature_transformation", None)
        and not getattr(view, "aggregations", None)
        and not view.enable_validation
        and view.online
        and not view.offline
    )


def _redis_keys(config: RepoConfig, view: FeatureView, batch: pa.RecordBatch) -> list[bytes]:
    """Build Feast's keys; for a single one of text by hand, which is ten times as fast."""
    kinds = {entity.name: entity.dtype.to_value_type() for entity in view.entity_columns}
    version = config.entity_key_serialization_version
    if list(kinds.values()) != [ValueType.STRING] or version != 3:
        protos = _build_entity_keys(batch.num_rows, kinds, _columns_to_proto_values(batch, list(kinds.items())))
        return [_redis_key(config.project, key, entity_key_serialization_version=version) for key in protos]
    name = view.entity_columns[0].name
    return HashNames(name, config.project)([str(key).encode() for key in batch.column(name).to_pylist()])


# Feast's own way goes through numpy, whose lists of maps and times it does not take.
_NOT_FROM_NUMPY = {ValueType.MAP_LIST, ValueType.ZONED_TIMESTAMP}


def _native(value: Any, kind: pa.DataType) -> Any:
    """Make dictionaries of maps, which Arrow gives as pairs."""
    if value is not None and pa.types.is_map(kind):
        return dict(value)
    return [_native(item, kind.value_type) for item in value] if value is not None and pa.types.is_list(kind) else value


def _serialised(name: str, kind: ValueType, batch: pa.RecordBatch) -> list[bytes]:
    """Serialise a column, plain types each distinct value once; a null becomes an empty message, Feast's null."""
    if kind not in ARROW_TYPES:
        column = batch.column(name)
        if pa.types.is_map(column.type) or kind in _NOT_FROM_NUMPY:
            values = [_native(value, column.type) for value in column.to_pylist()]
            return [value.SerializeToString() for value in python_values_to_proto_values(values, kind)]
        return [value.SerializeToString() for value in _columns_to_proto_values(batch, [(name, kind)])[name]]
    encoded = pa.compute.dictionary_encode(batch.column(name), null_encoding="encode")
    distinct = python_values_to_proto_values(encoded.dictionary.to_pylist(), kind)
    messages = [value.SerializeToString() for value in distinct]
    return [messages[index] for index in encoded.indices.to_pylist()]
