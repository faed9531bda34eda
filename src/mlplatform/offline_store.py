"""Feast's offline store on DuckDB, reading parquet from the object store.

Feast's own DuckDB store cannot reach an S3-compatible endpoint, its file store drops rows. This one answers each row
asked for with exactly one row, in the order asked, and leaves a feature null where the value did not exist yet, is
past its ttl, or the user is unknown. `feature_store.yaml` names the class, so that all of Feast's API goes through it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from importlib import resources
from typing import Any
from urllib.parse import urlsplit

import duckdb
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

from mlplatform.errors import CredentialsError, DataError, MissingObjectError, ServiceDownError

EVENT_TIMESTAMP = "event_timestamp"
# Names of our own inside a query; no feature is called like that.
ROW = "__row"
AT = "__at"
CREATED = "__created"
KNOWN = "__known"

_NEXT = "run 'make features'"
_TIMES = re.compile(r"TIMESTAMP|DATETIME")
_STORED_AS = {
    "STRING": re.compile(r"VARCHAR|ENUM"),
    "INT32": re.compile(r"U?(TINY|SMALL)?INT(EGER)?$"),
    "INT64": re.compile(r"U?(TINY|SMALL|BIG)?INT(EGER)?$"),
    "FLOAT": re.compile(r"FLOAT|DOUBLE|DECIMAL"),
    "DOUBLE": re.compile(r"FLOAT|DOUBLE|DECIMAL"),
    "BOOL": re.compile(r"BOOLEAN"),
}


class S3DuckDBOfflineStoreConfig(DuckDBOfflineStoreConfig):
    """The store's part of `feature_store.yaml`; it needs nothing but the type."""

    type: StrictStr = "mlplatform.offline_store.S3DuckDBOfflineStore"


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
            f"{_name(column)} DESC" for column in (timestamp_field, created_timestamp_column) if column is not None
        )
        keys = ", ".join(map(_name, join_key_columns))
        return _pull(
            _uri(data_source, config),
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
            _uri(data_source, config),
            [*join_key_columns, *feature_name_columns],
            timestamp_field,
            created_timestamp_column,
            (start_date, end_date),
        )


@dataclass(frozen=True, kw_only=True)
class Lookup:
    """What is asked of one feature view.

    Attributes:
        view: The view's name.
        uri: Its parquet file.
        keys: Column of the entity frame, by column of the file.
        features: Column of the file, by name in the answer.
        types: Feast's type, by column of the file.
        timestamp_field: The file's event time.
        created_column: The file's time of writing, which decides between rows of one event time.
        ttl: How old a value may be; none means any age.
    """

    view: str
    uri: str
    keys: Mapping[str, str]
    features: Mapping[str, str]
    types: Mapping[str, str]
    timestamp_field: str
    created_column: str | None
    ttl: timedelta | None

    @classmethod
    def of(cls, view: FeatureView, feature_refs: Sequence[str], full_names: bool, config: RepoConfig) -> Lookup:
        """Read a feature view's definition."""
        source = view.batch_source
        if source is None:
            raise DataError(f"view {view.name!r} has no source to take history from; give it a FileSource")
        column_of = {new: old for old, new in source.field_mapping.items()}
        alias = view.projection.name_alias or view.name
        prefix = f"{view.projection.name_to_use()}:"  # type: ignore[no-untyped-call]
        asked = [ref.removeprefix(prefix) for ref in feature_refs if ref.startswith(prefix)]
        keys = view.projection.join_key_map or {entity.name: entity.name for entity in view.entity_columns}
        return cls(
            view=view.name,
            uri=_uri(source, config),
            keys={column_of.get(key, key): column for key, column in keys.items()},
            features={f"{alias}__{name}" if full_names else name: column_of.get(name, name) for name in asked},
            types={column_of.get(field.name, field.name): field.dtype.to_value_type().name for field in view.features},
            timestamp_field=source.timestamp_field,
            created_column=source.created_timestamp_column or None,
            ttl=view.ttl or None,
        )

    def sql(self) -> str:
        """Write the as-of join of the table `asked` with the file.

        Known and asked moments of a key are put in one line, known before asked where they coincide, and each asked
        one takes the last known one before it. DuckDB's own ASOF JOIN says the same and takes time with the square of
        the rows (1.5.5, 300,000 rows of 280,000 keys: 82 s against 0.3 s).
        """
        keys = [f"{_name(f'{ROW}_key{place}')}" for place in range(len(self.keys))]
        moment = f"epoch_us({_name(self.timestamp_field)})"
        values = [f"{AT} := {moment}", *(f"{_name(name)} := {_name(old)}" for name, old in self.features.items())]
        known = [
            *(f"{_name(column)} AS {key}" for column, key in zip(self.keys, keys, strict=True)),
            f"{moment} AS {AT}",
            f"NULL::BIGINT AS {ROW}",
            f"struct_pack({', '.join(values)}) AS {KNOWN}",
        ]
        present = " AND ".join(f"{_name(column)} IS NOT NULL" for column in [*self.keys, self.timestamp_field])
        asked = [*map(_name, self.keys.values()), AT, ROW, "NULL"]
        order = f"{AT}, {ROW} NULLS FIRST"
        if self.created_column:
            known.append(f"{_name(self.created_column)} AS {CREATED}")
            asked.append("NULL")
            order += f", {CREATED} NULLS FIRST"
        fresh = f"{AT} >= {KNOWN}.{AT}"
        if self.ttl:
            fresh += f" AND {AT} - {KNOWN}.{AT} <= {self.ttl // timedelta(microseconds=1)}"
        chosen = [f"CASE WHEN {fresh} THEN {KNOWN}.{_name(name)} END AS {_name(name)}" for name in self.features]
        return f"""
            SELECT {", ".join(chosen)} FROM (
                SELECT {ROW}, {AT}, last_value({KNOWN} IGNORE NULLS) OVER (
                    PARTITION BY {", ".join(keys)} ORDER BY {order}
                    ROWS UNBOUNDED PRECEDING
                ) AS {KNOWN}
                FROM (
                    SELECT {", ".join(known)} FROM read_parquet({_text(self.uri)}) WHERE {present}
                    UNION ALL SELECT {", ".join(asked)} FROM asked
                )
            )
            WHERE {ROW} IS NOT NULL ORDER BY {ROW}
        """  # noqa: S608 - every name is quoted by _name, every text by _text


