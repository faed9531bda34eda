"""Which notebooks need not run again; what the platform is asked is in tests/notebooks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from mlplatform.settings import VARIABLES, Settings
from mlplatform_ops import unchanged
from mlplatform_ops.runner import Execution

SETTINGS = Settings(**dict.fromkeys(VARIABLES, "x"))
MODULES = {
    "mlplatform/__init__.py": "",
    "mlplatform/table.py": "",
    "mlplatform/models.py": "def fit():\n    from mlplatform import table\n",
    "mlplatform/room/__init__.py": "",
    "mlplatform/room/deep.py": "from mlplatform.models import fit\n",
    "mlplatform/alone.py": "",
}
NOTEBOOKS = {
    "01_table": ("from mlplatform import table", []),
    "02_deep": ("%matplotlib inline\nfrom mlplatform.room import deep", ["01_table"]),
    "03_alone": ("import mlplatform.alone as alone", []),
}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small repository of three notebooks and five modules, and a platform that never changes."""
    for name, code in MODULES.items():
        (tmp_path / "src" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "src" / name).write_text(code)
    for name in ("requirements.lock", "data/income_data.csv", "feature_repo/views.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    for folder in ("notebooks", "build"):
        (tmp_path / folder).mkdir()
        for name, (code, needs) in NOTEBOOKS.items():
            write_notebook(tmp_path / folder / f"{name}.ipynb", code, needs)
    monkeypatch.setattr(unchanged, "_marks", lambda *_: {"registry": "1", "features": "a"})
    monkeypatch.setattr(unchanged, "_lost", lambda *_: "")
    monkeypatch.setattr(unchanged, "s3_client", lambda _: None)
    unchanged._imports_of.cache_clear()
    return tmp_path


def write_notebook(path: Path, code: str, needs: list[str]) -> None:
    cells = [{"cell_type": "code", "source": code, "metadata": {}}]
    path.write_text(json.dumps({"cells": cells, "metadata": {"mlplatform": {"needs": needs}}}))


def stamp(root: Path, **failed: str) -> None:
    executions = [
        Execution(name, root / "build" / f"{name}.ipynb", 1.5, error=failed.get(name, "")) for name in NOTEBOOKS
    ]
    paths = [root / "notebooks" / f"{name}.ipynb" for name in NOTEBOOKS]
    unchanged.stamp_all(executions, paths, SETTINGS, root=root, parameters={})


def kept(root: Path, parameters: dict[str, dict[str, object]] | None = None) -> list[str]:
    unchanged._imports_of.cache_clear()
    found = unchanged.find_unchanged(
        sorted((root / "notebooks").glob("*.ipynb")),
        root / "build",
        SETTINGS,
        root=root,
        parameters=parameters or {},
        notify=lambda _: None,
    )
    assert all(execution.unchanged and execution.seconds == 1.5 for execution in found)
    return [execution.name for execution in found]


def test_nothing_is_kept_before_it_ran_and_all_is_after(root: Path) -> None:
    assert kept(root) == []
    stamp(root)
    assert kept(root) == list(NOTEBOOKS)


@pytest.mark.parametrize(
    ("changed", "left"),
    [
        ("src/mlplatform/alone.py", ["01_table", "02_deep"]),
        ("src/mlplatform/room/deep.py", ["01_table", "03_alone"]),
        ("src/mlplatform/models.py", ["01_table", "03_alone"]),  # imported by a module that the notebook imports
        ("src/mlplatform/table.py", ["03_alone"]),
        ("data/income_data.csv", []),
        ("requirements.lock", []),
        ("feature_repo/views.py", []),
    ],
)
def test_a_changed_file_runs_exactly_the_notebooks_that_depend_on_it(root: Path, changed: str, left: list[str]) -> None:
    stamp(root)
    (root / changed).write_text("other = 1\n")
    assert kept(root) == left


@pytest.mark.parametrize(
    "change",
    [
        lambda root: write_notebook(root / "notebooks" / "01_table.ipynb", "from mlplatform import table\n1", []),
        lambda root: (root / "build" / "01_table.ipynb").unlink(),
        lambda root: (root / "build" / "01_table.ipynb").write_text("cut off"),
    ],
)
def test_a_notebook_runs_again_with_those_that_need_it(root: Path, change: Callable[[Path], None]) -> None:
    stamp(root)
    change(root)
    assert kept(root) == ["03_alone"]


def test_other_parameters_run_a_notebook_again(root: Path) -> None:
    stamp(root)
    assert kept(root, {"03_alone": {"seed": 7}}) == ["01_table", "02_deep"]


def test_one_that_failed_is_never_kept(root: Path) -> None:
    stamp(root, **{"01_table": "In [1]: no"})
    assert kept(root) == ["03_alone"]


def test_what_others_changed_on_the_platform_runs_those_that_depend_on_it(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (root / "src" / "mlplatform" / "alone.py").rename(root / "src" / "mlplatform" / "registry.py")
    for folder in ("notebooks", "build"):
        write_notebook(root / folder / "03_alone.ipynb", "from mlplatform import registry", [])
    stamp(root)
    assert kept(root) == list(NOTEBOOKS)
    monkeypatch.setattr(unchanged, "_marks", lambda *_: {"registry": "2", "features": "b"})
    assert kept(root) == ["01_table", "02_deep"]


def test_every_notebook_here_depends_on_what_it_imports_and_what_serves_it() -> None:
    root = Path(__file__).parents[2]
    used = {
        path.stem: {str(file.relative_to(root / "src")) for file in unchanged.used_files(path, root)}
        for path in (root / "notebooks").glob("*.ipynb")
    }
    assert "mlplatform/registry.py" not in used["01_explore_data"]
    assert {"mlplatform/promotion/gate.py", "mlplatform/registry.py"} <= used["04_register_model"]
    assert {"mlplatform/promotion/gate.toml", "mlplatform/promotion/model_card.md"} <= used["03_evaluate_models"]
    assert "mlplatform/promotion/gate.toml" in used["04_register_model"]
    assert not [name for name in used["01_explore_data"] if not name.endswith(".py")]
    assert {
        "mlplatform/feast_plugins/point_in_time.py",
        "mlplatform_ops/feast_servers/gate.py",
        "mlplatform/settings.py",
    } <= used["06_retrieve_features"]
