"""What Feast's file source names, as DuckDB and Arrow read it: its address, its columns, and its values' types."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import duckdb
import pyarrow as pa
import pyarrow.compute
import pyarrow.fs
from feast import FileSource, ValueType
from feast.data_format import ParquetFormat
from feast.data_source import DataSource
from feast.repo_config import RepoConfig

from mlplatform.clients.sharing import stored_at
from mlplatform.errors import DataError
from mlplatform.feast_plugins.duckdb_s3 import duckdb_errors, quote_name, quote_text

_GLOB = re.compile(r"[*?\[]")
_TIMES = re.compile(r"TIMESTAMP|DATETIME")
_FAMILIES = {
    "text": re.compile(r"VARCHAR|ENUM"),
    "whole number": re.compile(r"U?(TINY|SMALL|BIG|HUGE)?INT(EGER)?$"),
    "number": re.compile(r"FLOAT|DOUBLE|DECIMAL"),
}
# How Arrow holds a value of each of Feast's plain types; the others stay as the file has them.
ARROW_TYPES = {
    ValueType.STRING: pa.string(),
    ValueType.BYTES: pa.binary(),
    ValueType.INT32: pa.int32(),
    ValueType.INT64: pa.int64(),
    ValueType.FLOAT: pa.float32(),
    ValueType.DOUBLE: pa.float64(),
    ValueType.BOOL: pa.bool_(),
    ValueType.UNIX_TIMESTAMP: pa.timestamp("us", "UTC"),
}


class Named(Protocol):
    """What an error message says about a column's origin."""

    @property
    def view(self) -> str:
        """The view's name."""

    @property
    def file(self) -> ParquetFile:
        """The view's file."""


@dataclass(frozen=True)
class ParquetFile:
    """One parquet file, or a folder or pattern of them.

    Attributes:
        name: The source's name.
        uri: `s3://bucket/key` or a path; a folder, or a pattern, means all parquet files in it.
    """

    name: str
    uri: str

    @classmethod
    def of(cls, source: DataSource, config: RepoConfig) -> ParquetFile:
        """Read a source's definition.

        Raises:
            DataError: The source is no file, no parquet, or in another object store than the platform's.
        """
        if not isinstance(source, FileSource):
            raise DataError(
                f"source {source.name!r} is a {type(source).__name__}, and this store reads parquet files only; "
                "give the view a FileSource"
            )
        if not isinstance(source.file_format, (ParquetFormat, type(None))):
            raise DataError(
                f"source {source.name!r} is {type(source.file_format).__name__}, and this store reads parquet only; "
                "write the table as parquet files"
            )
        check_endpoint(source.s3_endpoint_override or "", f"source {source.name!r}")
        return cls(source.name, str(FileSource.get_uri_for_file_path(config.repo_path, source.path)))

    @property
    def described(self) -> str:
        """The source as messages name it."""
        return self.uri if self.name == self.uri else f"{self.uri} (source {self.name})"

    @property
    def pattern(self) -> str:
        """The file's address as the store knows it, or the pattern of all of them."""
        uri = stored_at(self.uri)
        is_folder = Path(self.uri).is_dir() if "://" not in self.uri else not Path(self.uri).suffix
        return f"{uri.rstrip('/')}/**/*.parquet" if is_folder and not _GLOB.search(uri) else uri

    def scan(self) -> str:
        """Write the table function that reads the file or files."""
        options = ", union_by_name = true" if _GLOB.search(self.pattern) else ""
        return f"read_parquet({quote_text(self.pattern)}{options})"

    def describe(self, duck: duckdb.DuckDBPyConnection, columns: Sequence[str], timestamp_field: str) -> dict[str, str]:
        """Give DuckDB's type of each column.

        Raises:
            DataError: A column is missing, or the event time is no time.
        """
        with duckdb_errors(self.described):
            rows = duck.execute(f"DESCRIBE SELECT * FROM {self.scan()}").fetchall()  # noqa: S608
        found = {str(name): str(kind) for name, kind, *_ in rows}
        if missing := [column for column in columns if column not in found]:
            raise DataError(
                f"{self.described} has no column {', '.join(missing)}; it has {', '.join(found)}; "
                "write the file anew, or change the view"
            )
        if not _TIMES.match(found[timestamp_field]):
            raise DataError(
                f"{timestamp_field} in {self.described} is {found[timestamp_field]} and no time; write timestamps"
            )
        return found


