"""Lives for the people of the census: which row can be the next version of whom, and two users to point at in prose."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pandas as pd

from mlplatform.errors import DataError

LATER_VERSIONS = 2_096

# The first of the two has one version, the file's first row.
STEADY_USER = "9f2ac416-06e1-44a0-87bd-d4787c85bf66"
STEADY_TIME = pd.Timestamp("2023-01-24T06:52:20", tz="UTC")
# The second has three; the last one is the only event after the window.
CHANGING_USER = "c5b7f1d2-8e34-4a6b-9d05-3f7a12e86c49"
CHANGING_TIMES = (
    pd.Timestamp("2023-01-07T09:14:27.305118", tz="UTC"),
    pd.Timestamp("2023-05-20T17:41:03.862940", tz="UTC"),
    pd.Timestamp("2023-12-04T11:26:55.017333", tz="UTC"),
)

_FIXED_FOR_LIFE = ["Sex", "Race", "Native_country"]
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


def link(
    features: pd.DataFrame, noise: npt.NDArray[np.uint64], later_versions: int = LATER_VERSIONS
) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.bool_]]:
    """Choose which rows are one person's life.

    The versions of a user agree on sex, race and country and differ in something else. They follow each other as in a
    life: education rises by one step at most, and nobody who was married becomes never-married.

    Args:
        features: The eight features, under their feature names.
        noise: A hash of each row's number, shape (n_rows, 6).
        later_versions: How many rows are a later version of a user already seen.

    Returns:
        The rows in an order in which a life stands together; and for each row in that order, whether it is a later
        version of the one before it.

    Raises:
        DataError: The table is another one, or there are too few rows that can follow each other.
    """
    if missing := [name for name in (*_FIXED_FOR_LIFE, "Education", "Marital_Status") if name not in features]:
        raise DataError(
            f'the census\' history needs {", ".join(missing)}; write history = "invented" or "file" in data/table.toml'
        )
    order = _neighbours(features, noise[:, 0])
    return order, _choose_links(_can_follow(features.iloc[order], order), noise[order, 1], later_versions)


def with_documented_users(placed: pd.DataFrame, user: npt.NDArray[np.intp]) -> pd.DataFrame:
    """Give the two documented users their ids and moments.

    Args:
        placed: Id and moment of each row, with the row's number as index.
        user: A number for each user.
    """
    sizes = np.bincount(user)[user]
    # The changing user is whoever has three versions and comes first in the file.
    row = placed.index[sizes == 3].min()
    changing = user == user[placed.index.get_loc(row)]
    named = placed.copy()
    named.loc[0, "user_id"] = STEADY_USER
    named.loc[0, "event_timestamp"] = STEADY_TIME
    named.loc[changing, "user_id"] = CHANGING_USER
    named.loc[changing, "event_timestamp"] = list(CHANGING_TIMES)
    return named


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


def _education_rank(features: pd.DataFrame) -> npt.NDArray[np.int64]:
    ranks = {level: rank for rank, level in enumerate(_EDUCATION)}
    unknown = set(features["Education"]) - set(ranks)
    if unknown:
        raise DataError(f"unknown education {', '.join(map(repr, sorted(map(str, unknown))))}; run 'make data'")
    return np.array([ranks[level] for level in features["Education"]], dtype=np.int64)
