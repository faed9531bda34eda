"""The commands behind the Makefile: `python -m mlplatform COMMAND`."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from datetime import timedelta

from mlplatform.errors import PlatformError
from mlplatform.settings import state_folder


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
    for command in (up, down, status, env, clean, lab):
        words = (command.__doc__ or "").strip().splitlines()[0]
        commands.add_parser(command.__name__, help=words, description=words).set_defaults(command=command)
    return parser


def up(_: argparse.Namespace) -> None:
    """Start the platform on this machine."""
    from mlplatform.embedded import Embedded

    Embedded(state_folder()).up(notify=_say)


def down(_: argparse.Namespace) -> None:
    """Stop it; nothing is lost."""
    from mlplatform.embedded import Embedded

    _say("stopped" if Embedded(state_folder()).down() else "nothing was running")


def status(_: argparse.Namespace) -> int:
    """Show each service, its state, URL and how long it runs."""
    from rich.console import Console
    from rich.table import Table

    from mlplatform.embedded import Embedded

    table = Table("service", "state", "url", "pid", "up for", "memory")
    services = Embedded(state_folder()).status()
    for service in services:
        runs = service.pid > 0
        table.add_row(
            service.name,
            service.state,
            service.url,
            str(service.pid) if runs else "",
            str(timedelta(seconds=service.uptime_s)) if runs else "",
            f"{service.memory_bytes / 2**20:.0f} MiB" if runs else "",
        )
    Console().print(table)
    return 0


def env(_: argparse.Namespace) -> None:
    """Print the connection settings as shell exports."""
    from mlplatform.embedded import Embedded

    settings = Embedded(state_folder()).settings
    for name, value in (settings.to_env() | {"REDIS_URL": settings.redis_url}).items():
        print(f"export {name}={shlex.quote(value)}")


def clean(_: argparse.Namespace) -> None:
    """Stop the platform and delete all of its state, and what was built."""
    import shutil

    from mlplatform.embedded import Embedded

    state = state_folder()
    Embedded(state).clean()
    shutil.rmtree(state.parent / "build", ignore_errors=True)
    _say(f"deleted {state}")


def lab(_: argparse.Namespace) -> None:
    """Open JupyterLab on the platform."""
    import secrets

    from mlplatform.embedded import Embedded, is_free

    os.environ.update(Embedded(state_folder()).up(notify=_say).to_env())
    port = next(port for port in range(8888, 8988) if is_free(port))
    token = secrets.token_urlsafe(24)
    os.environ["JUPYTER_TOKEN"] = token
    _say(f"JupyterLab: http://127.0.0.1:{port}/lab?token={token}")
    options = ["--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", "--ServerApp.port_retries=0", "--log-level=WARN"]
    os.execv(sys.executable, [sys.executable, "-m", "jupyterlab", *options, "notebooks"])  # noqa: S606


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
