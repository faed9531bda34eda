"""The commands behind the Makefile: `python -m mlplatform_ops COMMAND`."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from mlplatform.connection import connect, hasten_feast
from mlplatform.errors import NotebookError, PlatformError
from mlplatform.settings import Settings, find_root, state_folder
from mlplatform_ops.cluster import commands as cluster_cli
from mlplatform_ops.console import say, wide_console

if TYPE_CHECKING:
    from mlplatform_ops.embedded.platform import Embedded
    from mlplatform_ops.runner import Execution


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: The command line without the program's name, `sys.argv`'s by default.

    Returns:
        The exit status: 0, or 1 after an error, which is printed as one line.
    """
    options = _parser().parse_args(arguments)
    try:
        return int(options.command(options) or 0)
    except PlatformError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mlplatform", description="The commands behind the Makefile.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (up, down, status, env, clean, lab, serve, ui, features, data, run):
        words = (command.__doc__ or "").strip().splitlines()[0]
        commands.add_parser(command.__name__, help=words, description=words).set_defaults(command=command)
    options = commands.choices["run"].add_argument
    options("notebooks", nargs="*", metavar="NOTEBOOK", help="names such as 02; those they need run too; default: all")
    options("-p", dest="parameters", action="append", default=[], metavar="NOTEBOOK:NAME=VALUE", help="set a parameter")
    options("--output", type=Path, help="folder for executed copies and pages; default: build/notebooks")
    for name in ("run", "features"):
        commands.choices[name].add_argument(
            "--platform",
            choices=("embedded", "k8s", "env"),
            default="embedded",
            help="env: as the variables say",
        )
        cluster_cli.add_options(commands.choices[name])
    cluster_cli.add_commands(commands)
    return parser


def up(_: argparse.Namespace) -> None:
    """Start the platform on this machine."""
    _embedded().up(notify=say)


def down(_: argparse.Namespace) -> None:
    """Stop it; nothing is lost."""
    say("stopped" if _embedded().down() else "nothing was running")


def status(_: argparse.Namespace) -> None:
    """Show each service, its state, URL and how long it runs."""
    from rich.table import Table

    table = Table("service", "state", "url", "pid", "up for", "memory")
    for service in _embedded().status():
        runs = service.pid > 0
        table.add_row(
            service.name,
            service.state,
            service.url,
            str(service.pid) if runs else "",
            str(timedelta(seconds=service.uptime_s)) if runs else "",
            f"{service.memory_bytes / 2**20:.0f} MiB" if runs else "",
        )
    wide_console().print(table)


def env(_: argparse.Namespace) -> None:
    """Print the connection settings as shell exports."""
    settings = _embedded().settings
    for name, value in (settings.to_env() | {"REDIS_URL": settings.redis_url}).items():
        print(f"export {name}={shlex.quote(value)}")


def clean(_: argparse.Namespace) -> None:
    """Stop the platform and delete all of its state, and what was built."""
    import shutil

    state = state_folder()
    _embedded().clean()
    if state == state_folder(environ={}):
        shutil.rmtree(find_root() / "build", ignore_errors=True)
    say(f"deleted {state}")


def lab(_: argparse.Namespace) -> None:
    """Open JupyterLab on the platform."""
    import secrets

    from mlplatform_ops.ports import is_free

    os.environ.update(_embedded().up(notify=say).to_env())
    os.chdir(find_root() / "notebooks")
    port = next(port for port in range(8888, 8988) if is_free(port))
    token = secrets.token_urlsafe(24)
    os.environ["JUPYTER_TOKEN"] = token
    say(f"JupyterLab: http://127.0.0.1:{port}/lab?token={token}")
    options = {
        "ServerApp.ip": "127.0.0.1",
        "ServerApp.port": port,
        "ServerApp.port_retries": 0,
        # In a container everybody is root; the token guards the server as it does for others.
        "ServerApp.allow_root": True,
        "KernelManager.transport_encryption": "required",
        # Nothing is fetched from the internet unasked.
        "LabApp.check_for_updates_class": "jupyterlab.NeverCheckForUpdate",
        "LabApp.extension_manager": "readonly",
        "LabApp.news_url": None,
        "Application.log_level": "WARN",
    }
    flags = [f"--{name}={value}" for name, value in options.items()]
    os.execv(sys.executable, [sys.executable, "-m", "jupyterlab", *flags])  # noqa: S606


