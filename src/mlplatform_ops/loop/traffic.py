"""Users who ask the endpoint while the loop goes on, and a record of every answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import pandas as pd
import requests

from mlplatform.errors import PlatformError

PER_S = 30.0  # requests of each asker: a quarter of what one endpoint answers on a small machine
ASKERS = 2
TIMEOUT_S = 120.0  # on a machine that is busy with other things, an answer may take its time; it must come
COLUMNS = ("asked", "answered", "user_id", "status", "version", "score", "began_in", "ended_in")


class LoopError(PlatformError, RuntimeError):
    """A step of the loop did not go as it must."""


class Traffic:
    """Asks for one user after the other, in threads.

    Each user is asked for by one thread alone, so that the order of a user's answers is known.

    Args:
        url: The endpoint.
        token: What it wants to see.
        users: User ids, all of them known to the online store.
    """

    def __init__(self, url: str, token: str, users: Sequence[str]) -> None:
        self._url, self._headers = f"{url}/predict_users", {"Authorization": f"Bearer {token}"}
        self._users = list(users)
        self._rows: list[tuple[float, float, str, int, int, float, str, str]] = []
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._ask_all, args=(self._users[place::ASKERS],), daemon=True)
            for place in range(ASKERS)
        ]
        self.step = ""
        self.pace_s = 1 / PER_S

    def start(self) -> None:
        """Begin to ask."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Stop asking; every question that was asked is answered first."""
        self._stop.set()
        for thread in self._threads:
            thread.join()

    @property
    def count(self) -> int:
        """How many questions were answered so far, or failed."""
        return len(self._rows)

    def frame(self) -> pd.DataFrame:
        """Give the record as a table, oldest answer first: `COLUMNS`; the status 0 means that no answer came."""
        return pd.DataFrame(self._rows, columns=list(COLUMNS))

    def wait_for(self, version: int, *, users: Sequence[str] | None = None, timeout_s: float = 300.0) -> float:
        """Wait until a version answered everybody who was asked for in the last round; give the seconds.

        Args:
            version: The version.
            users: Look at these only.
            timeout_s: How long that may take, in seconds.

        Raises:
            LoopError: It did not.
        """
        began, wanted = time.monotonic(), set(users or self._users)
        first = self.count
        while time.monotonic() - began < timeout_s:
            late = [row for row in self._rows[first:] if row[2] in wanted]
            answered = {row[2]: row[4] for row in late}
            if len(answered) == len(wanted) and set(answered.values()) == {version}:
                return time.monotonic() - began
            time.sleep(0.1)
        raise LoopError(f"version {version} did not answer everybody within {timeout_s:.0f} s")

    def _ask_all(self, users: Sequence[str]) -> None:
        place, due = 0, time.monotonic()
        with requests.Session() as session:
            while not self._stop.is_set():
                self._ask(session, users[place % len(users)])
                place += 1
                due = max(due + self.pace_s, time.monotonic() - 1)  # what was missed is made up for, for a second
                self._stop.wait(max(0.0, due - time.monotonic()))

    def _ask(self, session: requests.Session, user: str) -> None:
        step, asked, status, version, score = self.step, time.time(), 0, 0, float("nan")
        try:
            reply = session.post(self._url, json={"users": [user]}, headers=self._headers, timeout=TIMEOUT_S)
            status = reply.status_code
            (entry,) = reply.json()["predictions"]
            version, score = int(entry["model_version"]), float(entry["score"])
        except (requests.RequestException, KeyError, TypeError, ValueError):
            pass  # the row says so: a status that is not 200, or a score that is no number
        self._rows.append((asked, time.time(), user, status, version, score, step, self.step))


def failed(rows: pd.DataFrame) -> pd.DataFrame:
    """Pick the questions without a good answer; all users are known, so each must get a score."""
    return rows[(rows["status"] != 200) | rows["score"].isna()]


def flipped(rows: pd.DataFrame, step: str) -> int:
    """Count the users who got answers of more than one version during a step."""
    during = rows[(rows["began_in"] == step) & (rows["ended_in"] == step)]
    return int((during.groupby("user_id")["version"].nunique() > 1).sum())
