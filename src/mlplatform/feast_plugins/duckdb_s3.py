"""A DuckDB connection that reads `s3://` addresses of the platform's object store."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from importlib import resources
from urllib.parse import urlsplit

import duckdb

from mlplatform.errors import CredentialsError, DataError, MissingObjectError, ServiceDownError
from mlplatform.settings import S3_ANSWER_TIMEOUT_S, s3_attempts

_NEXT = "write it ('make features' writes the platform's own), or check the source's path"


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
    duck.execute(f"LOAD {quote_text(_httpfs())}")
    # Files are replaced under their names, so nothing read earlier may be reused.
    duck.execute("SET enable_external_file_cache = false")
    duck.execute("SET TimeZone = 'UTC'")
    # Its own would wait for half a minute, four times, for a store that hangs.
    duck.execute(f"SET http_timeout = {S3_ANSWER_TIMEOUT_S:.0f}")
    duck.execute(f"SET http_retries = {s3_attempts() - 1}")
    duck.execute("SET http_retry_wait_ms = 200; SET http_retry_backoff = 2")
    duck.execute(secret)
    return duck


@contextmanager
def duckdb_errors(uri: str) -> Iterator[None]:
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
    given = [f"{option} {quote_text(value)}" for option, value in options.items() if value]
    if endpoint.netloc:
        given.append(f"USE_SSL {'true' if endpoint.scheme == 'https' else 'false'}")
    return f"CREATE SECRET ({', '.join(['TYPE s3', *given])})"


def quote_name(column: str) -> str:
    """Quote a column name for SQL."""
    return '"' + column.replace('"', '""') + '"'


def quote_text(value: str) -> str:
    """Quote a text for SQL."""
    return "'" + value.replace("'", "''") + "'"
