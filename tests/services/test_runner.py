from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from subprocess import PIPE

import nbformat
import psutil
import pytest

from mlplatform.errors import NotebookError
from mlplatform.results import read_results
from mlplatform_ops import runner
from mlplatform_ops.runner import _Stop, check_group, check_parameters, find_notebooks, run_all, select

RECORD = "from mlplatform.results import record\nrecord(doubled=2 * size)"
KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a notebook with a parameter `size` and the given cells."""

    def write(name: str, cells: Sequence[str] = (RECORD,), needs: Sequence[str] = (), group: str = "") -> Path:
        notebook = nbformat.v4.new_notebook(
            cells=[nbformat.v4.new_code_cell(source) for source in ("size: int = 1  # how many, rows", *cells)],
            metadata={"kernelspec": KERNEL, "mlplatform": {"needs": list(needs), "group": group}},
        )
        notebook.cells[0].metadata["tags"] = ["parameters"]
        path = tmp_path / f"{name}.ipynb"
        nbformat.write(notebook, path)
        return path

    return write


def test_parameters_reach_the_notebook_and_results_come_back(write: Write, tmp_path: Path) -> None:
    said: list[str] = []
    steps: list[tuple[str, int | None]] = []
    (execution,) = run_all(
        [write("01_double")],
        tmp_path / "out",
        parameters={"01_double": {"size": 21}},
        notify=said.append,
        progress=lambda name, done: steps.append((name, done)),
    )
    assert execution.error == ""
    assert read_results(execution.executed) == {"doubled": 42}
    assert len(said) == 1
    assert said[0].startswith("01_double done after ")
    # Its two code cells, and the one with the parameters that it was given.
    assert steps == [("01_double", done) for done in (0, 1, 2, 3, None)]


def test_a_failure_is_one_line_keeps_the_copy_and_stops_only_what_needs_it(write: Write, tmp_path: Path) -> None:
    broken = write("01_broken", ["raise ValueError('no such thing\\nand more')"])
    needing = write("02_needing", needs=["01_broken"])
    further = write("03_further", needs=["02_needing"])
    other = write("04_other")
    executions = run_all([broken, needing, further, other], tmp_path / "out")
    assert [entry.name for entry in executions] == ["01_broken", "02_needing", "03_further", "04_other"]
    assert executions[0].error == "In [2]: ValueError: no such thing"
    assert "ValueError" in executions[0].executed.read_text()
    assert [entry.skipped for entry in executions] == [False, True, True, False]
    assert executions[3].error == ""


def test_a_notebook_waits_for_what_it_needs(write: Write, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    first = write("02_first", [f"import pathlib; pathlib.Path({str(mark)!r}).write_text('x')"])
    second = write("01_second", [f"import pathlib; assert pathlib.Path({str(mark)!r}).exists()"], needs=["02_first"])
    assert [entry.error for entry in run_all([first, second], tmp_path / "out")] == ["", ""]


def test_notebooks_side_by_side_each_run_in_their_own_folder_and_share_the_cores(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "so that it is unset again afterwards")
    monkeypatch.delenv("OPENBLAS_NUM_THREADS")
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    threads = "max(pool['num_threads'] for pool in threadpoolctl.threadpool_info() if pool['user_api'] == 'blas')"
    imports = "import os, numpy, threadpoolctl\nfrom mlplatform.results import record\n"
    where = [f"{imports}record(folder=os.getcwd(), blas={threads})"]
    # When one of two ends, this process must still be where it was: the other's kernel may be about to start.
    seen: set[Path] = {Path.cwd()}
    executions = run_all(
        [write("01_where", where), write("02_where", where)],
        tmp_path / "out",
        notify=lambda _: seen.add(Path.cwd()),
    )
    found = [read_results(entry.executed) for entry in executions]
    assert found == [{"folder": str(tmp_path.resolve()), "blas": 1}] * 2
    assert len(seen) == 1


def test_what_a_notebook_leaves_in_the_temporary_folder_ends_with_the_run(write: Write, tmp_path: Path) -> None:
    left = "import tempfile\nfrom mlplatform.results import record\nrecord(left=tempfile.mkdtemp())"
    before = os.environ.get("TMPDIR")
    (execution,) = run_all([write("01_leave", [left])], tmp_path / "out")
    folder = Path(read_results(execution.executed)["left"])
    assert folder.parent != Path(tempfile.gettempdir())
    assert not folder.exists()
    assert os.environ.get("TMPDIR") == before


def test_an_unknown_parameter_is_refused_before_anything_runs(write: Write, tmp_path: Path) -> None:
    with pytest.raises(NotebookError, match="01_double has no parameter 'sise'; it has: size"):
        run_all([write("01_double")], tmp_path / "out", parameters={"01_double": {"sise": 1}})
    assert not (tmp_path / "out").exists()


def test_parameters_for_a_notebook_that_is_not_run_are_refused(write: Write, tmp_path: Path) -> None:
    with pytest.raises(NotebookError, match="'02_other', which is not run; known: 01_double"):
        run_all([write("01_double")], tmp_path / "out", parameters={"02_other": {"size": 1}})


def test_notebooks_that_need_each_other_are_refused(write: Write, tmp_path: Path) -> None:
    pair = [write("01_a", needs=["02_b"]), write("02_b", needs=["01_a"])]
    with pytest.raises(NotebookError, match="in a circle: "):
        run_all(pair, tmp_path / "out")


def test_a_notebook_is_chosen_by_its_beginning_with_what_it_needs(write: Write, tmp_path: Path) -> None:
    for name, needs in (("01_a", []), ("02_b", []), ("03_c", ["02_b"])):
        write(name, needs=needs)
    names = [path.stem for path in select(find_notebooks(tmp_path), ["03"])]
    assert names == ["02_b", "03_c"]
    assert [path.stem for path in select(find_notebooks(tmp_path), [])] == ["01_a", "02_b", "03_c"]


@pytest.mark.parametrize(("name", "reason"), [("09", "is not there"), ("0", "fits several")])
def test_a_name_that_fits_no_one_notebook_is_refused(write: Write, tmp_path: Path, name: str, reason: str) -> None:
    write("01_a")
    write("02_b")
    with pytest.raises(NotebookError, match=f"notebook '{name}' {reason}; there are: 01_a, 02_b"):
        select(find_notebooks(tmp_path), [name])


def test_a_folder_without_notebooks_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(NotebookError, match="no notebook in"):
        find_notebooks(tmp_path)


def test_a_notebook_that_recorded_nothing_is_an_error(write: Write) -> None:
    with pytest.raises(NotebookError, match="recorded no results"):
        read_results(write("01_double"))


def test_declared_parameters_pass(write: Write) -> None:
    check_parameters(write("01_double"), {"size": 3})


def test_a_notebook_of_a_group_runs_only_when_asked_for(write: Write, tmp_path: Path) -> None:
    write("01_a")
    write("08_b", needs=["01_a"], group="pipelines")
    assert [path.stem for path in find_notebooks(tmp_path)] == ["01_a"]
    assert [path.stem for path in find_notebooks(tmp_path, groups=True)] == ["01_a", "08_b"]


def test_a_group_that_is_not_installed_is_named_with_what_to_run(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(runner.GROUPS, "drift", "no_such_module")
    with pytest.raises(NotebookError, match=r"10_c needs the packages of the group 'drift'; run 'make \.venv/\.drift'"):
        check_group(write("10_c", group="drift"))
    with pytest.raises(NotebookError, match="names the group 'drifting'; there are: pipelines, serving, drift, scale"):
        check_group(write("10_d", group="drifting"))
    check_group(write("01_a"))


def test_stopping_ends_kernels_and_what_they_started_and_nothing_else() -> None:
    starts = "import subprocess, sys; print(subprocess.Popen(['sleep', '600']).pid, flush=True); sys.stdin.read()"
    words = [sys.executable, "-c", starts, "ipykernel_launcher"]
    with subprocess.Popen(["/bin/sleep", "600"]) as forward, subprocess.Popen(words, stdin=PIPE, stdout=PIPE) as kernel:
        try:
            assert kernel.stdout is not None
            started = psutil.Process(int(kernel.stdout.readline()))
            _Stop().end_kernels()
            assert kernel.wait(timeout=20) == -signal.SIGKILL
            assert psutil.wait_procs([started], timeout=20)[1] == []
            assert forward.poll() is None
        finally:
            forward.kill()