def serve(_: argparse.Namespace) -> None:
    """Start the Feast feature server."""
    _embedded().up(also=["feature-server"], notify=say)


def ui(_: argparse.Namespace) -> None:
    """Start the Feast UI."""
    _embedded().up(also=["feast-ui"], notify=say)


def features(options: argparse.Namespace) -> None:
    """Register the features and materialise them to the online store."""
    with _platform(options, ()):
        from mlplatform.features import build

        build(notify=say)


def data(_: argparse.Namespace) -> None:
    """Derive data/income_data.csv again from its source and check both checksums."""
    from mlplatform_ops.income_source import derive_from_package

    path = find_root() / "data" / "income_data.csv"
    derive_from_package(path)
    say(f"wrote {path}; both checksums are as they must be")


def run(options: argparse.Namespace) -> int:
    """Run the notebooks in order, render them, and say where to look."""
    from mlplatform_ops import runner as notebooks

    root = find_root()
    chosen = notebooks.select(notebooks.find_notebooks(root / "notebooks"), options.notebooks)
    parameters = _parameters(options.parameters, [path.stem for path in chosen])
    for path in chosen:
        notebooks.check_parameters(path, parameters.get(path.stem, {}))
    output = (options.output or root / "build" / "notebooks").resolve()
    with _platform(options, {name for path in chosen for name in notebooks.services(path)}) as settings:
        executions = notebooks.run_all(chosen, output, parameters=parameters, notify=say)
        _summarise(executions, settings, output, options.platform)
    return int(any(execution.error or execution.skipped for execution in executions))


@contextmanager
def _platform(options: argparse.Namespace, services: Collection[str]) -> Iterator[Settings]:
    """Reach the platform asked for, and let every library in this process find it, for as long as the block runs."""
    if options.platform == "env":
        yield connect()
        return
    with (
        cluster_cli.forwarded(options)
        if options.platform == "k8s"
        else nullcontext(_embedded().up(also=services, notify=say))
    ) as settings:
        os.environ.update(settings.to_env())
        hasten_feast()
        yield settings


def _embedded() -> Embedded:
    from mlplatform_ops.embedded.platform import Embedded

    return Embedded(state_folder())


def _parameters(given: Sequence[str], names: Sequence[str]) -> dict[str, dict[str, object]]:
    """Read `NOTEBOOK:NAME=VALUE`; a value is read as YAML, as papermill's own command does."""
    import yaml

    parameters: dict[str, dict[str, object]] = {}
    for entry in given:
        notebook, colon, assignment = entry.partition(":")
        name, equals, value = assignment.partition("=")
        fitting = [known for known in names if known.startswith(notebook)]
        if not colon or not equals or len(fitting) != 1:
            raise NotebookError(f"-p {entry!r} is not NOTEBOOK:NAME=VALUE for one of: {', '.join(names)}")
        parameters.setdefault(fitting[0], {})[name] = yaml.safe_load(value)
    return parameters


def _summarise(executions: Sequence[Execution], settings: Settings, output: Path, platform: str) -> None:
    from mlflow import MlflowClient
    from rich.table import Table

    from mlplatform.modeling import SCORES
    from mlplatform.registry import CHAMPION, MODEL_NAME, find

    console = wide_console()
    table = Table("notebook", "seconds", "result")
    for execution in executions:
        result = "not run" if execution.skipped else execution.error or "ok"
        table.add_row(execution.name, f"{execution.seconds:.1f}", result)
    console.print(table)
    champion = find(CHAMPION)
    if champion and champion.run_id:
        run = MlflowClient().get_run(champion.run_id)
        scores = ", ".join(f"{name} {value:.4f}" for name, value in sorted(run.data.metrics.items()) if name in SCORES)
        console.print(f"Champion    {MODEL_NAME} version {champion.version} ({run.info.run_name}): {scores}")
    if platform == "k8s":
        console.print("MLflow, S3  make k8s-forward  (their addresses and credentials, until Ctrl-C)")
    else:
        source = ": make env" if platform == "embedded" else " as in the environment"
        console.print(f"MLflow      {settings.tracking_uri}  (user {settings.tracking_username}; password{source})")
        console.print(f"S3          {settings.s3_endpoint}  (keys{source})")
    console.print(f"Notebooks   {output}  (*.html, with outputs and plots)")
