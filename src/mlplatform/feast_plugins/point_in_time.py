"""The as-of join: give each row asked the values that were known of its key at its time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute
from feast import ValueType
from feast.feature_view import DUMMY_ENTITY_ID, FeatureView
from feast.repo_config import RepoConfig

from mlplatform.errors import DataError
from mlplatform.feast_plugins.duckdb_s3 import connection, duckdb_errors, quote_name
from mlplatform.feast_plugins.moments import microseconds
from mlplatform.feast_plugins.parquet_source import ParquetFile, as_declared, same_family

# Names of our own inside a query; no feature is called like that.
ROW = "__row"
KEY = "__key"
AT = "__at"
PLACE = "__place"
WRITTEN = "__written"
TIED = "__tied"
TEXT_LIMIT = 2**31 - 1  # bytes


@dataclass(frozen=True, kw_only=True)
class Lookup:
    """What is asked of one feature view. Columns of the file carry the file's names, before any field mapping.

    Attributes:
        view: The view's name.
        file: Its parquet file or files.
        keys: Column of the entity frame, by column of the file; none for a view without entities.
        features: Column of the file, by name in the answer.
        types: Feast's type, by column of the file.
        timestamp_field: The file's event time.
        created_column: The file's time of writing, which decides between rows of one event time.
        ttl: How old a value may be; none means any age.
    """

    view: str
    file: ParquetFile
    keys: Mapping[str, str]
    features: Mapping[str, str]
    types: Mapping[str, ValueType]
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
        entities = [entity.name for entity in view.entity_columns if entity.name != DUMMY_ENTITY_ID]
        renamed = view.projection.join_key_map
        created = source.created_timestamp_column
        return cls(
            view=view.name,
            file=ParquetFile.of(source, config),
            keys={column_of.get(key, key): renamed.get(key, key) for key in entities},
            features={f"{alias}__{name}" if full_names else name: column_of.get(name, name) for name in asked},
            types={column_of.get(field.name, field.name): field.dtype.to_value_type() for field in view.features},
            timestamp_field=column_of.get(source.timestamp_field, source.timestamp_field),
            created_column=column_of.get(created, created) if created else None,
            ttl=view.ttl or None,
        )

    @property
    def columns(self) -> list[str]:
        """The columns of the file that are read."""
        # Every feature of the view, asked for or not: together they decide between rows of one event time.
        wanted = [*self.keys, *self.features.values(), *self.types, self.timestamp_field, self.created_column or ""]
        return [column for column in dict.fromkeys(wanted) if column]

    def find(
        self, duck: duckdb.DuckDBPyConnection, asked: pa.Table, *, created_before: bool
    ) -> tuple[pa.Table, pa.Array]:
        """Find the row of the file that counts for each row of the table `asked`.

        Stack the file's rows and the questions, sort each key's by time with rows before questions of the same
        moment, and give each question the last row above it. DuckDB's own ASOF JOIN gives the same answer in time
        that grows with the square of the rows (1.5.5, 300,000 rows of 280,000 keys: 82 s against 0.3 s). Only numbers
        go through the sort, and hashes in place of the keys, which halves its time; whoever asks takes the values by
        the rows' numbers.

        Args:
            duck: Where `asked` is registered.
            asked: The questions: keys, `AT` in microseconds, `ROW` from 0.
            created_before: Whether a row counts only if it was written before the moment asked about.

        Returns:
            The file's rows, and for each question the place of its row in them, null for none.
        """
        # The first way is right unless two rows of a key have one moment, or two keys one hash: rare, and dear.
        for exact in (created_before, True):
            rows = self._read(duck, in_order=exact)
            query = self._written_before() if created_before else self._last_above(exact=exact)
            found = duck.sql(query).to_arrow_table()
            tied = not exact and pa.compute.any(found.column(TIED)).as_py()
            found = found.select([ROW, PLACE]).drop_null()
            places = np.full(len(asked), -1)
            places[found.column(ROW).to_numpy()] = found.column(PLACE).to_numpy()
            answer = pa.array(places, mask=places < 0)
            if exact or not (tied or self._confuses(duck, rows, asked, answer)):
                break
        age = pa.compute.subtract(asked.column(AT), rows.column(AT).take(answer))
        oldest = self.ttl // timedelta(microseconds=1) if self.ttl else np.iinfo(np.int64).max
        return rows, pa.compute.if_else(pa.compute.less_equal(age, oldest), answer, None)

    def _confuses(self, duck: duckdb.DuckDBPyConnection, rows: pa.Table, asked: pa.Table, places: pa.Array) -> bool:
        """Say whether a question got the row of another key."""
        names = list(zip(self._key_names, self.keys.values(), strict=True))
        pairs = {known: _take(rows.column(known), places) for known, _ in names}
        duck.register("pairs", pa.table(pairs | {name: asked.column(name) for _, name in names} | {PLACE: places}))
        differ = [f"{known} IS DISTINCT FROM {quote_name(name)}" for known, name in names]
        query = f"SELECT 1 FROM pairs WHERE {PLACE} IS NOT NULL AND ({' OR '.join(differ)}) LIMIT 1"  # noqa: S608
        return bool(names) and duck.sql(query).fetchone() is not None

    def _read(self, duck: duckdb.DuckDBPyConnection, *, in_order: bool) -> pa.Table:
        """Read the file's rows into the table `known`, numbered; in the order in which rows of one moment count."""
        keys = [f"{quote_name(column)} AS {name}" for column, name in zip(self.keys, self._key_names, strict=True)]
        moment = f"epoch_us({quote_name(self.timestamp_field)})"
        written = [f"epoch_us({quote_name(self.created_column)}) AS {WRITTEN}"] if self.created_column else []
        values = [quote_name(column) for column in dict.fromkeys(self.features.values())]
        present = [f"{quote_name(column)} IS NOT NULL" for column in [*self.keys, self.timestamp_field]]
        query = f"SELECT {', '.join([*keys, f'{moment} AS {AT}', *written, *values])} FROM {self.file.scan()}"  # noqa: S608
        query += f" WHERE {' AND '.join(present)}"
        ties = tie_breakers(self.created_column, [name for name in self.types if name not in self.keys])
        if in_order and ties:
            query += f" ORDER BY {', '.join(f'{quote_name(column)} NULLS FIRST' for column in ties)}"
        rows = duck.sql(query).to_arrow_table()
        rows = rows.append_column(PLACE, pa.array(range(len(rows)), pa.int64()))
        duck.register("known", rows)
        return rows

    def _last_above(self, *, exact: bool) -> str:
        names = ", ".join(self._key_names)
        known = ", ".join([*self._key_names, AT, f"NULL::BIGINT AS {ROW}", PLACE])
        asked = ", ".join([*map(quote_name, self.keys.values()), AT, ROW, "NULL"])
        partition = f"PARTITION BY {names if exact else KEY}" if names else ""
        # Of two rows of one moment the later is marked; they follow each other, since questions come after rows.
        tied = f"{PLACE} IS NOT NULL AND lag(CASE WHEN {PLACE} IS NOT NULL THEN {AT} END) OVER above = {AT}"
        return f"""
            SELECT * FROM (
                SELECT {ROW}, last_value({PLACE} IGNORE NULLS) OVER above AS {PLACE}
                    {"" if exact else f", {tied} AS {TIED}"}
                FROM (
                    SELECT *{f", {_hash(names)} AS {KEY}" if names else ""}
                    FROM (SELECT {known} FROM known UNION ALL SELECT {asked} FROM asked)
                )
                WINDOW above AS (
                    {partition} ORDER BY {AT}, {PLACE} IS NULL{f", {PLACE}" if exact else ""} ROWS UNBOUNDED PRECEDING
                )
            )
            WHERE {ROW} IS NOT NULL {"" if exact else f"OR {TIED}"}
        """  # noqa: S608 - every name is ours or quoted by quote_name

    def _written_before(self) -> str:
        # Two times decide here, so no single order of rows and questions gives the answer: join by key, then choose.
        equal = [
            f"k.{name} = a.{quote_name(asked)}" for name, asked in zip(self._key_names, self.keys.values(), strict=True)
        ]
        conditions = [*equal, f"k.{WRITTEN} <= a.{AT}", f"k.{AT} <= a.{AT}"]
        return f"""
            SELECT a.{ROW}, k.{PLACE} FROM asked a LEFT JOIN known k ON {" AND ".join(conditions)}
            QUALIFY row_number() OVER (
                PARTITION BY a.{ROW} ORDER BY k.{AT} DESC NULLS LAST, k.{PLACE} DESC NULLS LAST
            ) = 1
        """  # noqa: S608

    @property
    def _key_names(self) -> list[str]:
        return [f"{ROW}_key{place}" for place in range(len(self.keys))]

    def spine(self, start: datetime, end: datetime) -> str:
        """Write the query for each key and event time that the file has within a time range."""
        moment = f"epoch_us({quote_name(self.timestamp_field)})"
        names = [f"{quote_name(column)} AS {quote_name(name)}" for column, name in self.keys.items()]
        present = [f"{quote_name(column)} IS NOT NULL" for column in self.keys]
        within = f"{moment} BETWEEN {microseconds(start)} AND {microseconds(end)}"
        return (
            f"SELECT DISTINCT {', '.join([*names, f'make_timestamptz({moment}) AS event_timestamp'])} "  # noqa: S608
            f"FROM {self.file.scan()} WHERE {' AND '.join([*present, within])}"
        )


