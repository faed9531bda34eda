"""Keep the state in which a complete `make run` leaves this machine's platform, and bring the platform back to it.

Neither stops a service. The copy lies in the state folder: MLflow's databases, every bucket with its objects, and what
the online store holds. Each part can be put back again, so what was interrupted is mended by the next `make reset`.
The feature server and the Feast UI read the feature registry again within a minute.
"""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from datetime import datetime
from itertools import islice
from pathlib import Path

import redis
from filelock import FileLock

from mlplatform.connection import s3_client
from mlplatform.errors import MissingObjectError, SettingsError
from mlplatform.settings import Settings
from mlplatform_ops.backup import bucket_names, copy_sqlite, put_back, save
from mlplatform_ops.embedded.services import AFTER_RUN, DATABASES

ONLINE = "online.db"
# Keys of the online store in one round trip.
AT_ONCE = 2000


def is_kept(state: Path) -> bool:
    """Say whether a complete run has left a copy."""
    return (state / AFTER_RUN / "copy").is_dir()


def keep(state: Path, settings: Settings) -> None:
    """Copy what the platform holds now, in place of an earlier copy.

    Args:
        state: The platform's state folder.
        settings: The platform, which runs.
    """
    folder = state / AFTER_RUN
    folder.mkdir(mode=0o700, exist_ok=True)
    store = s3_client(settings)
    with FileLock(folder / "lock"):
        new = folder / "new"
        shutil.rmtree(new, ignore_errors=True)
        save(store, new, databases=[state / "mlflow" / name for name in DATABASES], buckets=bucket_names(store))
        with redis.Redis.from_url(settings.redis_url) as client, closing(sqlite3.connect(new / ONLINE)) as file, file:
            file.execute("CREATE TABLE entry (key BLOB PRIMARY KEY, expires_ms INTEGER, dump BLOB)")
            file.executemany("INSERT OR REPLACE INTO entry VALUES (?, ?, ?)", _entries(client))
        shutil.rmtree(folder / "copy", ignore_errors=True)
        new.replace(folder / "copy")


def reset(state: Path, settings: Settings) -> str:
    """Bring the platform back to the copy.

    Args:
        state: The platform's state folder.
        settings: The platform, which runs.

    Returns:
        What was done, in one line.

    Raises:
        MissingObjectError: There is no copy.
        SettingsError: Another MLflow made it.
    """
    copy = find_copy(state)
    databases = {copy / "databases" / name: state / "mlflow" / name for name in DATABASES}
    for kept, used in databases.items():
        if _tables(kept) != _tables(used):
            raise SettingsError("another version of MLflow runs than the one that ran then; run 'make run FRESH=1'")
    with FileLock(copy.with_name("lock")):
        removed, written = put_back(s3_client(settings), copy)
        with redis.Redis.from_url(settings.redis_url) as client:
            values = _put_back_online(client, copy / ONLINE)
        for kept, used in databases.items():
            copy_sqlite(kept, used)
    when = datetime.fromtimestamp((copy / ONLINE).stat().st_mtime).astimezone()  # nothing writes to it afterwards
    return (
        f"as after the run of {when:%Y-%m-%d %H:%M}: {removed} objects removed, {written} written again, "
        f"{values} keys of the online store; MLflow's runs, models and users are those of then"
    )


def find_copy(state: Path) -> Path:
    """Find the copy.

    Raises:
        MissingObjectError: There is none.
    """
    if not is_kept(state):
        raise MissingObjectError(f"no complete run is kept in {state}; run 'make run' first")
    return state / AFTER_RUN / "copy"


def _entries(client: redis.Redis) -> Iterator[tuple[bytes, int, bytes]]:
    """Give each key of the online store, the moment when it ends (-1 for never), and its value as dumped."""
    scanned = client.scan_iter(count=AT_ONCE)
    while keys := list(islice(scanned, AT_ONCE)):
        with client.pipeline(transaction=False) as pipeline:
            for key in keys:
                pipeline.pexpiretime(key)
                pipeline.dump(key)
            answers = pipeline.execute()
        for key, expires_ms, dump in zip(keys, answers[::2], answers[1::2], strict=True):
            if dump is not None:
                yield key, expires_ms, dump


def _put_back_online(client: redis.Redis, path: Path) -> int:
    """Remove the keys that came later, write those that differ or are gone, and say how many these were."""
    found = {key: entry for key, *entry in _entries(client)}
    with closing(sqlite3.connect(path)) as file:
        saved = {key: entry for key, *entry in file.execute("SELECT * FROM entry")}
    different = [key for key in found.keys() | saved.keys() if found.get(key) != saved.get(key)]
    for start in range(0, len(different), AT_ONCE):
        with client.pipeline(transaction=False) as pipeline:
            for key in different[start : start + AT_ONCE]:
                if key in saved:
                    expires_ms, dump = saved[key]
                    pipeline.restore(key, max(expires_ms, 0), dump, replace=True, absttl=True)
                else:
                    pipeline.delete(key)
            pipeline.execute()
    return len(different)


def _tables(database: Path) -> list[tuple[str, ...]]:
    with closing(sqlite3.connect(database)) as file:
        return file.execute("SELECT name, sql FROM sqlite_schema ORDER BY name").fetchall()
