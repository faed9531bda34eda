"""What the benchmarks share: figures, contenders that take turns, and a table that is printed and kept."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import redis

from mlplatform.settings import find_root

OURS = "ours"
FOLDER = find_root() / "build" / "benchmarks"
HEAD = ("what", "size", "contender", "median", "spread", "rate", "beside")


@dataclass(frozen=True)
class Figure:
    """What was measured of one contender.

    Attributes:
        what: What was done.
        contender: Who did it.
        value: The median.
        unit: Its unit.
        size: Of what, for the reader.
        rows: How many rows that is; 0 where nothing grows.
        spread: The fastest and the slowest, or the 99th percentile.
        rate: How much a second.
        beside: The ratio to what it is compared with.
    """

    what: str
    contender: str
    value: float
    unit: str = "s"
    size: str = ""
    rows: int = 0
    spread: str = ""
    rate: str = ""
    beside: str = ""

    @property
    def cells(self) -> tuple[str, ...]:
        """Its line of the table."""
        digits = 2 if self.value >= 1 else 3
        median = f"{self.value:,.{digits if self.value < 100 else 0}f} {self.unit}"
        return self.what, self.size, self.contender, median, self.spread, self.rate, self.beside


def show(cells: Sequence[str]) -> None:
    """Write a line of a table as soon as it is known."""
    sys.stdout.write(f"| {' | '.join(cells)} |\n")
    sys.stdout.flush()


def keep(name: str, figures: Iterable[Figure]) -> None:
    """Print figures as they come, and keep them in `build/benchmarks/<name>.json`, also if the rest fails."""
    kept: list[dict[str, object]] = []
    FOLDER.mkdir(parents=True, exist_ok=True)
    show(HEAD)
    show(("---",) * len(HEAD))
    for figure in figures:
        show(figure.cells)
        kept.append(asdict(figure))
        (FOLDER / f"{name}.json").write_text(json.dumps(kept, indent=1) + "\n")


def keys_of(client: redis.Redis, project: str) -> list[bytes]:
    """List the keys of the online store that belong to a project."""
    return [key for key in client.scan_iter(count=10_000) if key.endswith(project.encode())]


def bytes_per_key(client: redis.Redis, keys: Sequence[bytes]) -> float:
    """Ask what the online store keeps for a key, which is a user's, on average."""
    pipeline = client.pipeline(transaction=False)
    for key in keys:
        pipeline.memory_usage(key)
    return float(statistics.mean(pipeline.execute()))


def timed(run: Callable[[], object]) -> float:
    """Give the seconds a call takes."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def take_turns(
    what: str, runs: Mapping[str, Callable[[], float]], repeats: int, *, size: str = "", rows: int = 0
) -> Iterator[Figure]:
    """Let contenders run one after the other, several times, so that a busy moment of the machine meets all of them.

    Args:
        what: What they do.
        runs: Who does it, and a call that gives the seconds it took. All are compared with the last one.
        repeats: How often; the median counts.
        size: Of what.
        rows: How many rows that is; then rates are compared in place of times.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            seconds[name].append(run())
    yield from compare(what, seconds, size=size, rows=rows)


def compare(what: str, seconds: Mapping[str, Sequence[float]], *, size: str = "", rows: int = 0) -> Iterator[Figure]:
    """Give the medians of contenders, each beside the last one's."""
    *_, last = (statistics.median(times) for times in seconds.values())
    for name, times in seconds.items():
        median = statistics.median(times)
        yield Figure(
            what,
            name,
            median,
            size=size,
            rows=rows,
            spread=f"{min(times):.2f} to {max(times):.2f} s",
            rate=f"{rows / median:,.0f} rows/s" if rows else "",
            beside=f"{last / median:.2f} x its rate" if rows else f"{median / last:.2f} x its time",
        )
