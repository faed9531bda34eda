"""The table that everything is about: what `data/table.toml` says of it; how its file is read, checked and split."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlplatform.description.entries import Table, describe
from mlplatform.errors import DataError, MissingObjectError
from mlplatform.settings import find_root

if TYPE_CHECKING:
    import pandas as pd


@cache
def current() -> Table:
    """Read the description in the clone around the working directory, once per process; errors as in `describe`."""
    return describe(find_root() / "data" / "table.toml")


def names(module: str, **ways: Callable[[Table], Any]) -> Callable[[str], Any]:
    """Make a module's `__getattr__`, so that a name such as `income.COLUMNS` is looked up when it is asked for."""

    def find(name: str) -> Any:
        if name not in ways:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        return ways[name](current())

    return find


def read(path: str | os.PathLike[str] | None = None) -> pd.DataFrame:
    """Read the table's file; unlike `pandas.read_csv`, refuse a file that is not what the description says.

    Args:
        path: A comma-separated UTF-8 file with the described columns, in any order; by default the described one.

    Returns:
        As in `check`.

    Raises:
        MissingObjectError: There is no such file.
        DataError: It is empty, not UTF-8 or not comma-separated, or as in `check`.
    """
    import pandas as pd

    described = current()
    path, restore = Path(path or described.folder / described.file), described.text("restore")
    try:
        content = path.read_bytes()
        if b"\0" in content:  # pandas would cut the value there
            raise DataError(f"{path} is no text (a NUL at byte {content.index(0)}); {restore}")
        frame = pd.read_csv(
            BytesIO(content), dtype=str, keep_default_na=False, skipinitialspace=True, encoding="utf-8-sig"
        )
    except FileNotFoundError as error:
        raise MissingObjectError(f"{path} is not there; {restore}, or correct data_path") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); {restore}, or correct data_path") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}); convert it, or {restore}") from error
    except (pd.errors.EmptyDataError, pd.errors.ParserError) as error:
        reason = str(error).strip().splitlines()[0].removeprefix("Error tokenizing data. C error: ")
        raise DataError(f"{path} is not a comma-separated table ({reason}); {restore}") from error
    return check(frame, name=str(path))


def check(frame: pd.DataFrame, *, name: str = "the table") -> pd.DataFrame:
    """Refuse a table that does not have the described columns, values and targets.

    Args:
        frame: The table as read: every column as text, or numbers as numbers already.
        name: What to call it in the message.

    Returns:
        The same rows: the described columns in their order, categories as text and numbers as floats, and the target;
        then key and time (UTC), if they are columns of the file. Without nulls.

    Raises:
        DataError: A column is missing or unexpected, there is no row, a value is missing, a number or a time is none,
            or a target is none of the two.
    """
    import pandas as pd

    described = current()
    restore = described.text("restore")
    placed = [described.entity.key, described.entity.time] if described.entity.history == "file" else []
    expected = [*described.columns, described.target.column, *placed]
    missing = [column for column in expected if column not in frame.columns]
    extra = [str(column) for column in frame.columns if column not in expected]
    if missing or extra or frame.columns.has_duplicates:
        hint = "; it is separated by something else than commas" if len(frame.columns) == 1 else ""
        raise DataError(
            f"{name} has columns missing: {', '.join(missing) or 'none'}, unexpected: "
            f"{', '.join(extra) or 'none'}{hint}; {restore}"
        )
    if frame.empty:
        raise DataError(f"{name} has a header and no rows; {restore}")
    text = frame.select_dtypes(exclude=["number", "datetimetz"])
    blank = frame.isna() | text.apply(lambda column: column.str.strip().eq("")).reindex(
        columns=frame.columns, fill_value=False
    )
    if blank.any(axis=None):
        row = int(blank.any(axis=1).to_numpy().argmax())
        counts = ", ".join(f"{column} {count}" for column, count in blank.sum().items() if count)
        raise DataError(f"{name} has missing values ({counts}; first in row {row + 1}); {restore}")
    strange = sorted(set(frame[described.target.column]) - {described.target.negative, described.target.positive})
    if strange:
        both = f"{described.target.negative} and {described.target.positive}"
        raise DataError(f"{name} has targets other than {both}: {strange[:3]}; {restore}")
    typed = frame[expected].assign(**as_numbers(frame, name=name))
    if placed:
        try:
            times = pd.to_datetime(frame[described.entity.time], utc=True, format="ISO8601")
        except ValueError as error:
            raise DataError(f"{name} has no time in {described.entity.time} ({error}); {restore}") from error
        typed = typed.assign(**{described.entity.time: times.astype("datetime64[us, UTC]")})
    return typed


def as_numbers(frame: pd.DataFrame, *, name: str) -> dict[str, pd.Series[float]]:
    """Give the described numbers of a frame as floats, by column.

    Raises:
        DataError: A value is no finite number; the message names the first one and its row.
    """
    import numpy as np
    import pandas as pd

    numbers = {}
    for column in current().numbers:
        read = pd.to_numeric(frame[column], errors="coerce").astype("float64")
        wrong = ~np.isfinite(read.to_numpy())
        if wrong.any():
            row = int(wrong.argmax())
            raise DataError(f"{name} has {frame[column].iloc[row]!r} in {column}, row {row + 1}, which is no number")
        numbers[column] = frame[column].astype("float64")  # of text, `to_numeric` may miss the last bit
    return numbers


def split(frame: pd.DataFrame, *, test_size: float = 0.2, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Split rows with `train_test_split`, with the same share of each target on both sides and a clean row index.

    Features and target stay in one frame. If they are split apart and joined again, rows can get someone else's label.

    Args:
        frame: The table.
        test_size: Share of the rows to hold back, between 0 and 1.
        seed: Number that fixes the random choice.

    Returns:
        Training and testing rows, each with a new index from 0.

    Raises:
        DataError: Too few rows of a target to divide, or a share outside 0 to 1.
    """
    from sklearn.model_selection import train_test_split

    try:
        train, test = train_test_split(
            frame, test_size=test_size, random_state=seed, stratify=frame[current().target.column]
        )
    except ValueError as error:
        raise DataError(f"cannot split {len(frame)} rows with test_size={test_size}: {error}") from error
    return train.reset_index(drop=True), test.reset_index(drop=True)
