"""Feast's offline store on DuckDB, reading parquet from the object store.

Feast's own DuckDB store cannot reach an S3-compatible endpoint, its file store drops rows. This one answers each row
asked for with exactly one row, in the order asked, and leaves a feature null where the value did not exist yet, is
past its ttl, or the key is unknown. `feature_store.yaml` names the class, so that all of Feast's API goes through it.
"""

from __future__ import annotations

import logging
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
from feast.data_format import ParquetFormat
from feast.data_source import DataSource
from feast.errors import SavedDatasetLocationAlreadyExists
from feast.feature_logging import LoggingConfig, LoggingSource
from feast.feature_view import DUMMY_ENTITY_ID, DUMMY_ENTITY_VAL, FeatureView
from feast.infra.offline_stores.duckdb import DuckDBOfflineStore, DuckDBOfflineStoreConfig
from feast.infra.offline_stores.file_source import FileLoggingDestination, FileSource, SavedDatasetFileStorage
from feast.infra.offline_stores.offline_store import RetrievalJob, RetrievalMetadata
from feast.infra.registry.base_registry import BaseRegistry
from feast.on_demand_feature_view import OnDemandFeatureView
from feast.repo_config import RepoConfig
from feast.saved_dataset import SavedDatasetStorage
from pydantic import StrictStr

from mlplatform.errors import DataError, MissingObjectError
from mlplatform.feast_plugins import distributed
from mlplatform.feast_plugins.duckdb_s3 import connection, duckdb_errors, quote_name
from mlplatform.feast_plugins.moments import microseconds
from mlplatform.feast_plugins.parquet_source import ParquetFile, _in_utc, check_endpoint, filesystem, quoted
from mlplatform.feast_plugins.point_in_time import Lookup, point_in_time, tie_breakers
from mlplatform.history import EVENT_TIMESTAMP

_LOG = logging.getLogger(__name__)
# How far back a range without a start reaches where no view has a ttl; Feast's own choice.
DEFAULT_RANGE = timedelta(days=30)


def _reach_endpoint(path: str, s3_endpoint_override: str, *_: Any, **__: Any) -> tuple[Any, str]:
    if not path.startswith("s3://"):
        return None, path
    check_endpoint(s3_endpoint_override, path)
    return filesystem(path)


# Inferring a schema asks the source itself and not the store, and Arrow ignores AWS_ENDPOINT_URL: Feast 0.67 offers no
# other place to name the platform's object store than here, where importing the store lets it be known.
FileSource.create_filesystem_and_path = staticmethod(_reach_endpoint)  # type: ignore[method-assign]


class S3DuckDBOfflineStoreConfig(DuckDBOfflineStoreConfig):
    """The store's part of `feature_store.yaml`; it needs nothing but the type.

    Attributes:
        scheduler: Address of the Dask scheduler on whose workers history and materialising run. Empty, or a variable
            that is not set: in this process.
    """

    type: StrictStr = "mlplatform.feast_plugins.offline_store.S3DuckDBOfflineStore"
    scheduler: str = ""


