"""Work on the Dask cluster that DASK_SCHEDULER_ADDRESS names.

Workers find the platform in their own environment: no address of a service and no credential is in a task's arguments,
which a dashboard shows.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from typing import Any, TypeVar, get_args

from mlplatform.engines import EngineName
from mlplatform.errors import ServiceDownError, SettingsError

VARIABLE = "DASK_SCHEDULER_ADDRESS"  # Dask's own clients read it too
WAIT_S = 10
# Rows that one task reads, and that one share of a join holds on average: some hundred megabytes of Arrow.
ROWS_PER_TASK = 1_000_000
ATTEMPTS = 3
_Answer = TypeVar("_Answer")
Gather = Callable[[Sequence[Any]], list[Any]]


def scheduler_of(engine: str) -> str:
    """Give the address of the scheduler that an engine needs; empty for the engine of this process.

    Args:
        engine: One of `EngineName`.

    Raises:
        SettingsError: There is no such engine, or no cluster is named.
    """
    if engine not in get_args(EngineName):
        raise SettingsError(f"there is no engine {engine!r}; give one of: {', '.join(get_args(EngineName))}")
    if engine == "local":
        return ""
    if not os.environ.get(VARIABLE):
        raise SettingsError(
            f"the engine 'dask' needs a cluster and {VARIABLE} is not set; set it to tls://host:port, run "
            "'python -m mlplatform_ops with-dask COMMAND' for a cluster of this machine, or give engine='local'"
        )
    return os.environ[VARIABLE]


def map_rows(engine: str, function: Callable[..., Any], rows: range, *arguments: Any) -> list[Any]:
    """Call `function(*arguments, rows)` for all rows here, or for parts of them on the workers.

    What a lost worker was doing, another one does again.

    Args:
        engine: One of `EngineName`.
        function: A function of a module, which workers import.
        rows: Which rows.
        arguments: What to give the function beside its part of the rows; each worker gets it once.

    Returns:
        What the function returned for each part, in the order of the rows.

    Raises:
        SettingsError: There is no such engine, or as in `cluster`.
        ServiceDownError: As in `cluster`.
    """
    scheduler = scheduler_of(engine)
    if not scheduler:
        return [function(*arguments, rows)]

    def work(client: Any, gather: Gather) -> list[Any]:
        parts = split_rows(rows, count_tasks(client, len(rows)))
        # The scheduler keeps one copy, so that a worker that joins gets it too.
        given = [client.submit(lambda value: value, argument, pure=False) for argument in arguments]
        return gather([client.submit(function, *given, part, pure=False) for part in parts])

    return on_cluster(scheduler, work)


def count_tasks(client: Any, rows: int) -> int:
    """Say into how many tasks to divide rows: one a thread at least, and more where they would be large."""
    threads: int = sum(client.nthreads().values())
    return max(threads, math.ceil(rows / ROWS_PER_TASK))


def split_rows(rows: range, count: int) -> list[range]:
    """Divide rows into at most so many parts of nearly one size; none is empty, unless there are no rows."""
    count = max(min(count, len(rows)), 1)
    ends = [len(rows) * part // count for part in range(count + 1)]
    return [rows[start:stop] for start, stop in pairwise(ends)]


@contextmanager
def cluster(scheduler: str) -> Iterator[Any]:
    """Connect to a cluster for one job; the certificates are those of Dask's own settings.

    Raises:
        SettingsError: Dask is not installed, or the address is not one of TLS.
        ServiceDownError: The scheduler does not answer, has no workers, or lost too many of them.
    """
    try:
        from distributed import Client, Security
        from distributed.client import CancelledError
        from distributed.comm import CommClosedError
        from distributed.scheduler import KilledWorker
    except ImportError as error:
        raise SettingsError(
            f"{VARIABLE} is set and the packages of the group 'scale' are not installed; run 'make .venv/.scale'"
        ) from error
    if not scheduler.startswith("tls://"):
        raise SettingsError(
            f"{VARIABLE}={scheduler} is no address of TLS, and whoever reaches a scheduler runs code on it; "
            "start it with certificates and give tls://host:port"
        )
    where = f"the Dask scheduler at {scheduler}"
    otherwise = f"start it, or unset {VARIABLE} and work in this process"
    try:
        client = Client(scheduler, security=Security(require_encryption=True), timeout=WAIT_S, set_as_default=False)
    except (OSError, ValueError, TypeError) as error:
        raise ServiceDownError(f"{where} does not answer; {otherwise}") from error
    try:
        try:
            client.wait_for_workers(1, timeout=WAIT_S)
        except TimeoutError as error:
            raise ServiceDownError(f"{where} has no workers; start some, or unset {VARIABLE}") from error
        yield client
    except KilledWorker as error:
        raise ServiceDownError(
            f"{where} gave up, since workers kept dying over one task; give them more memory, or look at their logs"
        ) from error
    except (CancelledError, CommClosedError) as error:
        raise LostError(f"{where} lost its workers, or the connection to it ended; run it again") from error
    finally:
        try:
            client.close()
        except Exception:  # of its connecting again, which says less than what is raised already
            client.status = "closed"


class LostError(ServiceDownError):
    """What the cluster held for the driver is gone, and only the driver can begin again."""


def on_cluster(scheduler: str, job: Callable[[Any, Gather], _Answer]) -> _Answer:
    """Do a job on the cluster, from its beginning again where what nobody else could compute again is lost.

    The worker that held rows asked is gone; or the connection to the scheduler is, which forgets whom it worked for.

    Args:
        scheduler: The scheduler's address.
        job: Takes a client, and what waits for tasks and gives their results.
    """
    for _ in range(ATTEMPTS - 1):
        with suppress(LostError):
            return _attempt(scheduler, job)
    return _attempt(scheduler, job)


def _attempt(scheduler: str, job: Callable[[Any, Gather], _Answer]) -> _Answer:
    with cluster(scheduler) as client:
        connection = client.scheduler_comm

        def gather(futures: Sequence[Any]) -> list[Any]:
            # Dask connects again by itself, or fails to, and waits forever for tasks that it sent meanwhile.
            deadline = math.inf
            while not all(future.done() for future in futures):
                if client.scheduler_comm is not connection:
                    deadline = min(deadline, time.monotonic() + WAIT_S)
                    if client.status != "connecting" or time.monotonic() > deadline:
                        raise LostError(f"the connection to the Dask scheduler at {scheduler} ended; run it again")
                time.sleep(0.01)
            return list(client.gather(futures))

        return job(client, gather)
