"""A second run keeps what has not changed: the real notebooks on the real platform."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mlplatform import objectstore
from mlplatform.results import read_results
from mlplatform.settings import Settings
from mlplatform_ops import unchanged
from mlplatform_ops.runner import Execution, needs

ROOT = Path(__file__).parents[2]


@pytest.fixture
def copies(executed: dict[str, Path], platform: Settings, tmp_path: Path) -> dict[str, Path]:
    """Copies of the executed notebooks, stamped as after `make run`."""
    found = {name: Path(shutil.copy(path, tmp_path)) for name, path in executed.items()}
    notebooks = [ROOT / "notebooks" / path.name for path in found.values()]
    executions = [Execution(name, path, 1.0) for name, path in found.items()]
    unchanged.stamp_all(executions, notebooks, platform, root=ROOT, parameters={})
    return found


def find(copies: dict[str, Path], platform: Settings) -> tuple[set[str], list[str]]:
    said: list[str] = []
    kept = unchanged.find_unchanged(
        [ROOT / "notebooks" / path.name for path in copies.values()],
        next(iter(copies.values())).parent,
        platform,
        root=ROOT,
        parameters={},
        notify=said.append,
    )
    return {execution.name for execution in kept}, said


def depending(name: str, copies: dict[str, Path]) -> set[str]:
    found = {name}
    for other in sorted(copies):  # a notebook needs earlier ones only
        if needs(ROOT / "notebooks" / f"{other}.ipynb") & found:
            found.add(other)
    return found


def test_every_notebook_is_kept_when_nothing_changed(copies: dict[str, Path], platform: Settings) -> None:
    assert find(copies, platform)[0] == set(copies)


@pytest.mark.parametrize("name", ["02_train_models", "07_predict_income"])
def test_a_notebook_whose_object_is_gone_runs_again(copies: dict[str, Path], platform: Settings, name: str) -> None:
    recorded = json.dumps(read_results(copies[name]))
    uri = next(part for part in recorded.split('"') if part.startswith("s3://mlflow-datasets/"))
    missing = uri.replace(".parquet", "-gone.parquet")
    assert objectstore.list_objects(missing).empty
    copies[name].write_text(copies[name].read_text().replace(uri, missing))
    kept, said = find(copies, platform)
    assert kept == set(copies) - depending(name, copies)
    assert f"{name} runs again: {missing} is gone" in said


def test_a_notebook_whose_run_is_gone_runs_again(copies: dict[str, Path], platform: Settings) -> None:
    run_id = read_results(copies["01_explore_data"])["run_id"]
    copies["01_explore_data"].write_text(copies["01_explore_data"].read_text().replace(run_id, "0" * 32))
    kept, said = find(copies, platform)
    assert kept == set(copies) - {"01_explore_data"}
    assert f"01_explore_data runs again: MLflow's run {'0' * 32} is gone" in said
