"""Time `make run` beside the usual way of running notebooks, and show what its longest chain consists of.

Ours starts a platform and runs all core notebooks. The usual way starts MLflow's server as it comes and runs the same
notebooks one after another with nbconvert, on a platform that is there. A chain is notebooks that need each other; its
unavoidable parts are the kernels, the imports and the fits, which `kernel_parts.py` counts in each kernel.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from figures import OURS, Figure, compare, keep, timed
from waits import mlflow_server

from mlplatform.settings import STATE_VARIABLE, find_root
from mlplatform_ops.runner import find_notebooks, needs

PARTS = ("kernel", "imports", "fits")
ALL = "all core notebooks, platform down before"


@dataclass(frozen=True)
class Timing:
    """Seconds of one notebook: all of them, and the parts that nothing avoids."""

    whole: float
    parts: dict[str, float]


def main() -> None:
    """Measure, print a Markdown table and keep it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--repeats", type=int, default=3, help="runs of which the median counts; each takes five minutes"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        keep("runs", measure(Path(folder).resolve(), options.repeats))


def measure(folder: Path, repeats: int) -> Iterator[Figure]:
    """Let both ways take turns on a platform of their own."""
    startup = folder / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    shutil.copy(Path(__file__).with_name("kernel_parts.py"), startup)
    environ = {**os.environ, STATE_VARIABLE: str(folder / "state")}
    notebooks = find_notebooks(find_root() / "notebooks")
    executed, parts = folder / "executed", folder / "parts"
    watched = {**environ, "IPYTHONDIR": str(folder / "ipython"), "KERNEL_PARTS": str(parts)}

    def command(*words: str, env: Mapping[str, str] = environ) -> None:
        subprocess.run([sys.executable, "-m", *words], check=True, capture_output=True, env=env)

    def ours() -> float:
        shutil.rmtree(parts, ignore_errors=True)
        parts.mkdir()
        return timed(lambda: command("mlplatform_ops", "run", "--fresh", "--output", str(executed), env=watched))

    def usual() -> float:
        with_defaults = timed(lambda: start_mlflow(folder))
        options = ("--to", "notebook", "--execute", "--output-dir", str(folder / "usual"))
        return with_defaults + sum(
            timed(lambda path=path: command("nbconvert", *options, str(path))) for path in notebooks
        )

    seconds: dict[str, list[float]] = {OURS: [], "the usual way": []}
    chains: list[dict[str, Timing]] = []
    try:
        command("mlplatform_ops", "up")  # makes certificates, databases and buckets
        for _ in range(repeats):
            command("mlplatform_ops", "down")
            seconds[OURS].append(ours())
            chains.append(longest({path.stem: needs(path) for path in notebooks}, read(executed, parts)))
            seconds["the usual way"].append(usual())
    finally:
        command("mlplatform_ops", "down")
    yield from compare(ALL, seconds)
    sums = [sum(sum(timing.parts.values()) for timing in chain.values()) for chain in chains]
    name = f"kernels, imports and fits of the longest chain ({', '.join(stem[:2] for stem in chains[-1])})"
    ratio = statistics.median(seconds[OURS]) / statistics.median(sums)
    yield Figure(ALL, name, statistics.median(sums), beside=f"ours takes {ratio:.2f} x this")
    for stem, timing in chains[-1].items():
        spent = ", ".join(f"{part} {timing.parts[part]:.1f}" for part in PARTS)
        yield Figure("one notebook of that chain, in the last run", stem, timing.whole, spread=spent)


def start_mlflow(folder: Path) -> None:
    """Start MLflow's server with its own settings, wait for its first answer, and end it."""
    with mlflow_server(folder, (), {}):
        pass


def read(executed: Path, parts: Path) -> dict[str, Timing]:
    """Read how long each notebook took, and its parts: a kernel's file names the cells that it ran."""
    kernels = [json.loads(path.read_text()) for path in parts.glob("*.json")]
    timings = {}
    for path in sorted(executed.glob("*.ipynb")):
        notebook = json.loads(path.read_text())
        code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
        sources = {"".join(cell["source"]).strip() for cell in code}
        kernel = max(kernels, key=lambda kernel: len(sources & {cell.strip() for cell in kernel["cells"]}))
        how: dict[str, Any] = notebook["metadata"]["papermill"]
        begun = datetime.fromisoformat(code[0]["metadata"]["papermill"]["start_time"])
        waited = (begun - datetime.fromisoformat(how["start_time"])).total_seconds()
        counted = {"kernel": waited, "imports": kernel["imports"], "fits": kernel["fits"]}
        timings[path.stem] = Timing(how["duration"], counted)
    return timings


def longest(graph: Mapping[str, set[str]], timings: Mapping[str, Timing]) -> dict[str, Timing]:
    """Find the notebooks that need each other and together take longest."""

    def chain(name: str) -> list[str]:
        before = max((chain(need) for need in graph[name]), key=cost, default=[])
        return [*before, name]

    def cost(names: list[str]) -> float:
        return sum(timings[name].whole for name in names)

    return {name: timings[name] for name in max((chain(name) for name in graph), key=cost)}


if __name__ == "__main__":
    main()
