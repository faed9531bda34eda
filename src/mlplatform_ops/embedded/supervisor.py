"""Talk to supervisord, which starts the services again when they end."""

from __future__ import annotations

import http.client
import os
import subprocess
import sys
import time
import xmlrpc.client
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import Any

import psutil

from mlplatform.errors import ServiceDownError
from mlplatform_ops.files import write_private
from mlplatform_ops.ports import HOST

CALL_TIMEOUT_S = 5.0
# Marks the processes that a supervisor started, so that they are found even when it was killed.
OWNER_VARIABLE = "MLPLATFORM_OWNER"


class Supervisor:
    """The supervisord of one state folder.

    Args:
        state: The state folder, in which it runs.
        environment: Gives the variables that `settings.json` keeps, among them the supervisor's port and password.
    """

    def __init__(self, state: Path, environment: Callable[[], Mapping[str, str]]) -> None:
        self._state = state
        self._environment = environment

    def launch(self, environment: Mapping[str, str], programs: str = "") -> None:
        """Start supervisord, and wait until it answers.

        Args:
            environment: All variables that it hands to the services.
            programs: More of its configuration, after what each platform has.

        Raises:
            ServiceDownError: It does not start.
        """
        conf = self._state / "supervisord.conf"
        write_private(conf, (resources.files("mlplatform_ops.embedded") / conf.name).read_text() + programs)
        outcome = subprocess.run(
            [sys.executable, "-m", "supervisor.supervisord", "-c", conf.name],
            cwd=self._state,
            env={**environment, OWNER_VARIABLE: str(self._state)},
            umask=0o077,
            capture_output=True,
            text=True,
            check=False,
        )
        if outcome.returncode:
            reason = (outcome.stderr or outcome.stdout).strip().splitlines()[-1:]
            raise ServiceDownError(f"the supervisor does not start: {' '.join(reason)}; see {self._state / 'logs'}")
        deadline = time.monotonic() + 20
        while not self.running():
            if time.monotonic() > deadline:
                log = self._state / "logs" / "supervisord.log"
                raise ServiceDownError(f"the supervisor does not answer after 20 s; see {log}")
            time.sleep(0.05)

    def running(self) -> bool:
        """Say whether it runs and accepts work.

        Raises:
            ServiceDownError: Its process is there and does not answer.
        """
        try:
            return bool(self._ask("getState")["statecode"] == 1)
        except TimeoutError:
            raise self._hangs() from None
        except (OSError, xmlrpc.client.Error, http.client.HTTPException, KeyError):
            return False

    def entries(self) -> dict[str, dict[str, Any]]:
        """Give what it knows of each service, by name: its `statename`, `pid`, `start` and `now` among others."""
        return {entry["name"]: entry for entry in self._call("getAllProcessInfo")}

    def entry(self, service: str) -> dict[str, Any]:
        """Give what it knows of one service."""
        return dict(self._call("getProcessInfo", service))

    def start(self, service: str) -> None:
        """Start a service, unless it runs.

        Raises:
            ServiceDownError: The supervisor cannot start it.
        """
        try:
            self._call("startProcess", service, False)
        except xmlrpc.client.Fault as fault:
            if "ALREADY_STARTED" not in fault.faultString:
                log = self._state / "logs" / f"{service}.log"
                raise ServiceDownError(f"{service}: {fault.faultString}; see {log}") from fault

    def stop(self, service: str) -> None:
        """Stop a service and wait until it has ended, unless it does not run.

        Raises:
            ServiceDownError: The supervisor cannot stop it.
        """
        try:
            self._call("stopProcess", service)
        except xmlrpc.client.Fault as fault:
            if "NOT_RUNNING" not in fault.faultString:
                raise ServiceDownError(f"{service}: {fault.faultString}") from fault

    def shutdown(self) -> None:
        """Stop every service, then the supervisor itself."""
        pid = self._call("getPID")
        # All at once: by itself the supervisor stops one, waits until it has ended, and goes on to the next.
        self._call("stopAllProcesses", False)
        self._call("shutdown")
        with suppress(psutil.NoSuchProcess, psutil.TimeoutExpired):
            psutil.Process(pid).wait(timeout=40)

    def pid(self) -> int:
        """Find the supervisor's process without asking it; 0 when there is none."""
        for process in processes_of(self._state):
            with suppress(psutil.Error):
                if "supervisor.supervisord" in process.cmdline():
                    return int(process.pid)
        return 0

    def _hangs(self) -> ServiceDownError:
        return ServiceDownError(
            f"the supervisor (pid {self.pid() or 'unknown'}) does not answer within {CALL_TIMEOUT_S:.0f} s; "
            "run 'make down', then 'make up'"
        )

    def _call(self, method: str, *arguments: object) -> Any:
        """Ask the supervisor, which must run.

        Raises:
            ServiceDownError: It does not answer, or it has ended.
        """
        try:
            return self._ask(method, *arguments)
        except TimeoutError:
            raise self._hangs() from None
        except (OSError, http.client.HTTPException, xmlrpc.client.ProtocolError) as error:
            log = self._state / "logs" / "supervisord.log"
            # A protocol error's text holds the address, and so the password.
            reason = error.errcode if isinstance(error, xmlrpc.client.ProtocolError) else error
            raise ServiceDownError(f"the supervisor has ended ({reason}); run 'make up'; see {log}") from None

    def _ask(self, method: str, *arguments: object) -> Any:
        environment = self._environment()
        password = environment["MLPLATFORM_SUPERVISOR_PASSWORD"]
        port = environment["MLPLATFORM_SUPERVISOR_PORT"]
        url = f"http://platform:{password}@{HOST}:{port}/RPC2"
        with xmlrpc.client.ServerProxy(url, transport=_Transport()) as proxy:
            return getattr(proxy.supervisor, method)(*arguments)


class _Transport(xmlrpc.client.Transport):
    """A transport that gives up: the standard library's own waits for ever."""

    def make_connection(self, host: Any) -> http.client.HTTPConnection:
        connection = super().make_connection(host)
        connection.timeout = CALL_TIMEOUT_S
        return connection


def processes_of(state: Path) -> Iterator[psutil.Process]:
    """Find the processes that a supervisor of this state folder started, and itself."""
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and process.environ().get(OWNER_VARIABLE) == str(state):
                yield process


def end_processes(state: Path) -> bool:
    """End every process of this state folder: what a killed supervisor left would hold the files of the next start.

    The supervisor ends first, since it would start again what ends before it.

    Returns:
        Whether there was any.
    """
    found = sorted(processes_of(state), key=lambda process: "supervisor.supervisord" not in _command(process))
    for process in found:
        with suppress(psutil.NoSuchProcess):
            if "supervisor.supervisord" in _command(process):
                process.kill()
                process.wait(timeout=5)
                continue
            process.terminate()
            # A process that was stopped would not see the signal.
            process.resume()
    _, alive = psutil.wait_procs(found, timeout=10)
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=5)
    return bool(found)


def _command(process: psutil.Process) -> list[str]:
    with suppress(psutil.Error):
        return list(process.cmdline())
    return []
