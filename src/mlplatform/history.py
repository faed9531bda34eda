"""The feature history: a user and a moment for each row of the income data.

A feature store needs users and times, and the census file has neither. This module invents them, the same on every
machine: each row becomes one version of one user, valid from one moment on. Whoever asks the feature store about that
user at that moment must get that row back, so the file itself checks every point-in-time join.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import pandas as pd

from mlplatform.errors import DataError
from mlplatform.income import COLUMNS

USER_ID = "user_id"
EVENT_TIMESTAMP = "event_timestamp"

# In SQL a name with a hyphen needs quotes, so the feature has an underscore. Every other column keeps its name.
RENAMED: Mapping[str, str] = MappingProxyType({"Marital-Status": "Marital_Status"})
FEATURES = tuple(RENAMED.get(column, column) for column in COLUMNS)
VIEWS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "demographic": ("Sex", "Race", "Native_country"),
        "relationship": ("Marital_Status", "Relationship"),
        "occupation": ("Workclass", "Education", "Occupation"),
    }
)

LATER_VERSIONS = 2_096
WINDOW_START = pd.Timestamp("2022-09-16", tz="UTC")
WINDOW_END = pd.Timestamp("2023-09-16", tz="UTC")

# Two users to point at in prose. The first has one version, the file's first row.
STEADY_USER = "9f2ac416-06e1-44a0-87bd-d4787c85bf66"
STEADY_TIME = pd.Timestamp("2023-01-24T06:52:20", tz="UTC")
# The second has three; the last one is the only event after the window.
CHANGING_USER = "c5b7f1d2-8e34-4a6b-9d05-3f7a12e86c49"
CHANGING_TIMES = (
    pd.Timestamp("2023-01-07T09:14:27.305118", tz="UTC"),
    pd.Timestamp("2023-05-20T17:41:03.862940", tz="UTC"),
    pd.Timestamp("2023-12-04T11:26:55.017333", tz="UTC"),
)

# Each salt gives another history. With this one, the changing user's job and household change each time.
_SALT = b"43"
_FIXED_FOR_LIFE = list(VIEWS["demographic"])
_EDUCATION = (
    "Preschool",
    "1st-4th",
    "5th-6th",
    "7th-8th",
    "9th",
    "10th",
    "11th",
    "12th",
    "HS-grad",
    "Some-college",
    "Assoc-voc",
    "Assoc-acdm",
    "Bachelors",
    "Masters",
    "Prof-school",
    "Doctorate",
)
_MARRIED = frozenset({"Married-civ-spouse", "Married-AF-spouse", "Married-spouse-absent"})
_AFTER = {
    "Never-married": _MARRIED,
    "Separated": _MARRIED | {"Divorced", "Widowed"},
    "Divorced": _MARRIED,
    "Widowed": _MARRIED,
} | dict.fromkeys(_MARRIED, _MARRIED | {"Separated", "Divorced", "Widowed"})


def build_history(income: pd.DataFrame, *, later_versions: int = LATER_VERSIONS) -> pd.DataFrame:
    """Make every row of the income data one version of one user.

    The versions of a user agree on sex, race and country and differ in something else. They follow each other as in a
    life: education rises by one step at most, and nobody who was married becomes never-married. Hashes of the row
    numbers decide which rows belong together and when they happened. A random number generator would not do: its
    numbers may change with a release of numpy.

    Args:
        income: The income data, as `income.read_income` returns it.
        later_versions: How many rows are a later version of a user already seen.

    Returns:
        Shape (n_rows, 10), one row per row of `income` and in its order: `user_id` (str), `event_timestamp`
        (datetime64[us, UTC], no two alike within a user), and the eight features under their feature names.

    Raises:
        DataError: A column is missing, or there are too few rows that can follow each other.
    """
    missing = [column for column in COLUMNS if column not in income.columns]
    if missing:
        raise DataError(f"the income data has no column {', '.join(missing)}; run 'make data'")
    features = income[list(COLUMNS)].rename(columns=dict(RENAMED)).reset_index(drop=True)
    noise = _noise(len(features))

    order = _neighbours(features, noise[:, 0])
    linked = _choose_links(_can_follow(features.iloc[order], order), noise[order, 1], later_versions)
    user = np.cumsum(~linked) - 1
    times = _sorted_within(user, _times(noise[order, 2]))
    ids = np.array([str(uuid.UUID(bytes=noise[row, 4:].tobytes(), version=4)) for row in order[~linked]], dtype=object)

    placed = pd.DataFrame({USER_ID: ids[user], EVENT_TIMESTAMP: times}, index=order)
    placed = _with_documented_users(placed, user)
    return placed.sort_index().join(features)


def split_views(history: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Divide the history into one frame per feature view, each with the user and the time."""
    return {view: history[[USER_ID, EVENT_TIMESTAMP, *names]] for view, names in VIEWS.items()}


