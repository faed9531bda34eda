"""Frames as parquet files and back: what would come back as something else is refused before it is written."""

from __future__ import annotations

import io

import pandas as pd
import pyarrow

from mlplatform.errors import DataError

# What pandas and pyarrow raise for a type that one of them does not know, and for damage.
_NOT_PARQUET = (pyarrow.ArrowException, TypeError, ValueError, NotImplementedError)


def encode(frame: pd.DataFrame, uri: str) -> bytes:
    """Turn a frame into a parquet file; refuses what pandas would store and give back as something else.

    Args:
        frame: Columns of text, numbers, booleans or times, each with a name that is text.
        uri: The file's name, which ends in `.parquet`.

    Raises:
        DataError: Another ending, no column at all, or a column or an index of another kind, such as lists, mixed
            values, or times in whole seconds. Nulls in a column of objects come back as `None`.
    """
    if not uri.endswith(".parquet"):
        raise DataError(f"{uri} is not the name of a parquet file; end it in .parquet")
    if frame.columns.empty:
        raise DataError(f"parquet cannot keep the frame for {uri} (it has no column); give it one")
    levels = [frame.index.get_level_values(number) for number in range(frame.index.nlevels)]
    parts: list[tuple[object, pd.Series | pd.Index]] = list(frame.items())
    parts += [("" if level.name is None else level.name, level) for level in levels]
    try:
        for name, values in parts:
            if problem := _unlike_after_parquet(name, values):
                raise ValueError(f"{name!r} {problem}")
        # A type that is lost is lost without any row too.
        empty = frame.head(0)
        if problem := _changed_type(empty, pd.read_parquet(io.BytesIO(empty.to_parquet()))):
            raise ValueError(problem)
        return bytes(frame.to_parquet())
    except _NOT_PARQUET as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"parquet cannot keep the frame for {uri} ({reason}); convert the column first") from error


def _unlike_after_parquet(name: object, values: pd.Series | pd.Index) -> str:
    """Say what of a column or an index pandas would write without complaint and read back as something else."""
    if not isinstance(name, str):
        return "is a name that is no text"
    if isinstance(values.dtype, pd.CategoricalDtype):
        return "holds categories"  # which a frame without rows would lose
    kind = pd.api.types.infer_dtype(values, skipna=True) if values.dtype == object else "string"
    return "" if kind in {"string", "empty"} else f"holds {kind} values as objects"


def _changed_type(frame: pd.DataFrame, back: pd.DataFrame) -> str:
    """Say which column or index came back with another type, such as times in seconds as times in milliseconds."""
    for name, before, after in zip(frame.columns, frame.dtypes, back.dtypes, strict=True):
        if str(before) != str(after):
            return f"{name!r} is {before} and would come back as {after}"
    for level in range(frame.index.nlevels):
        before, after = (one.index.get_level_values(level).dtype for one in (frame, back))
        if str(before) != str(after):
            return f"the index is {before} and would come back as {after}"
    return ""


def decode(body: bytes, uri: str) -> pd.DataFrame:
    """Turn a parquet file into a frame; adds a clear error to pandas' own.

    Args:
        body: The file.
        uri: Its name, for the message.

    Raises:
        DataError: The bytes are no parquet file, or one with types that pandas does not know.
    """
    try:
        return pd.read_parquet(io.BytesIO(body))
    except _NOT_PARQUET as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{uri} cannot be read ({reason}); write it again") from error
