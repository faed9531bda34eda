"""What an endpoint saw, kept in the object store for the drift watch: the columns, version and score, and no more."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

import pandas as pd

from mlplatform import objectstore, table
from mlplatform.history import EVENT_TIMESTAMP
from mlplatform.settings import DATASETS_BUCKET

FOLDER = f"s3://{DATASETS_BUCKET}/endpoint"
VERSION, SCORE = "model_version", "score"
CHALLENGER_VERSION, CHALLENGER_SCORE = "challenger_version", "challenger_score"


def logged() -> tuple[str, ...]:
    """Name the columns of a row that was answered."""
    return (*table.current().columns, VERSION, SCORE, EVENT_TIMESTAMP)


def shadowed() -> tuple[str, ...]:
    """Name the columns of a row that the challenger was asked about too."""
    return (*table.current().columns, VERSION, SCORE, CHALLENGER_VERSION, CHALLENGER_SCORE, EVENT_TIMESTAMP)


class EndpointLog:
    """Collects rows in memory and writes them as parquet files, `<folder>/<date>/rows-<digest>.parquet`.

    Args:
        folder: Where the files go.
        columns: The columns of a row, by default `logged()`.
        most: How many rows are kept between two writes; further ones are dropped, and counted.
        every_s: How often to write, in seconds.
        notify: Called with a line when something cannot be written.
    """

    def __init__(
        self,
        folder: str = FOLDER,
        columns: Sequence[str] | None = None,
        *,
        most: int = 5_000,
        every_s: float = 10.0,
        notify: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._folder, self._columns, self._most = folder, tuple(columns or logged()), most
        self._every_s, self._notify = every_s, notify
        self._rows: deque[tuple[object, ...]] = deque()
        self._stop = threading.Event()
        self._writing = threading.Lock()
        self.dropped = 0

    def add(self, row: Sequence[object]) -> None:
        """Take one row, whose last value is the time of the answer; it is dropped when there is no room."""
        if len(self._rows) >= self._most:
            self.dropped += 1
        else:
            self._rows.append((*row, time.time()))

    def write(self) -> str | None:
        """Write what there is, and give its address; rows that cannot be written are kept for the next time."""
        with self._writing:
            count = len(self._rows)
            if not count:
                return None
            frame = pd.DataFrame([self._rows[index] for index in range(count)], columns=list(self._columns))
            moments = pd.to_datetime(frame[EVENT_TIMESTAMP], unit="s", utc=True)
            frame[EVENT_TIMESTAMP] = moments.astype("datetime64[us, UTC]")
            try:
                uri = objectstore.write_frame(frame, f"{self._folder}/{datetime.now(UTC):%Y-%m-%d}/rows.parquet")
            except Exception as error:  # whatever it is, it may have passed the next time
                self._notify(f"rows are kept until they can be written: {error}")
                return None
            for _ in range(count):
                self._rows.popleft()
            return uri

    def start(self) -> None:
        """Write again and again, in a thread."""
        threading.Thread(target=self._watch, name="endpoint-log", daemon=True).start()

    def _watch(self) -> None:
        while not self._stop.wait(self._every_s):
            self.write()

    def stop(self) -> None:
        """End the thread, and write what is left."""
        self._stop.set()
        self.write()
