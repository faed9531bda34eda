"""Moments as the stores compare them, without DuckDB, whose import takes longer than many an online read."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta


def microseconds(moment: datetime) -> int:
    """Count whole microseconds since 1970; a naive time is UTC."""
    aware = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    return (aware - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
