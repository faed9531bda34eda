"""How long, and how often, the clients of a process wait for a service."""

from __future__ import annotations

import errno
from typing import Any

from mlplatform.settings import CONNECT_TIMEOUT_S, S3_ANSWER_TIMEOUT_S, s3_attempts


def limit_waiting() -> None:
    """Let libraries of this process give up on a service that hangs; call it before they make their clients.

    MLflow's client and others on urllib3 would send a request that was not answered in time again and again. It may
    have been carried out, so it is sent once; a refused connection is tried again as before, a full disk is not. Feast
    and MLflow make S3 clients without a limit of their own, and botocore waits for a minute, five times.
    """
    import botocore.config
    from urllib3.exceptions import ReadTimeoutError
    from urllib3.util.retry import Retry

    botocore.config.Config.OPTION_DEFAULTS.update(s3_limits())
    asks_again = Retry.increment
    if getattr(asks_again, "limited", False):
        return

    def increment(self: Retry, *arguments: Any, **named: Any) -> Retry:
        if isinstance(named.get("error"), ReadTimeoutError):
            raise named["error"]
        answer = named.get("response")
        if answer is not None and answer.status == 503 and b"disk is full" in answer.data:
            raise OSError(errno.ENOSPC, "no space left where the MLflow server keeps its database; free some")
        return asks_again(self, *arguments, **named)

    increment.limited = True  # type: ignore[attr-defined]
    Retry.increment = increment  # type: ignore[method-assign, assignment]


def s3_limits() -> dict[str, Any]:
    """Give the time limits and attempts of a client of the object store, as `botocore.config.Config` takes them."""
    return {
        "connect_timeout": CONNECT_TIMEOUT_S,
        "read_timeout": S3_ANSWER_TIMEOUT_S,
        "retries": {"total_max_attempts": s3_attempts(), "mode": "standard"},
    }