def point_in_time(entities: pa.Table, time_column: str, views: Sequence[Lookup]) -> pa.Table:
    """Put beside each row the values that each view knew of its key at its time.

    Args:
        entities: Shape (n_rows, n_columns): the join keys, `time_column` as timestamp in UTC, and anything else.
        time_column: The moment each row asks about.
        views: What to look up.

    Returns:
        The same rows and columns in the same order, and one column per feature, null where there is no value.

    Raises:
        DataError: A file lacks a column, or holds another type than its view says.
        MissingObjectError: A file is not there.
        CredentialsError: The object store refuses the keys.
        ServiceDownError: The object store does not answer.
    """
    moments = entities.column(time_column).cast(pa.timestamp("us", "UTC"), safe=False).cast(pa.int64())
    keys = dict.fromkeys(column for view in views for column in view.keys.values())
    asked = entities.select(list(keys)).append_column(AT, moments)
    asked = asked.append_column(ROW, pa.array(range(len(asked)), pa.int64()))
    answer = entities
    with connection() as duck:
        duck.register("asked", asked)
        for view in views:
            with _translated(view.uri):
                _check_file(duck, view.uri, [*view.keys, *view.features.values()], view.timestamp_field, view.types)
                found = duck.sql(view.sql()).to_arrow_table()
            for name in view.features:
                answer = answer.append_column(name, found.column(name))
    return answer


@contextmanager
def connection(environ: Mapping[str, str] = os.environ) -> Iterator[duckdb.DuckDBPyConnection]:
    """Open an in-memory DuckDB that reads `s3://` addresses with the standard `AWS_*` variables.

    The extension comes from a wheel of the same release, so nothing is downloaded and nothing is written to HOME.

    Args:
        environ: Variables by name; without `AWS_ENDPOINT_URL` the addresses are AWS's own.
    """
    with _database(_secret(environ)).cursor() as duck:
        yield duck