class S3DuckDBOfflineStore(DuckDBOfflineStore):
    """Point-in-time joins with DuckDB over parquet files that `FileSource` names as `s3://bucket/key` or as a path."""

    supports_filter_by_created_timestamp = True

    @staticmethod
    def get_historical_features(
        config: RepoConfig,
        feature_views: list[FeatureView],
        feature_refs: list[str],
        entity_df: pd.DataFrame | str | None,
        registry: BaseRegistry,
        project: str,
        full_feature_names: bool = False,
        filter_by_created_timestamp: bool = False,
        **options: Any,
    ) -> RetrievalJob:
        """Answer each row of an entity frame with the values its key had at that moment.

        A value belongs to the row when its event time is not after the row's, and is older by no more than the
        view's ttl: a value of exactly that age still counts, as everywhere in Feast. Times are compared in whole
        microseconds.

        Args:
            config: Feast's configuration.
            feature_views: The views asked for.
            feature_refs: `view:feature` for each feature asked for.
            entity_df: Join keys, a time column (`event_timestamp`, or the only one), and whatever else the caller
                wants back beside the features. Naive times are UTC. With `None`, the rows are every key and event
                time that the views have between the options `start_date` and `end_date`.
            registry: Feast's registry.
            project: Feast's project.
            full_feature_names: Whether to name features `view__feature`.
            filter_by_created_timestamp: Whether a value counts only if it was written before the row's moment.
            options: `start_date` and `end_date`.

        Returns:
            A job whose result has the entity frame's rows and columns, in its order, times in UTC, and the features.

        Raises:
            DataError: The entity frame is none, lacks a key or a time, or has a feature's name as a column.
        """
        views = [Lookup.of(view, feature_refs, full_feature_names, config) for view in feature_views]
        if entity_df is None:
            entity_df = _range_frame(views, options.get("start_date"), options.get("end_date"))
        if not isinstance(entity_df, pd.DataFrame):
            keys = dict.fromkeys(column for view in views for column in view.keys.values())
            columns = ", ".join([*keys, EVENT_TIMESTAMP])
            raise DataError(f"history needs a data frame with {columns}; this store takes no query in its place")
        time_column = find_time_column(entity_df)
        # Without pandas' cache of distinct times, which costs more here than it saves.
        times = pd.to_datetime(entity_df[time_column], utc=True, cache=False)
        entities = _entity_table(entity_df.assign(**{time_column: times}), views)
        join = distributed.join_of(config) or point_in_time
        return ArrowJob(
            lambda: join(entities, time_column, views, created_before=filter_by_created_timestamp),
            full_feature_names=full_feature_names,
            on_demand_feature_views=OnDemandFeatureView.get_requested_odfvs(feature_refs, project, registry),
            metadata=RetrievalMetadata(
                features=feature_refs,
                keys=[name for name in entities.column_names if name != time_column],
                min_event_timestamp=times.min(),
                max_event_timestamp=times.max(),
            ),
        )

    @staticmethod
    def pull_latest_from_table_or_query(
        config: RepoConfig,
        data_source: DataSource,
        join_key_columns: list[str],
        feature_name_columns: list[str],
        timestamp_field: str,
        created_timestamp_column: str | None,
        start_date: datetime,
        end_date: datetime,
    ) -> RetrievalJob:
        """Give the latest row of each key within a time range, both ends included; what materialising reads.

        Returns:
            A job whose result has the join keys, the features and the time columns, one row per key, in no order.
        """
        ties = tie_breakers(created_timestamp_column or None, feature_name_columns)
        latest = ", ".join(f"{quote_name(column)} DESC NULLS LAST" for column in [timestamp_field, *ties])
        partition = f"PARTITION BY {quoted(join_key_columns)}" if join_key_columns else ""
        return _pull(
            ParquetFile.of(data_source, config),
            [*join_key_columns, *feature_name_columns],
            timestamp_field,
            created_timestamp_column,
            (start_date, end_date),
            f"QUALIFY row_number() OVER ({partition} ORDER BY {latest}) = 1",
            entity_less=not join_key_columns,
        )

    @staticmethod
    def pull_all_from_table_or_query(
        config: RepoConfig,
        data_source: DataSource,
        join_key_columns: list[str],
        feature_name_columns: list[str],
        timestamp_field: str,
        created_timestamp_column: str | None = None,
        start_date: datetime | None = None,
        end_date: datetime | None = None,
    ) -> RetrievalJob:
        """Give every row within a time range, both ends included.

        Returns:
            A job whose result has the join keys, the features and the time columns, in no order.
        """
        return _pull(
            ParquetFile.of(data_source, config),
            [*join_key_columns, *feature_name_columns],
            timestamp_field,
            created_timestamp_column,
            (start_date, end_date),
        )

    @staticmethod
    def offline_write_batch(
        config: RepoConfig, feature_view: FeatureView, table: pa.Table, progress: Callable[[int], Any] | None
    ) -> None:
        """Add rows to a view's file; this rewrites the file, so one writer at a time.

        Raises:
            DataError: The rows have other columns than the file, or types that would change a value.
        """
        assert feature_view.batch_source is not None  # noqa: S101
        file = ParquetFile.of(feature_view.batch_source, config)
        files, path = filesystem(file.uri)
        target = f"{path.rstrip('/')}/{uuid.uuid4().hex}.parquet"
        if files.get_file_info(path).is_file:
            with files.open_input_file(path) as opened:
                stored = pq.read_table(opened)
            if set(stored.column_names) != set(table.column_names):
                raise DataError(
                    f"{file.described} has the columns {', '.join(stored.column_names)}, and the rows have "
                    f"{', '.join(table.column_names)}; give the same columns"
                )
            try:
                added = table.select(stored.column_names).cast(stored.schema)
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
                raise DataError(f"the rows do not fit {file.described}: {error}; give the file's types") from error
            table, target = pa.concat_tables([stored, added]), path
        elif Path(path).suffix:
            target = path
        _write(files, target, table)
        if progress:
            progress(len(table))

    @staticmethod
    def write_logged_features(
        config: RepoConfig,
        data: pa.Table | Path,
        source: LoggingSource,
        logging_config: LoggingConfig,
        registry: BaseRegistry,
    ) -> None:
        """Add a file of logged features to the destination's folder."""
        destination = logging_config.destination
        assert isinstance(destination, FileLoggingDestination)  # noqa: S101
        check_endpoint(destination.s3_endpoint_override, f"logging destination {destination.path}")
        table = data if isinstance(data, pa.Table) else pq.read_table(data)
        files, path = filesystem(destination.path)
        pq.write_to_dataset(
            table,
            path,
            filesystem=files,
            partition_cols=destination.partition_by,
            basename_template=f"{uuid.uuid4().hex}-{{i}}.parquet",
            existing_data_behavior="overwrite_or_ignore",
        )

    def validate_data_source(self, config: RepoConfig, data_source: DataSource) -> None:
        """Warn of a source that can't be read or lacks its event time, as Feast does: it may be written later.

        Raises:
            DataError: It is no parquet file, or in another object store.
        """
        file = ParquetFile.of(data_source, config)
        column_of = {new: old for old, new in data_source.field_mapping.items()}
        timestamp_field = column_of.get(data_source.timestamp_field, data_source.timestamp_field)
        try:
            with connection() as duck:
                file.describe(duck, [timestamp_field], timestamp_field)
        except (DataError, MissingObjectError) as error:
            _LOG.warning("%s", error)

    def get_table_column_names_and_types_from_data_source(
        self, config: RepoConfig, data_source: DataSource
    ) -> Iterable[tuple[str, str]]:
        """Give the columns of a source with Arrow's name of each type; Feast infers its schema from them."""
        columns: Iterable[tuple[str, str]] = data_source.get_table_column_names_and_types(config)
        return columns

    @staticmethod
    def compute_monitoring_metrics(config: RepoConfig, data_source: DataSource, *args: Any, **options: Any) -> Any:
        """Compute Feast's figures of a source, from a local copy of it."""
        with _local_copy(config, data_source) as copy:
            return DuckDBOfflineStore.compute_monitoring_metrics(config, copy, *args, **options)

    @staticmethod
    def get_monitoring_max_timestamp(config: RepoConfig, data_source: DataSource, timestamp_field: str) -> Any:
        """Find the last event time of a source, from a local copy of it."""
        with _local_copy(config, data_source) as copy:
            return DuckDBOfflineStore.get_monitoring_max_timestamp(config, copy, timestamp_field)


