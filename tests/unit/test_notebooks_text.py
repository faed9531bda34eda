"""What every notebook must say, read from its stored cells."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import exercises
import numbers_in_text
import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_notebook_has_two_exercises_each_with_task_hint_and_solution(notebook: Path) -> None:
    found = exercises.find(notebook)
    assert len(found) >= 2
    for exercise in found:
        assert exercise.task, exercise.title
        assert exercise.hint, exercise.title
        compile(exercise.solution, exercise.title, "exec")
        assert exercise.solution, exercise.title


NUMBERS = tomllib.loads((ROOT / "tests" / "notebooks" / "numbers.toml").read_text())


@pytest.mark.parametrize("document", [*NOTEBOOKS, ROOT / "README.md"], ids=lambda path: path.stem)
def test_every_number_in_a_text_is_bound_to_a_result_or_stated_with_a_reason(document: Path) -> None:
    bound, stated = (NUMBERS[kind].get(document.stem, {}) for kind in ("bound", "stated"))
    found = numbers_in_text.find(numbers_in_text.read_text(document))
    unknown = [number for number in found if number not in {**bound, **stated, **NUMBERS["stated"]["all"]}]
    assert unknown == [], "add each to tests/notebooks/numbers.toml, with what it is bound to or the reason"
    unused = {*bound, *stated} - set(found)
    assert unused == set(), "no text says these any more"
    assert all(reason.strip() for reason in stated.values())


def test_the_workshops_plan_has_the_minutes_that_the_notebooks_say_and_two_hours() -> None:
    plan = (ROOT / "notebooks" / "README.md").read_text()
    for notebook in NOTEBOOKS:
        [minutes] = re.findall(r"\*\*Time:\*\* (\d+) minutes", numbers_in_text.read_text(notebook))
        assert re.search(rf"\[{notebook.stem}\].*\| {minutes} \|$", plan, re.MULTILINE), notebook.stem
    steps = [(int(start), int(minutes)) for start, minutes in re.findall(r"^\| (\d+) \| (\d+) \|", plan, re.MULTILINE)]
    assert [start for start, _ in steps] == [sum(minutes for _, minutes in steps[:n]) for n in range(len(steps))]
    assert sum(minutes for _, minutes in steps) == 120


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_notebook_opens_with_what_is_learned_how_long_it_takes_and_what_must_be_known(notebook: Path) -> None:
    first = "".join(json.loads(notebook.read_text())["cells"][0]["source"])
    said = ["**You will learn**", "**Time:**", "**You need to know:**", "**Needs:**", "**Makes:**"]
    assert [part for part in said if part not in first] == []