@lru_cache(maxsize=4)
def _database(secret: str) -> duckdb.DuckDBPyConnection:
    # Loading the extension takes a tenth of a second, so a database is kept for each platform of this process.
    duck = duckdb.connect(config={"autoinstall_known_extensions": False})
    duck.execute(f"LOAD {_text(_httpfs())}")
    # Files are replaced under their names, so nothing read earlier may be reused.
    duck.execute("SET enable_external_file_cache = false")
    duck.execute(secret)
    return duck


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
    moment = f"epoch_us({_name(timestamp_field)})"
    bounds = [
        f"{moment} {sign} {_microseconds(limit)}" for sign, limit in zip((">=", "<="), limits, strict=True) if limit
    ]
    query = (
        f"SELECT {', '.join(map(_name, wanted))} FROM read_parquet({_text(uri)}) "  # noqa: S608 - names are quoted
        f"WHERE {' AND '.join(bounds) or 'true'} {suffix}"
    )

    def run() -> pa.Table:
        with connection() as duck, _translated(uri):
            _check_file(duck, uri, wanted, timestamp_field, {})
            return duck.sql(query).to_arrow_table()

    return _Job(run)


def _check_file(
    duck: duckdb.DuckDBPyConnection,
    uri: str,
    columns: Sequence[str],
    timestamp_field: str,
    types: Mapping[str, str],
) -> None:
    described = duck.execute(f"DESCRIBE SELECT * FROM read_parquet({_text(uri)})").fetchall()  # noqa: S608
    found = {name: kind for name, kind, *_ in described}
    missing = [column for column in dict.fromkeys([*columns, timestamp_field]) if column not in found]
    if missing:
        raise DataError(f"{uri} has no column {', '.join(missing)}; it has {', '.join(found)}; {_NEXT}")
    if not _TIMES.match(found[timestamp_field]):
        raise DataError(f"{timestamp_field} in {uri} is {found[timestamp_field]} and no time; {_NEXT}")
    for column in columns:
        pattern = _STORED_AS.get(types.get(column, ""))
        if pattern and not pattern.match(found[column]):
            raise DataError(f"{column} in {uri} is {found[column]}, and its view says {types[column]}; {_NEXT}")


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


@contextmanager
def _translated(uri: str) -> Iterator[None]:
    """Turn DuckDB's errors about a file into ours; those without a meaning here pass unchanged."""
    try:
        yield
    except duckdb.HTTPException as error:
        status = int(getattr(error, "status_code", 0))
        if status == 404:
            raise MissingObjectError(f"{uri} is not there; {_NEXT}") from error
        if status in {400, 401, 403}:
            raise CredentialsError(
                f"the object store refuses the credentials for {uri}; check AWS_ACCESS_KEY_ID, or run 'make env' again"
            ) from error
        raise ServiceDownError(
            f"the object store does not answer for {uri}; run 'make up', then 'make status'"
        ) from error
    except duckdb.IOException as error:
        if "No files found" in str(error):
            raise MissingObjectError(f"{uri} is not there; {_NEXT}") from error
        raise ServiceDownError(
            f"the object store does not answer for {uri}; run 'make up', then 'make status'"
        ) from error
    except duckdb.InvalidInputException as error:
        raise DataError(f"{uri} cannot be read ({' '.join(str(error).split())[:160]}); {_NEXT}") from error


def _uri(source: DataSource, config: RepoConfig) -> str:
    if not isinstance(source, FileSource):
        raise DataError(f"source {source.name!r} is a {type(source).__name__}; this store reads parquet files only")
    return str(FileSource.get_uri_for_file_path(config.repo_path, source.path))


def _httpfs() -> str:
    folder = resources.files("duckdb_extension_httpfs") / "extensions" / f"v{duckdb.__version__}"
    return str(folder / "httpfs.duckdb_extension")


def _secret(environ: Mapping[str, str]) -> str:
    endpoint = urlsplit(environ.get("AWS_ENDPOINT_URL", ""))
    options = {
        "KEY_ID": environ.get("AWS_ACCESS_KEY_ID", ""),
        "SECRET": environ.get("AWS_SECRET_ACCESS_KEY", ""),
        "SESSION_TOKEN": environ.get("AWS_SESSION_TOKEN", ""),
        "REGION": environ.get("AWS_DEFAULT_REGION", ""),
        "ENDPOINT": endpoint.netloc + endpoint.path.rstrip("/"),
        "URL_STYLE": "path" if endpoint.netloc else "",
    }
    given = [f"{option} {_text(value)}" for option, value in options.items() if value]
    if endpoint.netloc:
        given.append(f"USE_SSL {'true' if endpoint.scheme == 'https' else 'false'}")
    return f"CREATE SECRET ({', '.join(['TYPE s3', *given])})"


def _microseconds(moment: datetime) -> int:
    aware = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return (aware - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)


def _name(column: str) -> str:
    return '"' + column.replace('"', '""') + '"'


def _text(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"
