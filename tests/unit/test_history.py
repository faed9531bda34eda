"""Every property that the feature history is documented to have."""

from __future__ import annotations

import hashlib
import uuid
from pathlib import Path

import pandas as pd
import pytest

from mlplatform import history, modeling
from mlplatform.census import lives
from mlplatform.errors import DataError
from mlplatform.income import COLUMNS, read_income

# sha256 over "user,microseconds" lines; made with numpy 2.4 and unchanged since.
FINGERPRINT = "caeaafb68fab2931cef8de69b9afed988dcd8ec55bb0da7d7c6f4b25885e495b"
DATA = Path(__file__).parents[2] / "data" / "income_data.csv"


@pytest.fixture(scope="module")
def income() -> pd.DataFrame:
    return read_income(DATA)


@pytest.fixture(scope="module")
def versions(income: pd.DataFrame) -> pd.DataFrame:
    return history.build_history(income)


@pytest.fixture(scope="module")
def in_order(versions: pd.DataFrame) -> pd.DataFrame:
    return versions.sort_values([history.USER_ID, history.EVENT_TIMESTAMP])


def test_every_row_of_the_file_is_one_version_in_the_files_order(income, versions):
    assert versions.index.equals(income.index)
    pd.testing.assert_frame_equal(modeling.inputs(versions), income[list(COLUMNS)], check_exact=True)


def test_there_are_28066_users_and_2096_later_versions(versions):
    assert len(versions) == 30_162
    assert versions[history.USER_ID].nunique() == 28_066
    assert versions[history.USER_ID].duplicated().sum() == 2_096


def test_no_two_versions_of_a_user_happen_at_the_same_moment(versions):
    assert not versions.duplicated([history.USER_ID, history.EVENT_TIMESTAMP]).any()


def test_sex_race_and_country_never_change_within_a_user(versions):
    assert (versions.groupby(history.USER_ID)[["Sex", "Race", "Native_country"]].nunique() == 1).all(axis=None)


def test_a_later_version_differs_from_the_one_before(in_order):
    values = in_order[[history.USER_ID, *history.FEATURES]]
    assert not (values == values.shift()).all(axis=1).any()


def test_education_rises_by_one_step_at_most(in_order):
    rank = in_order["Education"].map({level: step for step, level in enumerate(lives._EDUCATION)})
    steps = rank.groupby(in_order[history.USER_ID]).diff().dropna()
    assert len(steps) == 2_096
    assert steps.isin([0, 1]).all()


def test_nobody_is_unmarried_again(in_order):
    earlier = in_order.groupby(history.USER_ID)["Marital_Status"].shift()
    assert not ((in_order["Marital_Status"] == "Never-married") & earlier.notna() & (earlier != "Never-married")).any()


def test_moments_are_utc_microseconds_within_the_window_but_for_the_documented_one(versions):
    times = versions[history.EVENT_TIMESTAMP]
    assert str(times.dtype) == "datetime64[us, UTC]"
    outside = versions[(times < history.WINDOW_START) | (times >= history.WINDOW_END)]
    assert outside[history.USER_ID].tolist() == [history.CHANGING_USER]
    assert outside[history.EVENT_TIMESTAMP].tolist() == [history.CHANGING_TIMES[-1]]
    # Spread over the whole window, and using the microseconds.
    assert times.min() < history.WINDOW_START + pd.Timedelta("1h")
    assert times.drop(outside.index).max() > history.WINDOW_END - pd.Timedelta("1h")
    assert (times.dt.microsecond % 1_000 != 0).mean() > 0.99


def test_the_steady_user_has_one_version_as_documented(versions):
    rows = versions[versions[history.USER_ID] == "9f2ac416-06e1-44a0-87bd-d4787c85bf66"]
    assert rows[history.EVENT_TIMESTAMP].tolist() == [pd.Timestamp("2023-01-24T06:52:20Z")]
    assert rows["Sex"].tolist() == ["Male"]


def test_the_changing_user_has_versions_on_7_january_20_may_and_4_december(in_order):
    rows = in_order[in_order[history.USER_ID] == history.CHANGING_USER]
    days = rows[history.EVENT_TIMESTAMP].dt.strftime("%Y-%m-%d").tolist()
    assert days == ["2023-01-07", "2023-05-20", "2023-12-04"]
    for view in ("relationship", "occupation"):
        assert not rows[list(history.VIEWS[view])].duplicated().any(), f"{view} does not change each time"


def test_user_ids_are_uuids_of_version_4(versions):
    assert all(uuid.UUID(user).version == 4 for user in versions[history.USER_ID].unique())


def test_the_history_is_the_same_on_every_machine(versions):
    stamps = versions[history.EVENT_TIMESTAMP].astype("int64").astype(str)
    text = "\n".join(versions[history.USER_ID] + "," + stamps)
    assert hashlib.sha256(text.encode()).hexdigest() == FINGERPRINT


def test_the_three_views_together_hold_every_feature_once(versions):
    views = history.split_views(versions)
    names = [name for frame in views.values() for name in frame.columns[2:]]
    assert sorted(names) == sorted(history.FEATURES)
    for frame in views.values():
        assert list(frame.columns[:2]) == [history.USER_ID, history.EVENT_TIMESTAMP]
        assert len(frame) == len(versions)


def test_feature_names_need_no_quotes_in_sql():
    assert all(name.isidentifier() for name in history.FEATURES)


def test_the_input_is_left_as_it_was(income):
    copy = income.copy()
    history.build_history(income)
    pd.testing.assert_frame_equal(income, copy)


def test_income_data_without_a_column_is_refused(income):
    with pytest.raises(DataError, match="no column Marital-Status; run 'make data'"):
        history.build_history(income.drop(columns="Marital-Status"))


def test_an_unknown_education_is_refused(income):
    with pytest.raises(DataError, match="unknown education 'Bootcamp'"):
        history.build_history(income.assign(Education="Bootcamp"))


def test_more_later_versions_than_rows_can_follow_each_other_are_refused(income):
    with pytest.raises(DataError, match=r"only \d+ rows can follow another"):
        history.build_history(income.head(200), later_versions=199)