def _hash(names: str) -> str:
    return f"hash({names})"


def tie_breakers(created_column: str | None, features: Sequence[str]) -> list[str]:
    """List the columns that decide between rows of one key and one event time: the greatest row counts.

    The time of writing comes first; then the features by name, so that the choice depends on the rows' content alone
    and history chooses the same row as materialising, whichever features are asked for.
    """
    return [*([created_column] if created_column else []), *sorted(set(features) - {created_column})]


def point_in_time(
    entities: pa.Table, time_column: str, views: Sequence[Lookup], *, created_before: bool = False
) -> pa.Table:
    """Put beside each row the values that each view knew of its key at its time.

    Args:
        entities: Shape (n_rows, n_columns): the join keys, `time_column` as timestamp in UTC, and anything else.
        time_column: The moment each row asks about.
        views: What to look up.
        created_before: Whether a value counts only if it was written before that moment.

    Returns:
        The same rows and columns in the same order, and one column per feature, null where there is no value.

    Raises:
        DataError: A file lacks a column, holds a value that its view's type can't, or a key has another type.
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
            check_keys(duck, view, asked)
            with duckdb_errors(view.file.described):
                rows, places = view.find(duck, asked, created_before=created_before and view.created_column is not None)
            for name, column in view.features.items():
                found = _take(rows.column(column), places)
                answer = answer.append_column(name, as_declared(found, view.types.get(column), view, name))
    return answer


def _take(column: pa.ChunkedArray, places: pa.Array) -> pa.ChunkedArray:
    if column.nbytes > TEXT_LIMIT and (pa.types.is_string(column.type) or pa.types.is_binary(column.type)):
        # Arrow joins a column's pieces to take from them, and its plain text ends at 2 GiB.
        large = column.cast(pa.large_string() if pa.types.is_string(column.type) else pa.large_binary())
        return large.take(places).cast(column.type)
    return column.take(places)


def check_keys(duck: duckdb.DuckDBPyConnection, view: Lookup, asked: pa.Table) -> dict[str, str]:
    """Give DuckDB's type of each column of a view's file, whose keys must compare with those of the table `asked`.

    Raises:
        DataError: A column is missing, or a key has another type.
    """
    found = view.file.describe(duck, view.columns, view.timestamp_field)
    # What DuckDB calls each column of the frame, so that both sides speak of the same types.
    given = {name: kind for name, kind, *_ in duck.execute("DESCRIBE SELECT * FROM asked").fetchall()}
    for column, name in view.keys.items():
        everything_null = asked.column(name).null_count == len(asked)
        if not everything_null and not same_family(found[column], given[name]):
            raise DataError(
                f"{name} in the entity frame is {given[name]}, and {column} in {view.file.described} is "
                f"{found[column]}; give both the same type"
            )
    return found
