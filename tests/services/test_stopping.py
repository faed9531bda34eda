"""Real `make run`s that are stopped, that lose a kernel, that meet each other, and that find a full disk."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import nbformat
import psutil
import pytest
from mlflow import MlflowClient
from shop import describe_table
from small_disk import Disk, small_disk

from mlplatform.settings import Settings
from mlplatform_ops.embedded import after_run
from mlplatform_ops.embedded.platform import EmbeddedPlatform
from mlplatform_ops.embedded.services import AFTER_RUN
from mlplatform_ops.mlflow_rest import RUN_TAG

ROOT = Path(__file__).parents[2]
BOUND_S = 300
CONNECT = "from mlplatform import connect\nconnect()\nimport mlflow\nmlflow.set_experiment('stopped')"
WAIT = """import time, pathlib
with mlflow.start_run() as run:
    pathlib.Path(mark).write_text(run.info.run_id)
    time.sleep(600)"""
DIE = "import os, signal\nmlflow.start_run()\nos.kill(os.getpid(), signal.SIGKILL)"
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder that the commands take for a clone."""
    describe_table(tmp_path / "clone")
    return tmp_path / "clone"


def write(clone: Path, name: str, *cells: str) -> None:
    mark = clone / f"{name}.mark"
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(source) for source in (f"mark = {str(mark)!r}", *cells)],
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
    )
    nbformat.write(notebook, clone / "notebooks" / f"{name}.ipynb")


@pytest.fixture
def start(clone: Path, embedded: EmbeddedPlatform, platform: Settings, tmp_path: Path) -> Iterator[Start]:
    """Start `make run`'s command in the clone; what still runs at the end is ended."""
    started = []
    (tmp_path / "tmp").mkdir()

    def start(*arguments: str, within: Sequence[str] = ()) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*within, sys.executable, "-m", "mlplatform_ops", "run", *arguments],
            cwd=clone,
            env={**os.environ, "TMPDIR": str(tmp_path / "tmp")},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def wait_for(path: Path) -> str:
    deadline = time.monotonic() + BOUND_S
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline, f"{path.name} is not written"
        time.sleep(0.1)
    return path.read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_run_that_is_stopped_ends_its_kernels_and_says_how_far_it_got(
    clone: Path, start: Start, tmp_path: Path, number: int
) -> None:
    write(clone, "01_waits", CONNECT, WAIT)
    write(clone, "02_waits", CONNECT, WAIT)
    write(clone, "03_never", CONNECT, WAIT)
    run = start()
    run_ids = [wait_for(clone / f"{name}.mark") for name in ("01_waits", "02_waits")]
    family = psutil.Process(run.pid).children(recursive=True)
    assert len(family) >= 2
    began = time.monotonic()
    run.send_signal(number)
    output, _ = run.communicate(timeout=BOUND_S)
    sys.stderr.write(f"stopped within {time.monotonic() - began:.1f} s\n")
    assert run.returncode == 130
    assert not any(process.is_running() for process in family)
    assert "stopped after 0 of 3 notebooks" in output
    assert "not run" in output
    assert "2 MLflow runs did not end and are marked KILLED" in output
    assert "Traceback" not in output
    assert {MlflowClient().get_run(run_id).info.status for run_id in run_ids} == {"KILLED"}
    assert list((tmp_path / "tmp").iterdir()) == []
    assert not (clone / "03_never.mark").exists()


def test_a_kernel_that_dies_is_named_with_its_cell_and_leaves_no_running_run(clone: Path, start: Start) -> None:
    write(clone, "01_dies", CONNECT, DIE)
    output, _ = (run := start()).communicate(timeout=BOUND_S)
    assert run.returncode == 1
    assert "01_dies FAILED: cell 3 (import os, signal): the kernel died" in output
    assert "1 MLflow runs did not end and are marked KILLED" in output
    assert "Traceback" not in output


def test_the_next_run_closes_the_runs_of_one_that_was_killed(clone: Path, start: Start) -> None:
    write(clone, "01_waits", CONNECT, WAIT)
    killed = start()
    run_id = wait_for(clone / "01_waits.mark")
    for process in [*psutil.Process(killed.pid).children(recursive=True), psutil.Process(killed.pid)]:
        process.kill()
    killed.wait(20)
    assert MlflowClient().get_run(run_id).info.status == "RUNNING"
    assert str(killed.pid) in MlflowClient().get_run(run_id).data.tags[RUN_TAG]
    write(clone, "01_waits", "1")
    output, _ = start().communicate(timeout=BOUND_S)
    assert "01_waits done" in output
    assert MlflowClient().get_run(run_id).info.status == "KILLED"


def test_two_runs_at_once_write_to_two_folders(clone: Path, start: Start) -> None:
    second_has_begun = f"pathlib.Path({str(clone / 'build' / 'notebooks-2')!r}).exists()"
    waits = f"for _ in range(3_000):\n    if {second_has_begun}: break\n    time.sleep(0.1)"
    write(clone, "01_waits", f"import pathlib, time\npathlib.Path(mark).write_text('x')\n{waits}")
    first = start()
    wait_for(clone / "01_waits.mark")
    second = start()
    assert [run.communicate(timeout=BOUND_S)[0].count("01_waits done") for run in (first, second)] == [1, 1]
    assert [run.returncode for run in (first, second)] == [0, 0]
    folders = sorted(path.name for path in (clone / "build").glob("notebooks*"))
    assert folders == ["notebooks", "notebooks-2"]
    assert {path.stat().st_mode & 0o077 for path in clone.glob("build/**/*")} == {0}


def test_only_a_complete_run_that_succeeded_keeps_its_state_for_reset(
    clone: Path, start: Start, embedded: EmbeddedPlatform, platform: Settings
) -> None:
    shutil.rmtree(embedded.state / AFTER_RUN, ignore_errors=True)
    record = "from mlplatform import results; results.record(done=True)"
    write(clone, "01_ends", record)
    write(clone, "02_fails", "1 / 0")
    assert start("01_ends").wait(BOUND_S) == 0
    assert start().wait(BOUND_S) == 1
    assert not after_run.is_kept(embedded.state)
    write(clone, "02_fails", record)  # not any more
    assert start().wait(BOUND_S) == 0
    assert after_run.is_kept(embedded.state)
    kept = after_run.find_copy(embedded.state)
    before = kept.stat().st_ino
    assert start().wait(BOUND_S) == 0
    assert kept.stat().st_ino == before, "a run that ran nothing anew has kept its state again"


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Disk]:
    """A file system of one MiB for the output folder."""
    with small_disk(tmp_path / "small", size="1m") as made:
        yield made


def test_a_full_output_folder_is_named_and_an_earlier_copy_stays(clone: Path, start: Start, small: Disk) -> None:
    write(clone, "01_writes", "print('kept')")

    def run(*options: str) -> tuple[int, str]:
        # From within the namespace, the servers' processes can't be looked at.
        options = ("--platform", "env", *options)
        process = start("--output", str(small.folder), *options, within=small.enter(clone))
        output, _ = process.communicate(timeout=BOUND_S)
        return process.returncode, output

    code, output = run()
    assert code == 0, output
    kept = small.read("01_writes.ipynb")
    assert '"kept' in kept
    small.fill()
    code, output = run("--fresh")
    assert code == 1
    assert f"cannot write to {small.folder}: No space left on device" in output
    assert "Traceback" not in output
    assert small.read("01_writes.ipynb") == kept
    small.free()
    code, output = run("--fresh")
    assert code == 0, output
