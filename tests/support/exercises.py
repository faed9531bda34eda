"""The notebooks' exercises: what each one says, and copies of the notebooks in which they are done."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

ROOT = Path(__file__).parents[2]
TAG = "exercise"
EXERCISE = re.compile(r"^### Exercise \d+: (?P<title>.+)$", re.MULTILINE)
FOLDED = r"<details><summary>{}</summary>\n\n(.*?)\n\n</details>"


@dataclass(frozen=True)
class Exercise:
    """One exercise of a notebook.

    Attributes:
        title: What stands in its heading.
        task: What is to be done.
        hint: What helps, folded away.
        solution: The code that does it, folded away.
    """

    title: str
    task: str
    hint: str
    solution: str


def find(notebook: Path) -> list[Exercise]:
    """Read a notebook's exercises from its text cells."""
    return [exercise for cell in _cells(notebook) if cell["cell_type"] == "markdown" for exercise in _read(cell)]


def done(notebooks: list[Path], into: Path) -> list[Path]:
    """Copy notebooks to a folder of their own in which each exercise is done at the end of its notebook.

    Args:
        notebooks: Which; each is copied with all its cells as they are.
        into: A folder. The copies go to `notebooks` below it, beside links to what notebooks read.
    """
    (into / "notebooks").mkdir(parents=True, exist_ok=True)
    for name in ("data", "feature_repo", "deploy"):
        if not (into / name).exists():
            (into / name).symlink_to(ROOT / name)
    for drawing in (ROOT / "notebooks").glob("*.svg"):
        shutil.copy(drawing, into / "notebooks")
    copies = []
    for path in notebooks:
        notebook = json.loads(path.read_text())
        notebook["cells"] += [_code(exercise.solution) for exercise in find(path)]
        copies.append(into / "notebooks" / path.name)
        copies[-1].write_text(json.dumps(notebook))
    return copies


def _cells(notebook: Path) -> list[dict[str, Any]]:
    cells: list[dict[str, Any]] = json.loads(notebook.read_text())["cells"]
    return cells


def _read(cell: dict[str, Any]) -> list[Exercise]:
    text = "".join(cell["source"])
    parts = EXERCISE.split(text)[1:]
    return [_exercise(title, body) for title, body in zip(parts[::2], parts[1::2], strict=True)]


def _exercise(title: str, body: str) -> Exercise:
    task = body.partition("<details>")[0].strip()
    hints, solutions = (re.findall(FOLDED.format(name), body, re.DOTALL) for name in ("Hint", "Solution"))
    code = re.findall(r"```python\n(.*?)\n```", "\n".join(solutions), re.DOTALL)
    return Exercise(title, task, "\n".join(hints), "\n".join(code))


def _code(source: str) -> dict[str, Any]:
    return {
        "cell_type": "code",
        "execution_count": None,
        "id": uuid4().hex[:8],
        "metadata": {"tags": [TAG]},
        "outputs": [],
        "source": source,
    }
