from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Literal

import pytest

from mlplatform.errors import service_down
from mlplatform.settings import CLIENT_DEFAULTS
from mlplatform_ops import cli, mlflow_rest, runner, unchanged
from mlplatform_ops.cli import app, main
from mlplatform_ops.runner import Execution
from mlplatform_serving.__main__ import main as serve

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


def test_what_fails_after_the_notebooks_does_not_hide_what_they_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def away(*_: object, **__: object) -> None:
        raise service_down("MLflow server", "http://127.0.0.1:1")

    def succeed(chosen: Sequence[Path], folder: Path, **_: object) -> list[Execution]:
        return [Execution(path.stem, folder / path.name, 1.0) for path in chosen]

    monkeypatch.setattr(cli, "_platform", lambda *_: nullcontext(None))
    monkeypatch.setattr(mlflow_rest, "close_runs", lambda *_: 0)
    monkeypatch.setattr(runner, "run_all", succeed)
    monkeypatch.setattr(unchanged, "stamp_all", away)
    assert main(["run", "01", "--platform", "env", "--output", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert re.search(r"01_explore_data +. 1\.0 +. ok", said.out)
    assert said.err.splitlines()[-1].startswith("the next 'make run' may run these again: the MLflow server at")


HELP = " ('python -m mlplatform_ops{} --help' explains)"
# What is typed, the exit status, and the line that is printed.
MISTAKES = [
    ("", 2, "No command is given" + HELP.format("")),
    ("ups", 2, 'Unknown command "ups". Did you mean "up"? Available commands: '),
    ("up now", 2, "Unused Tokens: ['now']" + HELP.format(" up")),
    ("status --verbose", 2, "Unknown option: --verbose"),
    ("up", 1, "MLPLATFORM_S3_PORT='no port' is not a port; set it to a number from 1 to 65535"),
    ("status", 1, "no platform was started here ("),
    ("env", 1, "no platform was started here ("),
    ("reset", 1, "no complete run is kept in "),
    ("run 99", 1, "notebook '99' is not there"),
    ("run 01 -p size=1", 1, "-p 'size=1' is not NOTEBOOK:NAME=VALUE for one of: 01_explore_data"),
    ("run 01 -p 01:no_such_name=1", 1, "01_explore_data has no parameter 'no_such_name'; it has: "),
    ("run 02 -p 02:seed=[", 1, "-p '02:seed=[': '[' is not YAML; "),
    ("run -p", 2, 'Command "run" parameter -p requires an argument' + HELP.format(" run")),
    ("run --platform moon", 2, 'Invalid value "moon" for --platform. Choose from: "embedded", "k8s", "env"'),
    ("run --platform env", 1, "no platform was started here ("),
    ("run --platform k8s", 1, "no kubeconfig to find a cluster in; set KUBECONFIG, or make a cluster: "),
    ("features --platform moon", 2, 'Invalid value "moon" for --platform. '),
    ("features --platform k8s --overlay stagign", 1, "no overlay at "),
    ("features 01", 2, "Unused Tokens: ['01']"),
    ("k8s-up", 1, "no kubeconfig to find a cluster in; set KUBECONFIG, or make a cluster: "),
    ("k8s-up --overlay stagign", 1, "no overlay at "),
    ("k8s-up --context", 2, 'Command "k8s-up" parameter --context requires an argument'),
    ("k8s-status --yes=maybe", 2, 'Invalid value for --yes: unable to convert "maybe" into bool'),
    ("k8s-forward --overlay stagign", 1, "no overlay at "),
    ("k8s-down --overlay stagign", 1, "no overlay at "),
    ("k8s-down --keep-data --delete-data", 2, "Parameter --delete-data specified multiple times"),
    ("k8s-secrets --overlay stagign", 1, "no overlay at "),
    (
        "k8s-secrets --rotate radis",
        2,
        'Invalid value "radis" for --rotate. Choose from: "endpoint", "feature-server", ',
    ),
    ("backup", 2, "No command is given to backup" + HELP.format(" backup")),
    ("backup save", 2, 'Command "backup save" parameter FOLDER requires an argument' + HELP.format(" backup save")),
    ("backup save here", 1, "no platform was started here ("),
    ("backup restore nowhere", 1, "no platform was started here ("),
    ("backup restore nowhere --database x", 2, "Unknown option: --database"),
    ("workshop", 2, "No command is given to workshop" + HELP.format(" workshop")),
    ("workshop up --users 0", 1, "a workshop of 0 users is not possible; give USERS= from 1 to 99"),
    ("workshop reset", 2, 'Command "workshop reset" parameter USER requires an argument'),
    ("workshop reset user77", 1, "there is no user 'user77'; known: none; run 'make workshop'"),
]


@pytest.mark.parametrize(("typed", "status", "line"), MISTAKES, ids=[typed or "nothing" for typed, _, _ in MISTAKES])
def test_a_mistake_is_answered_with_one_line_before_anything_starts(
    typed: str,
    status: int,
    line: str,
    no_platform: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MLPLATFORM_S3_PORT", "no port")
    monkeypatch.setenv("KUBECONFIG", str(no_platform))
    # Another platform of this user may be starting, which would be said first.
    monkeypatch.setattr("mlplatform_ops.embedded.platform.private_folder", lambda: tmp_path)
    assert main(typed.split()) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"error: {line}")
    assert captured.err.count("\n") == 1
    assert not no_platform.exists()


# What is typed without the packages of a group, and its first module.
GROUPLESS = [
    ("serve-model", "serving", "bentoml"),
    ("drift", "drift", "evidently"),
    ("loop", "pipelines", "kfp"),
    ("loop", "serving", "bentoml"),
    ("loop", "drift", "evidently"),
    ("run 08", "pipelines", "kfp"),
    ("run 09", "serving", "bentoml"),
    ("run 10", "drift", "evidently"),
    ("run --every", "pipelines", "kfp"),
]


@pytest.mark.parametrize(("typed", "group", "module"), GROUPLESS, ids=[" ".join(case) for case in GROUPLESS])
def test_a_group_that_is_not_installed_is_named_with_what_adds_it_before_anything_starts(
    typed: str,
    group: str,
    module: str,
    no_platform: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # The other groups are there, whatever this environment holds.
    monkeypatch.setattr("mlplatform_ops.runner.find_spec", lambda name: None if name == module else sys)
    assert main(typed.split()) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.endswith(f" the packages of the group '{group}'; run 'make .venv/.{group}'\n")
    assert captured.err.count("\n") == 1
    assert not no_platform.exists()


def test_the_endpoint_says_what_adds_its_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bentoml", None)
    # It sets these for its process.
    for name in ("BENTOML_HOME", "BENTOML_DO_NOT_TRACK", *CLIENT_DEFAULTS):
        monkeypatch.setenv(name, "")
    with pytest.raises(
        SystemExit, match=r"^error: the packages of the group 'serving' are .*; run 'make .venv/.serving'$"
    ):
        serve([])


def test_the_endpoint_is_not_opened_to_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MODEL_ENDPOINT_TOKEN", raising=False)
    monkeypatch.delenv("MODEL_ENDPOINT_TOKEN_PREVIOUS", raising=False)
    with pytest.raises(SystemExit, match=r"^error: anyone who reaches 0\.0\.0\.0 could ask; set MODEL_ENDPOINT_TOKEN$"):
        serve(["--host", "0.0.0.0"])  # noqa: S104 - which is refused


def test_ctrl_c_ends_a_command_with_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mlplatform_ops.embedded.platform.EmbeddedPlatform.down", interrupt)
    assert main(["down"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


COMMANDS = [
    "up", "down", "reset", "status", "env", "clean", "lab", "serve", "serve-model", "ui", "features", "data", "run",
    "backup save", "backup restore", "k8s-secrets", "k8s-up", "k8s-forward", "k8s-status", "k8s-down",
    "release shadow", "release canary", "release promote", "release roll-back", "release end", "release status",
    "workshop up", "workshop reset", "workshop down", "workshop clean",
]  # fmt: skip


def test_help_explains_every_command_and_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    listed = capsys.readouterr().out
    for command in COMMANDS:
        assert f"  {command.split()[0]}: " in listed
        assert main([*command.split(), "--help"]) == 0
        explained = capsys.readouterr().out
        assert "Usage: mlplatform " + command in explained
    assert main(["run", "--help"]) == 0
    explained = " ".join(capsys.readouterr().out.split())
    for option in ("-p STR...: NOTEBOOK:NAME=VALUE", "--overlay STR: A folder of deploy/overlays. [default: local]"):
        assert option in explained


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_can_complete_commands_options_and_choices(shell: Literal["bash", "zsh", "fish"]) -> None:
    script = app.generate_completion(shell=shell)
    for word in ("k8s-secrets", "overlay", "feature-server"):
        assert word in script


def test_help_is_fast_since_it_loads_nothing_heavy() -> None:
    code = (
        "import sys; from mlplatform_ops.cli import app, main; main(['--help'])\n"
        "heavy = {'boto3', 'feast', 'kubernetes', 'mlflow', 'numpy', 'pandas', 'sklearn'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert outcome.stderr == "[]\n"


def test_every_target_of_the_makefile_is_explained_by_help() -> None:
    targets = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout  # noqa: S607
    for target in ("help", "run", "test", "up", "down", "status", "lab", "env", "clean", "lint", "format"):
        assert f"\n  {target} " in targets, target