def check_endpoint(override: str, what: str) -> None:
    """Refuse an address of its own for a source: the platform's variables say where the object store is.

    Raises:
        DataError: The address is another one than `AWS_ENDPOINT_URL`.
    """
    endpoint = os.environ.get("AWS_ENDPOINT_URL", "")
    if override and override.rstrip("/") != endpoint.rstrip("/"):
        raise DataError(
            f"{what} has s3_endpoint_override={override}, and this store reads from AWS_ENDPOINT_URL={endpoint}; "
            "remove the override, or set the variable"
        )


def filesystem(uri: str) -> tuple[pa.fs.FileSystem, str]:
    """Give Arrow's file system for an address, and the path on it; Arrow itself ignores `AWS_ENDPOINT_URL`."""
    if not uri.startswith("s3://"):
        return pa.fs.LocalFileSystem(), uri
    files = pa.fs.S3FileSystem(
        endpoint_override=os.environ.get("AWS_ENDPOINT_URL") or None, region=os.environ.get("AWS_DEFAULT_REGION")
    )
    return files, stored_at(uri).removeprefix("s3://")


def same_family(one: str, other: str) -> bool:
    """Say whether two of DuckDB's types compare without a conversion that could change a value."""
    return family(one) == family(other)


def family(kind: str) -> str:
    """Name the family of one of DuckDB's types; a type outside of them is its own."""
    return next((name for name, pattern in _FAMILIES.items() if pattern.match(kind)), kind)


def as_declared(column: pa.ChunkedArray, kind: ValueType | None, origin: Named, name: str) -> pa.ChunkedArray:
    """Convert a column to its view's type, exactly or not at all; history and materialising share this rule.

    A number may become wider or narrower, and a float a whole number, as long as no value changes; a double becomes the
    nearest float, which is what Feast stores online. Times are UTC. Lists, maps and structs stay as they are.

    Args:
        column: Values as the file has them.
        kind: The view's type, if it declares one.
        origin: Whose column it is.
        name: The feature's name.

    Raises:
        DataError: The view's type can't hold what the file has.
    """
    found = column.type
    target = ARROW_TYPES.get(kind) if kind is not None else None
    if target is None:
        return _in_utc(column)
    if found == target:
        return column
    if not (pa.types.is_null(found) or _convertible(found, target)):
        raise DataError(_says_otherwise(origin, name, str(found), kind))
    try:
        converted = column.cast(target)
    except pa.ArrowInvalid as error:
        raise DataError(_says_otherwise(origin, name, f"{found} ({error})", kind)) from error
    if pa.types.is_float32(target) and pa.types.is_float64(found):
        lost = pa.compute.and_(pa.compute.is_inf(converted), pa.compute.is_finite(column))
        if pa.compute.any(lost).as_py():
            raise DataError(_says_otherwise(origin, name, f"{found} (a value is too large)", kind))
    return converted


def _says_otherwise(origin: Named, name: str, found: str, kind: ValueType | None) -> str:
    declared = kind.name if kind else "nothing"
    return (
        f"{origin.view}:{name} in {origin.file.described} is {found}, and its view says {declared}; "
        "write the file with that type, or change the view"
    )


def _convertible(found: pa.DataType, target: pa.DataType) -> bool:
    kinds = pa.types
    if kinds.is_dictionary(found):
        found = found.value_type
    if kinds.is_string(target):
        return bool(kinds.is_string(found) or kinds.is_large_string(found) or kinds.is_string_view(found))
    if kinds.is_binary(target):
        return bool(kinds.is_binary(found) or kinds.is_large_binary(found) or kinds.is_binary_view(found))
    if kinds.is_timestamp(target):
        return bool(kinds.is_timestamp(found) or kinds.is_date(found))
    if kinds.is_boolean(target):
        return False
    return bool(kinds.is_integer(found) or kinds.is_floating(found) or kinds.is_decimal(found))


def _in_utc(column: pa.ChunkedArray) -> pa.ChunkedArray:
    if pa.types.is_timestamp(column.type) and column.type.tz not in {None, "UTC"}:
        return column.cast(pa.timestamp(column.type.unit, "UTC"))
    return column


def quoted(columns: Sequence[str]) -> str:
    """Write a list of column names for SQL."""
    return ", ".join(map(quote_name, columns))
