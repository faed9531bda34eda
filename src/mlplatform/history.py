"""The feature history: whom each row of the table is about, and since when.

A feature store needs ids and times. The census file has neither, and then this module invents them, the same on every
machine: each row becomes one version of somebody, valid from one moment on. Whoever asks the feature store about that
key at that moment must get that row back, so the file itself checks every point-in-time join.
"""

from __future__ import annotations

import hashlib
import uuid

import numpy as np
import numpy.typing as npt
import pandas as pd

from mlplatform import table
from mlplatform.census import lives
from mlplatform.census.lives import CHANGING_TIMES as CHANGING_TIMES
from mlplatform.census.lives import CHANGING_USER as CHANGING_USER
from mlplatform.census.lives import STEADY_TIME as STEADY_TIME
from mlplatform.census.lives import STEADY_USER as STEADY_USER
from mlplatform.description.entries import Table
from mlplatform.errors import DataError

# Feast's own name for the moment asked about; in the feature files the moments have it too.
EVENT_TIMESTAMP = "event_timestamp"

__getattr__ = table.names(
    __name__,
    USER_ID=lambda described: described.entity.key,
    FEATURES=lambda described: tuple(described.features.values()),
    VIEWS=lambda described: view_features(described),
    WINDOW_START=lambda described: pd.Timestamp(described.entity.start, tz="UTC"),
    WINDOW_END=lambda described: pd.Timestamp(described.entity.end, tz="UTC"),
)

# Each salt gives another history. With this one, the changing user's job and household change each time.
_SALT = b"43"


def view_features(described: Table) -> dict[str, tuple[str, ...]]:
    """List the features of each view."""
    return {
        name: tuple(described.features[column] for column in view.columns) for name, view in described.views.items()
    }


def build_history(frame: pd.DataFrame, *, later_versions: int = lives.LATER_VERSIONS) -> pd.DataFrame:
    """Make every row of the table one version of somebody.

    Where the file has no ids and times, hashes of the row numbers decide them; for the census they also decide which
    rows belong together, by the rules of `census.lives`. A random number generator would not do: its numbers may change
    with a release of numpy.

    Args:
        frame: The table, as `table.read` returns it.
        later_versions: Of the census only: how many rows are a later version of a user already seen.

    Returns:
        One row per row of `frame` and in its order: the key (str), `event_timestamp` (datetime64[us, UTC], no two alike
        for one key), and the features under their feature names.

    Raises:
        DataError: A column is missing, two rows have the same key and time, or too few rows of the census can
            follow each other.
    """
    described = table.current()
    entity = described.entity
    missing = [column for column in described.columns if column not in frame.columns]
    if missing:
        raise DataError(f"the {described.name} data has no column {', '.join(missing)}; {described.text('restore')}")
    features = frame[list(described.columns)].rename(columns=described.features).reset_index(drop=True)
    if entity.history == "file":
        placed = frame[[entity.key, entity.time]].set_axis([entity.key, EVENT_TIMESTAMP], axis=1).reset_index(drop=True)
        if twice := int(placed.duplicated().sum()):
            raise DataError(
                f"{entity.key} and {entity.time} are those of an earlier row in {twice} rows; keep one of each"
            )
        return placed.join(features)
    noise = _noise(len(features))
    order, linked = np.arange(len(features)), np.zeros(len(features), dtype=np.bool_)
    if entity.history == "census":
        order, linked = lives.link(features, noise, later_versions)
    user = np.cumsum(~linked) - 1
    times = _sorted_within(user, _times(noise[order, 2], described))
    ids = np.array([str(uuid.UUID(bytes=noise[row, 4:].tobytes(), version=4)) for row in order[~linked]], dtype=object)
    placed = pd.DataFrame({entity.key: ids[user], EVENT_TIMESTAMP: times}, index=order)
    if entity.history == "census":
        placed = lives.with_documented_users(placed, user)
    return placed.sort_index().join(features)


def split_views(history: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Divide the history into one frame per feature view, each with the key and the time."""
    described = table.current()
    placed = [described.entity.key, EVENT_TIMESTAMP]
    return {view: history[[*placed, *names]] for view, names in view_features(described).items()}


def _noise(n_rows: int) -> npt.NDArray[np.uint64]:
    """Hash each row number into six words, shape (n_rows, 6)."""
    digests = b"".join(hashlib.blake2b(b"row %d" % row, digest_size=48, salt=_SALT).digest() for row in range(n_rows))
    return np.frombuffer(digests, dtype="<u8").reshape(n_rows, 6)


def _times(noise: npt.NDArray[np.uint64], described: Table) -> npt.NDArray[np.int64]:
    """Spread moments over the window, in whole microseconds since 1970."""
    start, end = (pd.Timestamp(day, tz="UTC") for day in (described.entity.start, described.entity.end))
    width = (end - start) // pd.Timedelta(1, "us")
    return (noise % np.uint64(width)).astype(np.int64) + start.value // 1_000


def _sorted_within(user: npt.NDArray[np.intp], times: npt.NDArray[np.int64]) -> pd.DatetimeIndex:
    # `user` ascends, so sorting by user, then time, leaves every user's moments in its own places.
    ordered = times[np.lexsort((times, user))]
    return pd.DatetimeIndex(ordered.astype("datetime64[us]")).tz_localize("UTC")