def find_time_column(entity_df: pd.DataFrame) -> str:
    """Find the column that says when: `event_timestamp`, or the only column of times.

    Raises:
        DataError: There is none, several could be meant, or it holds text.
    """
    times = [str(name) for name in entity_df.columns if pd.api.types.is_datetime64_any_dtype(entity_df[name])]
    if EVENT_TIMESTAMP not in entity_df.columns:
        if len(times) == 1:
            return times[0]
        found = f"columns of times: {', '.join(times)}" if times else "no column of times"
        raise DataError(f"the entity frame has {found}; name the moment of each row {EVENT_TIMESTAMP}")
    kind = pd.api.types.infer_dtype(entity_df[EVENT_TIMESTAMP])
    if EVENT_TIMESTAMP not in times and kind not in {"datetime", "empty"}:
        raise DataError(
            f"{EVENT_TIMESTAMP} of the entity frame holds {kind} values and no times; "
            "convert it with pd.to_datetime(..., utc=True)"
        )
    return EVENT_TIMESTAMP


def _entity_table(entity_df: pd.DataFrame, views: Sequence[Lookup]) -> pa.Table:
    needed = [column for view in views for column in view.keys.values()]
    missing = [column for column in dict.fromkeys(needed) if column not in entity_df.columns]
    if missing:
        raise DataError(f"the entity frame has no column {', '.join(missing)}; add the ids to ask about")
    doubled = [name for view in views for name in view.features if name in entity_df.columns]
    if doubled:
        raise DataError(
            f"the entity frame has columns named like features ({', '.join(doubled)}); "
            "drop them, or ask with full_feature_names=True"
        )
    try:
        return pa.Table.from_pandas(entity_df, preserve_index=False)
    except UnicodeEncodeError as error:
        raise DataError(
            f"the entity frame holds {error.object[:60]!a}, with half of a surrogate pair; correct it"
        ) from error


def _range_frame(views: Sequence[Lookup], start: datetime | None, end: datetime | None) -> pd.DataFrame:
    """Make the entity frame of a time range: each key and event time that a view has in it, in their order."""
    end = end or datetime.now(UTC)
    start = start or end - max((view.ttl for view in views if view.ttl), default=DEFAULT_RANGE)
    keys = list(dict.fromkeys(column for view in views for column in view.keys.values()))
    with connection() as duck:
        for view in views:
            view.file.describe(duck, view.columns, view.timestamp_field)
        spines = " UNION BY NAME ".join(view.spine(start, end) for view in views)
        order = quoted([*keys, EVENT_TIMESTAMP])
        rows = duck.sql(f"SELECT DISTINCT {order} FROM ({spines}) ORDER BY {order}").to_arrow_table()  # noqa: S608
    frame: pd.DataFrame = rows.to_pandas(types_mapper=_NULLABLE.get)
    return frame


