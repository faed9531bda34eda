"""The numbers that the texts state are those that the run found; numbers.toml says which is which."""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Iterator, Mapping
from math import sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numbers_in_text
import pytest

from mlplatform import results
from mlplatform.promotion import gate

NUMBERS = tomllib.loads(Path(__file__).with_name("numbers.toml").read_text())
BOUND = [(document, number) for document, numbers in NUMBERS["bound"].items() for number in numbers]


@pytest.fixture(scope="module")
def recorded(executed: dict[str, Path]) -> dict[str, Any]:
    return {f"n{name[:2]}": results.read_results(path) for name, path in executed.items()}


def compute(document: str, number: str, recorded: Mapping[str, Any]) -> float:
    """Compute what a number is bound to."""
    profile = {row["column"]: row for row in recorded["n01"]["profile"]}
    rates = {row["group"]: row["true_positive_rate"] for row in recorded["n03"]["groups"]}
    functions = {
        "mean": mean,
        "min": min,
        "stdev": stdev,
        "sqrt": sqrt,
        "sum": sum,
        "range": range,
        "len": len,
        "int": int,
    }
    known = {"profile": profile.__getitem__, "recall": rates.__getitem__, "rows": profile["Target"]["count"]}
    names = {"__builtins__": {}, "gate": gate.RULES, **functions, **known, **recorded}
    return float(eval(NUMBERS["bound"][document][number], names))  # noqa: S307 (an expression of our own)


@pytest.mark.parametrize(("document", "number"), BOUND, ids=str)
def test_a_bound_number_is_what_the_run_found(document: str, number: str, recorded: dict[str, Any]) -> None:
    value = compute(document, number, recorded)
    assert numbers_in_text.says(number, value), f"{document} says {number}, and the run found {value}"


def test_other_results_make_bound_numbers_fail(recorded: dict[str, Any]) -> None:
    """Of those that no result can move, two count columns, one is a day, and some are the gate's own."""
    factors = itertools.cycle([1.5, 1.7, 1.9, 2.2, 2.6])
    moved = {name: shifted(found, factors) for name, found in recorded.items()}
    movable = [
        (document, number)
        for document, number in BOUND
        if not any(part in NUMBERS["bound"][document][number] for part in ("gate", "len(", "[8:10]"))
    ]
    held = [pair for pair in movable if numbers_in_text.says(pair[1], compute(*pair, moved))]
    assert held == []
    assert len(movable) > 40


def shifted(found: Any, factors: Iterator[float]) -> Any:
    """Give the same results with other numbers, whose ratios are others too."""
    if isinstance(found, dict):
        return {key: shifted(value, factors) for key, value in found.items()}
    if isinstance(found, list):
        return [shifted(value, factors) for value in found]
    return found * next(factors) + 1 if isinstance(found, int | float) and not isinstance(found, bool) else found
