"""What importing the package loads, seen in a fresh interpreter each time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import mlplatform

MODULES = sorted(path.stem for path in Path(mlplatform.__file__).parent.glob("[a-z]*.py"))
LIGHT = (
    "connection",
    "errors",
    "feature_client",
    "history",
    "income",
    "modeling",
    "objectstore",
    "results",
    "settings",
)


def loaded_after(*lines: str) -> dict[str, list[str]]:
    """Run lines in an interpreter of its own, and list what of MLflow and Feast is loaded after each."""
    show = "print(*sorted({'mlflow', 'feast'} & set(sys.modules)))"
    code = "\n".join(["import sys", *(f"{line}\n{show}" for line in lines)])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {line: loaded.split() for line, loaded in zip(lines, done.stdout.splitlines(), strict=True)}


def test_modules_that_need_neither_load_neither_mlflow_nor_feast() -> None:
    lines = [f"import mlplatform.{module}" for module in LIGHT]
    assert loaded_after(*lines) == {line: [] for line in lines}


def test_a_notebooks_first_line_loads_neither_so_that_connect_comes_before_them() -> None:
    first = f"from mlplatform import connect, {', '.join(MODULES)}"
    assert loaded_after(first, "tracking.EXPERIMENT") == {first: [], "tracking.EXPERIMENT": ["mlflow"]}


def test_a_misspelt_module_is_an_import_error() -> None:
    with pytest.raises(ImportError, match="modelling"):
        from mlplatform import modelling  # noqa: F401
