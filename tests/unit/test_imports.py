"""What importing the package loads, and which packages there are."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import mlplatform

MODULES = sorted(path.stem for path in Path(mlplatform.__file__).parent.glob("[a-z]*.py"))
# Rooms from which notebooks import.
ROOMS = {
    room: sorted(path.stem for path in (Path(mlplatform.__file__).parent / room).glob("[a-z]*.py"))
    for room in ("monitoring", "promotion", "serving")
}
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
    "table",
)


def loaded_after(*lines: str) -> dict[str, list[str]]:
    """Run lines in a fresh interpreter, and list what of the heavy libraries is loaded after each."""
    show = "print(*sorted({'dask', 'distributed', 'feast', 'mlflow', 'xgboost'} & set(sys.modules)))"
    code = "\n".join(["import sys", *(f"{line}\n{show}" for line in lines)])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {line: loaded.split() for line, loaded in zip(lines, done.stdout.splitlines(), strict=True)}


def test_none_is_loaded_before_a_module_that_needs_it_is_used() -> None:
    light = [f"import mlplatform.{module}" for module in (*LIGHT, "engines.cluster", "engines.training")]
    # A notebook's first line, so that connect() comes before both.
    first = [f"from mlplatform import connect, {', '.join(MODULES)}"]
    first += [f"from mlplatform.{room} import {', '.join(modules)}" for room, modules in ROOMS.items()]
    loaded = loaded_after(*light, *first, "tracking.EXPERIMENT")
    assert loaded == {line: [] for line in [*light, *first]} | {"tracking.EXPERIMENT": ["mlflow"]}


def test_a_misspelt_module_is_an_import_error() -> None:
    with pytest.raises(ImportError, match="modelling"):
        from mlplatform import modelling  # noqa: F401


def test_the_contracts_and_the_wheel_name_every_package() -> None:
    root = Path(__file__).parents[2]
    packages = {path.parent.name for path in (root / "src").glob("*/__init__.py")}
    project = tomllib.loads((root / "pyproject.toml").read_text())["tool"]
    assert set(project["importlinter"]["root_packages"]) == packages
    assert {Path(path).name for path in project["hatch"]["build"]["targets"]["wheel"]["packages"]} == packages
    layers = next(contract for contract in project["importlinter"]["contracts"] if contract["type"] == "layers")
    assert packages <= set(re.findall(r"\w+", " ".join(layers["layers"])))


def test_what_carries_the_notebooks_stays_small_enough_to_read_in_an_afternoon() -> None:
    lines = {
        module: len((Path(mlplatform.__file__).parent / f"{module}.py").read_text().splitlines()) for module in MODULES
    }
    assert sum(lines.values()) <= 2_200, f"{lines}; a room of its own, or less of it"