# Keys of views that lack each other's are null; as floats they would compare as others than those of the files.
_NULLABLE = {pa.int64(): pd.Int64Dtype(), pa.int32(): pd.Int32Dtype()}


def _pull(
    file: ParquetFile,
    columns: Sequence[str],
    timestamp_field: str,
    created_column: str | None,
    limits: tuple[datetime | None, datetime | None],
    suffix: str = "",
    *,
    entity_less: bool = False,
) -> RetrievalJob:
    wanted = list(dict.fromkeys([*columns, timestamp_field, *([created_column] if created_column else [])]))
    moment = f"epoch_us({quote_name(timestamp_field)})"
    bounds = [
        f"{moment} {sign} {microseconds(limit)}" for sign, limit in zip((">=", "<="), limits, strict=True) if limit
    ]
    # Feast stores a view without entities under one key of its own.
    selected = quoted(wanted) + (f", '{DUMMY_ENTITY_VAL}' AS {DUMMY_ENTITY_ID}" if entity_less else "")
    query = f"SELECT {selected} FROM {file.scan()} WHERE {' AND '.join(bounds) or 'true'} {suffix}"  # noqa: S608

    def run() -> pa.Table:
        with connection() as duck, duckdb_errors(file.described):
            file.describe(duck, wanted, timestamp_field)
            table = duck.sql(query).to_arrow_table()
        return pa.table([_in_utc(column) for column in table.columns], names=table.column_names)

    return ArrowJob(run)


@contextmanager
def _local_copy(config: RepoConfig, source: DataSource) -> Iterator[FileSource]:
    file = ParquetFile.of(source, config)
    with tempfile.TemporaryDirectory() as folder, connection() as duck, duckdb_errors(file.described):
        path = str(Path(folder) / "copy.parquet")
        duck.sql(f"SELECT * FROM {file.scan()}").write_parquet(path)  # noqa: S608
        yield FileSource(
            name=source.name,
            path=path,
            file_format=ParquetFormat(),
            timestamp_field=source.timestamp_field,
            created_timestamp_column=source.created_timestamp_column,
            field_mapping=dict(source.field_mapping),
        )


def _write(files: pa.fs.FileSystem, path: str, table: pa.Table) -> None:
    if isinstance(files, pa.fs.LocalFileSystem):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        # Replaced at once, so that nobody reads half a file.
        pq.write_table(table, f"{path}.new")
        Path(f"{path}.new").replace(path)
    else:
        pq.write_table(table, path, filesystem=files)


class ArrowJob(RetrievalJob):
    """A query that runs when its result is asked for."""

    def __init__(
        self,
        run: Callable[[], pa.Table],
        *,
        full_feature_names: bool = False,
        on_demand_feature_views: Sequence[OnDemandFeatureView] = (),
        metadata: RetrievalMetadata | None = None,
    ) -> None:
        super().__init__()
        self._run = run
        self._full_feature_names = full_feature_names
        self._on_demand_feature_views = list(on_demand_feature_views)
        self._metadata = metadata

    @property
    def full_feature_names(self) -> bool:  # noqa: D102 - Feast's interface
        return self._full_feature_names

    @property
    def on_demand_feature_views(self) -> list[OnDemandFeatureView]:  # noqa: D102 - Feast's interface
        return self._on_demand_feature_views

    @property
    def metadata(self) -> RetrievalMetadata | None:  # noqa: D102 - Feast's interface
        return self._metadata

    def _to_arrow_internal(self, timeout: int | None = None) -> pa.Table:
        return self._run()

    def _to_df_internal(self, timeout: int | None = None) -> pd.DataFrame:
        frame: pd.DataFrame = self._run().to_pandas()
        return frame

    def persist(self, storage: SavedDatasetStorage, allow_overwrite: bool = False, timeout: int | None = None) -> None:
        """Write the result as parquet; Feast's saved data sets use this.

        Raises:
            SavedDatasetLocationAlreadyExists: The file exists and may not be replaced.
        """
        assert isinstance(storage, SavedDatasetFileStorage)  # noqa: S101
        uri = storage.file_options.uri
        check_endpoint(storage.file_options.s3_endpoint_override, f"saved data set {uri}")
        files, path = filesystem(uri)
        if not allow_overwrite and files.get_file_info(path).type != pa.fs.FileType.NotFound:
            raise SavedDatasetLocationAlreadyExists(location=uri)
        target = path if Path(path).suffix else f"{path.rstrip('/')}/part-0.parquet"
        _write(files, target, self.to_arrow())
