"""The same notebooks with the tools that people have: nbconvert, papermill's own command, and VS Code's kernel."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import nbclient
import nbformat
import pytest

from mlplatform import results

ROOT = Path(__file__).parents[2]
NAME = "04_register_model"  # the shortest one: asked again, it changes nothing
NOTEBOOK = ROOT / "notebooks" / f"{NAME}.ipynb"


def run_command(*words: str | Path) -> None:
    done = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def with_nbconvert(output: Path) -> None:
    run_command("nbconvert", "--to", "notebook", "--execute", "--output-dir", output, NOTEBOOK)


def with_papermill(output: Path) -> None:
    run_command("papermill", "--cwd", NOTEBOOK.parent, NOTEBOOK, output / NOTEBOOK.name)


def as_vscode_does(output: Path) -> None:
    """Start the interpreter that the settings name, in the folder that they name, and run one cell after the other."""
    settings = json.loads((ROOT / ".vscode" / "settings.json").read_text())
    interpreter = settings["python.defaultInterpreterPath"].replace("${workspaceFolder}", str(ROOT))
    folder = settings["jupyter.notebookFileRoot"].replace("${fileDirname}", str(NOTEBOOK.parent))
    assert Path(interpreter).samefile(sys.executable)
    assert Path(folder, "../data/income_data.csv").is_file(), "where the notebooks look for it"
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, resources={"metadata": {"path": folder}}).execute()
    nbformat.write(notebook, output / NOTEBOOK.name)


@pytest.mark.parametrize("way", [with_nbconvert, with_papermill, as_vscode_does])
def test_a_notebook_finds_the_platform_and_its_files_whatever_runs_it(
    way: Callable[[Path], None], executed: dict[str, Path], tmp_path: Path
) -> None:
    way(tmp_path)
    found, before = (results.read_results(path) for path in (tmp_path / NOTEBOOK.name, executed[NAME]))
    assert found == before
