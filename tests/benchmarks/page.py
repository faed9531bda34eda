"""Make `docs/speed.md` and its plot from the figures of the last `make bench`."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotnine as p9
from figures import FOLDER, HEAD, OURS, Figure
from matplotlib import rc_context

from mlplatform.figures import COLOURS, use_theme
from mlplatform.settings import find_root

PARTS = {
    "runs": "All notebooks",
    "features": "The feature store",
    "waits": "Training, objects, start and stop",
    "environment": "The environment",
}
PACKAGES = ("mlflow", "feast", "duckdb", "redis", "scikit-learn", "xgboost", "pandas", "pyarrow")
PLOT = "docs/images/growth.svg"
ALT = (
    "Seconds, or MiB, by rows on logarithmic axes: lines for ours, for Feast's stock parts and for the floor, and a "
    "dashed line for growth as n log n"
)
INTRO = """# Speed

What `make bench SCALES='1 10 100'` measured on one machine, on the rows, users and times of the census history, one,
ten and a hundred times over. Contenders take turns, each figure is the median of five runs, and of three where all
notebooks run, and a time counts only after the answers were equal. The last column compares with the last contender of
the same size. Compare the ratios: the seconds are this machine's. `make bench` measures yours, and writes this page.
"""


def main() -> None:
    """Write the page and its plot."""
    root = find_root()
    read = {name: [Figure(**entry) for entry in json.loads(path.read_text())] for name, path in parts().items()}
    lines = [INTRO, f"{machine()}\n"]
    for name, figures in read.items():
        lines += [f"## {PARTS[name]}\n", *tables(figures)]
    grown = [figure for figures in read.values() for figure in figures if figure.rows and figure.unit in {"s", "MiB"}]
    table = series(grown)
    lines += ["## Growth\n", f"![{ALT}]({Path(PLOT).relative_to('docs')})\n", *growth(table)]
    with rc_context({"svg.hashsalt": PLOT}):  # the same figures give the same bytes
        draw(table).save(root / PLOT, verbose=False, metadata={"Date": None})
    (root / "docs" / "speed.md").write_text("\n".join(lines))


def parts() -> dict[str, Path]:
    """List what was measured."""
    found = {name: FOLDER / f"{name}.json" for name in PARTS if (FOLDER / f"{name}.json").exists()}
    return found or sys.exit("nothing was measured; run 'make bench'")


def machine() -> str:
    """Describe the machine and what was measured."""
    model = next(
        (line.partition(": ")[2] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.machine(),
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    packages = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return (
        f"The machine: {os.cpu_count()} cores of {model}, {memory:.0f} GiB, {platform.system()}, "
        f"Python {platform.python_version()}.\nWith {packages}."
    )


def tables(figures: Sequence[Figure]) -> Iterator[str]:
    """Give one table for each thing that was measured."""
    for what in dict.fromkeys(figure.what for figure in figures):
        cells = pd.DataFrame([figure.cells for figure in figures if figure.what == what], columns=pd.Index(HEAD))
        used = cells.drop(columns="what").loc[:, lambda kept: (kept != "").any()]
        lines = [used.columns, ["---"] * used.shape[1], *used.to_numpy()]
        yield f"### {what[0].upper()}{what[1:]}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def series(figures: Sequence[Figure]) -> pd.DataFrame:
    """Give what was measured at several sizes: columns `what`, `contender`, `rows` and `value`."""
    table = pd.DataFrame([(f.what.partition(";")[0], f.contender, f.rows, f.value) for f in figures])
    table.columns = pd.Index(["what", "contender", "rows", "value"])
    return table.groupby(["what", "contender"]).filter(lambda some: len(some) > 1)


def n_log_n(few: Any, many: Any) -> Any:
    """Give how many times as much work n log n is for many rows as for few."""
    return many * np.log(many) / few / np.log(few)


def growth(table: pd.DataFrame) -> Iterator[str]:
    """Say how much longer each takes from the fewest rows to the most, and what exceeds n log n."""
    over = []
    yield "| what | contender | rows | times as much | n log n |"
    yield "|---|---|---|---|---|"
    for (what, contender), some in table.groupby(["what", "contender"], sort=False):
        first, last = some.iloc[0], some.iloc[-1]
        allowed = n_log_n(first["rows"], last["rows"])
        grown = last["value"] / first["value"]
        yield f"| {what} | {contender} | {first['rows']:,} to {last['rows']:,} | {grown:.3g} | {allowed:.3g} |"
        over += [f"{what}, {contender}"] if grown > allowed else []
    if over:
        yield f"\nTime grows faster than n log n for: {'; '.join(over)}. [When it grows](growing.md) says more."
    yield ""


def draw(table: pd.DataFrame) -> p9.ggplot:
    """Draw every series on logarithmic axes, and n log n from our first point on."""
    use_theme()
    bound = table[table["contender"].str.startswith(OURS)].groupby(["what", "contender"], as_index=False).first()
    ends = bound.merge(table.groupby("what", as_index=False)["rows"].max(), on="what", suffixes=("", "_end"))
    ends["end"] = ends["value"] * n_log_n(ends["rows"], ends["rows_end"])
    return (
        p9.ggplot(table, p9.aes("rows", "value", color="contender", shape="contender"))
        + p9.geom_segment(
            p9.aes(x="rows", y="value", xend="rows_end", yend="end"),
            ends,
            inherit_aes=False,
            linetype="dashed",
            color="gray",
        )
        + p9.geom_line()
        + p9.geom_point(size=2.5)
        + p9.facet_wrap("what", scales="free")
        + p9.scale_x_log10()
        + p9.scale_y_log10()
        + p9.scale_color_manual([*COLOURS[:6], *COLOURS[7:]])  # yellow is faint in thin lines
        + p9.labs(x="rows", y="seconds, or MiB", color="", shape="")
        + p9.guides(color=p9.guide_legend(nrow=3))
        + p9.theme(figure_size=(10, 5))
    )


if __name__ == "__main__":
    main()
