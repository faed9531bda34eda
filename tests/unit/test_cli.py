from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from mlplatform_ops.cli import main

ROOT = Path(__file__).parents[2]


def run(arguments: Sequence[str], **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mlplatform_ops", *arguments],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], **environ},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("command", ["status", "env"])
def test_a_command_that_fails_prints_one_line_and_no_trace(command: str, tmp_path: Path) -> None:
    outcome = run([command], MLPLATFORM_STATE=str(tmp_path / "state"))
    assert outcome.returncode == 1
    assert outcome.stdout == ""
    (line,) = outcome.stderr.splitlines()
    assert line.startswith("error: no platform was started here")
    assert line.endswith("run 'make up'")


def test_a_taken_port_ends_the_start_with_the_variables_name(tmp_path: Path) -> None:
    outcome = run(["up"], MLPLATFORM_STATE=str(tmp_path / "state"), MLPLATFORM_S3_PORT="no port")
    assert outcome.returncode == 1
    assert outcome.stderr == "error: MLPLATFORM_S3_PORT='no port' is not a port; set it to a number from 1 to 65535\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "99"], "notebook '99' is not there"),
        (["run", "01", "-p", "size=1"], "is not NOTEBOOK:NAME=VALUE"),
        (["run", "01", "-p", "01:no_such_name=1"], "01_explore_data has no parameter 'no_such_name'; it has: "),
    ],
)
def test_a_mistyped_run_is_refused_before_the_platform_starts(
    arguments: list[str], message: str, no_platform: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 1
    assert message in capsys.readouterr().err
    assert not no_platform.exists()


def test_importing_the_package_starts_nothing_and_loads_nothing_heavy() -> None:
    code = (
        "import sys, mlplatform_ops.cli; print([m for m in ('mlflow', 'feast', 'pandas', 'boto3') if m in sys.modules])"
    )
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert outcome.stdout == "[]\n"


def test_every_target_of_the_makefile_is_explained_by_help() -> None:
    targets = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout  # noqa: S607
    for target in ("help", "run", "test", "up", "down", "status", "lab", "env", "clean", "lint", "format"):
        assert f"\n  {target} " in targets, target
