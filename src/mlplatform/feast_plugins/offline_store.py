"""Feast's offline store on DuckDB, reading parquet from the object store.

Feast's own DuckDB store cannot reach an S3-compatible endpoint, its file store drops rows. This one answers each row
asked for with exactly one row, in the order asked, and leaves a feature null where the value did not exist yet, is
past its ttl, or the user is unknown. `feature_store.yaml` names the class, so that all of Feast's API goes through it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
from feast.data_source import DataSource
from feast.feature_view import FeatureView
from feast.infra.offline_stores.duckdb import DuckDBOfflineStore, DuckDBOfflineStoreConfig
from feast.infra.offline_stores.file_source import FileSource, SavedDatasetFileStorage
from feast.infra.offline_stores.offline_store import RetrievalJob, RetrievalMetadata
from feast.infra.registry.base_registry import BaseRegistry
from feast.on_demand_feature_view import OnDemandFeatureView
from feast.repo_config import RepoConfig
from feast.saved_dataset import SavedDatasetStorage
from pydantic import StrictStr

from mlplatform.errors import DataError
from mlplatform.feast_plugins.duckdb_s3 import connection, duckdb_errors, microseconds, quote_name, quote_text
from mlplatform.feast_plugins.point_in_time import Lookup, check_file, file_uri, point_in_time

EVENT_TIMESTAMP = "event_timestamp"


class S3DuckDBOfflineStoreConfig(DuckDBOfflineStoreConfig):
    """The store's part of `feature_store.yaml`; it needs nothing but the type."""

    type: StrictStr = "mlplatform.feast_plugins.offline_store.S3DuckDBOfflineStore"


class S3DuckDBOfflineStore(DuckDBOfflineStore):
    """Point-in-time joins with DuckDB over parquet files that `FileSource` names as `s3://bucket/key` or as a path."""

    # What is visible is decided by the event time alone.
    supports_filter_by_created_timestamp = False

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
        """Answer each row of an entity frame with the values its user had at that moment.

        A value belongs to the row when its event time is not after the row's, and is older by no more than the
        view's ttl: a value of exactly that age still counts, as everywhere in Feast. Times are compared in whole
        microseconds.

        Args:
            config: Feast's configuration.
            feature_views: The views asked for.
            feature_refs: `view:feature` for each feature asked for.
            entity_df: Join keys, a time column (`event_timestamp`, or the only one), and whatever else the caller
                wants back beside the features. Naive times are UTC.
            registry: Feast's registry.
            project: Feast's project.
            full_feature_names: Whether to name features `view__feature`.
            filter_by_created_timestamp: Not supported; Feast asks first.
            options: What Feast passes to stores that take a time range instead of entities.

        Returns:
            A job whose result has the entity frame's rows and columns, in its order, times in UTC, and the features.

        Raises:
            DataError: The entity frame is none, lacks a key or a time, or has a feature's name as a column.
        """
        if options or not isinstance(entity_df, pd.DataFrame):
            raise DataError(
                "history needs an entity frame with user_id and event_timestamp; SQL and ranges are not taken"
            )
        views = [Lookup.of(view, feature_refs, full_feature_names, config) for view in feature_views]
        time_column = find_time_column(entity_df)
        entities = _entity_table(entity_df, time_column, views)
        times = entity_df[time_column]
        return _Job(
            lambda: point_in_time(entities, time_column, views),
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
        latest = ", ".join(
            f"{quote_name(column)} DESC" for column in (timestamp_field, created_timestamp_column) if column is not None
        )
        keys = ", ".join(map(quote_name, join_key_columns))
        return _pull(
            file_uri(data_source, config),
            [*join_key_columns, *feature_name_columns],
            timestamp_field,
            created_timestamp_column,
            (start_date, end_date),
            f"QUALIFY row_number() OVER (PARTITION BY {keys} ORDER BY {latest}) = 1",
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
            file_uri(data_source, config),
            [*join_key_columns, *feature_name_columns],
            timestamp_field,
            created_timestamp_column,
            (start_date, end_date),
        )


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


def _entity_table(entity_df: pd.DataFrame, time_column: str, views: Sequence[Lookup]) -> pa.Table:
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
    moments = pd.to_datetime(entity_df[time_column], utc=True)
    return pa.Table.from_pandas(entity_df.assign(**{time_column: moments}), preserve_index=False)


def _pull(
    uri: str,
    columns: Sequence[str],
    timestamp_field: str,
    created_column: str | None,
    limits: tuple[datetime | None, datetime | None],
    suffix: str = "",
) -> RetrievalJob:
    wanted = [*columns, timestamp_field, *([created_column] if created_column else [])]
    moment = f"epoch_us({quote_name(timestamp_field)})"
    bounds = [
        f"{moment} {sign} {microseconds(limit)}" for sign, limit in zip((">=", "<="), limits, strict=True) if limit
    ]
    query = (
        f"SELECT {', '.join(map(quote_name, wanted))} FROM read_parquet({quote_text(uri)}) "  # noqa: S608 - names are quoted
        f"WHERE {' AND '.join(bounds) or 'true'} {suffix}"
    )

    def run() -> pa.Table:
        with connection() as duck, duckdb_errors(uri):
            check_file(duck, uri, wanted, timestamp_field, {})
            return duck.sql(query).to_arrow_table()

    return _Job(run)


class _Job(RetrievalJob):
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
    def full_feature_names(self) -> bool:
        return self._full_feature_names

    @property
    def on_demand_feature_views(self) -> list[OnDemandFeatureView]:
        return self._on_demand_feature_views

    @property
    def metadata(self) -> RetrievalMetadata | None:
        return self._metadata

    def _to_arrow_internal(self, timeout: int | None = None) -> pa.Table:
        return self._run()

    def _to_df_internal(self, timeout: int | None = None) -> pd.DataFrame:
        frame: pd.DataFrame = self._run().to_pandas()
        return frame

    def persist(self, storage: SavedDatasetStorage, allow_overwrite: bool = False, timeout: int | None = None) -> None:
        """Write the result as one parquet file; Feast's saved data sets use this.

        Raises:
            DataError: The file exists and may not be replaced.
        """
        assert isinstance(storage, SavedDatasetFileStorage)  # noqa: S101
        files, path = FileSource.create_filesystem_and_path(storage.file_options.uri, "")
        files = files or pa.fs.LocalFileSystem()
        if not allow_overwrite and files.get_file_info(path).type != pa.fs.FileType.NotFound:
            raise DataError(f"{storage.file_options.uri} exists; choose another name, or pass allow_overwrite=True")
        pq.write_table(self.to_arrow(), path, filesystem=files)
