"""The census-income table: its columns, and how it is read, checked and split.

Source: Adult, UCI Machine Learning Repository, B. Becker and R. Kohavi, 1996, CC BY 4.0,
https://doi.org/10.24432/C5XW20.
"""

from __future__ import annotations

import os
from io import BytesIO
from pathlib import Path

import pandas as pd

from mlplatform.errors import DataError, MissingObjectError

COLUMNS = (
    "Workclass",
    "Education",
    "Marital-Status",
    "Occupation",
    "Relationship",
    "Race",
    "Sex",
    "Native_country",
)
TARGET = "Target"
NEGATIVE = "<=50K"
POSITIVE = ">50K"


def read_income(path: str | os.PathLike[str]) -> pd.DataFrame:
    """Read the income file as text; unlike `pandas.read_csv`, refuse a file that is not the income table.

    Args:
        path: A comma-separated UTF-8 file with the columns `COLUMNS` and `TARGET`, in any order.

    Returns:
        Text columns `COLUMNS` and `TARGET` in this order, shape `(n_rows, 9)`, without nulls.

    Raises:
        MissingObjectError: There is no such file.
        DataError: It is empty, not UTF-8 or not comma-separated, a column is missing or unexpected, a value is
            missing, or a target is none of `NEGATIVE` and `POSITIVE`.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
        if b"\0" in content:  # pandas would cut the value there
            raise DataError(f"{path} is no text (a NUL at byte {content.index(0)}); run 'make data'")
        frame = pd.read_csv(
            BytesIO(content), dtype=str, keep_default_na=False, skipinitialspace=True, encoding="utf-8-sig"
        )
    except FileNotFoundError as error:
        raise MissingObjectError(f"{path} is not there; run 'make data', or correct data_path") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); run 'make data', or correct data_path") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}); convert it, or run 'make data'") from error
    except (pd.errors.EmptyDataError, pd.errors.ParserError) as error:
        reason = str(error).strip().splitlines()[0].removeprefix("Error tokenizing data. C error: ")
        raise DataError(f"{path} is not a comma-separated table ({reason}); run 'make data'") from error
    return check_income(frame, name=str(path))


def check_income(frame: pd.DataFrame, *, name: str = "the table") -> pd.DataFrame:
    """Refuse a table that does not have the income data's columns, values and targets.

    Args:
        frame: The table as read, every column as text.
        name: What to call it in the message.

    Returns:
        The same rows with the columns in the usual order.

    Raises:
        DataError: As in `read_income`.
    """
    expected = [*COLUMNS, TARGET]
    missing = [column for column in expected if column not in frame.columns]
    extra = [str(column) for column in frame.columns if column not in expected]
    if missing or extra or frame.columns.has_duplicates:
        hint = "; it is separated by something else than commas" if len(frame.columns) == 1 else ""
        raise DataError(
            f"{name} has columns missing: {', '.join(missing) or 'none'}, unexpected: "
            f"{', '.join(extra) or 'none'}{hint}; run 'make data' for the original"
        )
    if frame.empty:
        raise DataError(f"{name} has a header and no rows; run 'make data' for the original")
    blank = frame.isna() | frame.apply(lambda column: column.str.strip().eq(""))
    if blank.any(axis=None):
        row = int(blank.any(axis=1).to_numpy().argmax())
        counts = ", ".join(f"{column} {count}" for column, count in blank.sum().items() if count)
        raise DataError(f"{name} has missing values ({counts}; first in row {row + 1}); run 'make data'")
    strange = sorted(set(frame[TARGET]) - {NEGATIVE, POSITIVE})
    if strange:
        raise DataError(f"{name} has targets other than {NEGATIVE} and {POSITIVE}: {strange[:3]}; run 'make data'")
    return frame[expected]


def split(frame: pd.DataFrame, *, test_size: float = 0.2, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Split rows with `train_test_split`, with the same share of each target on both sides and a clean row index.

    Features and target stay in one frame. If they are split apart and joined again, rows can get someone else's label.

    Args:
        frame: The income table.
        test_size: Share of the rows to hold back, between 0 and 1.
        seed: Number that fixes the random choice.

    Returns:
        Training and testing rows, each with a new index from 0.

    Raises:
        DataError: Too few rows of a target to divide, or a share outside 0 to 1.
    """
    from sklearn.model_selection import train_test_split

    try:
        train, test = train_test_split(frame, test_size=test_size, random_state=seed, stratify=frame[TARGET])
    except ValueError as error:
        raise DataError(f"cannot split {len(frame)} rows with test_size={test_size}: {error}") from error
    return train.reset_index(drop=True), test.reset_index(drop=True)