def _noise(n_rows: int) -> npt.NDArray[np.uint64]:
    """Hash each row number into six words, shape (n_rows, 6)."""
    digests = b"".join(hashlib.blake2b(b"row %d" % row, digest_size=48, salt=_SALT).digest() for row in range(n_rows))
    return np.frombuffer(digests, dtype="<u8").reshape(n_rows, 6)


def _neighbours(features: pd.DataFrame, noise: npt.NDArray[np.uint64]) -> npt.NDArray[np.intp]:
    """Sort rows by what never changes and then by education, so that neighbours could be the same person."""
    fixed = features.groupby(_FIXED_FOR_LIFE, sort=True).ngroup().to_numpy()
    return np.lexsort((noise, _education_rank(features), fixed))


def _can_follow(features: pd.DataFrame, order: npt.NDArray[np.intp]) -> npt.NDArray[np.bool_]:
    """Say for each row in that order whether it can be the next version of the row before it."""
    before = features.shift()
    same_person = (features[_FIXED_FOR_LIFE] == before[_FIXED_FOR_LIFE]).all(axis=1)
    step = np.diff(_education_rank(features), prepend=-99)
    allowed = {(old, new) for old, later in _AFTER.items() for new in later | {old}}
    marital = [pair in allowed for pair in zip(before["Marital_Status"], features["Marital_Status"], strict=True)]
    changed = (features != before).any(axis=1)
    possible: npt.NDArray[np.bool_] = same_person.to_numpy() & changed.to_numpy() & np.isin(step, (0, 1))
    possible &= np.array(marital)
    # The first row belongs to the documented user who has one version only.
    first = int(np.flatnonzero(order == 0)[0])
    possible[first : first + 2] = False
    return possible


def _choose_links(possible: npt.NDArray[np.bool_], noise: npt.NDArray[np.uint64], count: int) -> npt.NDArray[np.bool_]:
    candidates = np.flatnonzero(possible)
    if len(candidates) < count:
        raise DataError(f"{count} later versions asked for, and only {len(candidates)} rows can follow another")
    chosen = np.zeros(len(possible), dtype=np.bool_)
    chosen[candidates[np.argsort(noise[candidates], kind="stable")[:count]]] = True
    return chosen


def _times(noise: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """Spread moments over the window, in whole microseconds since 1970."""
    width = (WINDOW_END - WINDOW_START) // pd.Timedelta(1, "us")
    return (noise % np.uint64(width)).astype(np.int64) + WINDOW_START.value // 1_000


def _sorted_within(user: npt.NDArray[np.intp], times: npt.NDArray[np.int64]) -> pd.DatetimeIndex:
    # `user` ascends, so sorting by user, then time, leaves every user's moments in its own places.
    ordered = times[np.lexsort((times, user))]
    return pd.DatetimeIndex(ordered.astype("datetime64[us]")).tz_localize("UTC")


def _with_documented_users(placed: pd.DataFrame, user: npt.NDArray[np.intp]) -> pd.DataFrame:
    """Give the two documented users their ids and moments."""
    sizes = np.bincount(user)[user]
    # The changing user is whoever has three versions and comes first in the file.
    row = placed.index[sizes == 3].min()
    changing = user == user[placed.index.get_loc(row)]
    named = placed.copy()
    named.loc[0, USER_ID] = STEADY_USER
    named.loc[0, EVENT_TIMESTAMP] = STEADY_TIME
    named.loc[changing, USER_ID] = CHANGING_USER
    named.loc[changing, EVENT_TIMESTAMP] = list(CHANGING_TIMES)
    return named


def _education_rank(features: pd.DataFrame) -> npt.NDArray[np.int64]:
    ranks = {level: rank for rank, level in enumerate(_EDUCATION)}
    unknown = set(features["Education"]) - set(ranks)
    if unknown:
        raise DataError(f"unknown education {', '.join(map(repr, sorted(map(str, unknown))))}; run 'make data'")
    return np.array([ranks[level] for level in features["Education"]], dtype=np.int64)
