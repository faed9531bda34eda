"""The platform on one machine: SeaweedFS, Valkey and MLflow under one supervisor, without Docker and without root.

All state lies in one folder. `supervisord.conf`, beside this module, says how each service is started; this module
chooses ports, makes credentials, waits until every service answers, and stops them again.
"""

from __future__ import annotations

import fcntl
import http.client
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
import xmlrpc.client
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import psutil

from mlplatform.errors import CredentialsError, PlatformError, ServiceDownError, SettingsError
from mlplatform.settings import (
    CLIENT_DEFAULTS,
    SETTINGS_FILE,
    STATE_VARIABLE,
    Settings,
    find_root,
    read_settings,
    read_state,
)
from mlplatform_ops.console import Notify
from mlplatform_ops.embedded.services import (
    CONTENTS,
    FOLDERS,
    SECRETS,
    SERVICES,
    Service,
    addresses,
    auth_config,
    choose_ports,
    make_buckets,
    s3_config,
    valkey_config,
    valkey_folder,
)
from mlplatform_ops.files import write_private
from mlplatform_ops.ports import HOST

START_TIMEOUT_S = 180.0
PROBE_TIMEOUT_S = 5.0
# Marks the processes that a supervisor started, so that they are found even when it was killed.
OWNER_VARIABLE = "MLPLATFORM_OWNER"


@dataclass(frozen=True)
class ServiceStatus:
    """What is known of one service.

    Attributes:
        name: The service's name.
        state: `ready` when it answers, else supervisor's own word, such as `starting` or `fatal`.
        url: Where it listens.
        pid: Its process id, 0 when it does not run.
        uptime_s: Seconds since it started, 0 when it does not run.
        memory_bytes: Resident memory of the process and its children.
    """

    name: str
    state: str
    url: str
    pid: int = 0
    uptime_s: int = 0
    memory_bytes: int = 0


class Embedded:
    """The platform whose state lies in one folder.

    Args:
        state: The state folder; `up` makes it.
        environ: Where ports that the user set are looked up.
        default_ports: Whether to try the usual ports first; tests take free ones at once.
    """

    def __init__(self, state: Path, *, environ: Mapping[str, str] = os.environ, default_ports: bool = True) -> None:
        self.state = state.resolve()
        self._environ = environ
        self._default_ports = default_ports

    def up(self, *, also: Collection[str] = (), notify: Notify = lambda _: None) -> Settings:
        """Start what does not run, wait until each service answers, make the buckets.

        Args:
            also: Names of on-demand services to start as well.
            notify: Called with a line for each step worth showing.

        Raises:
            SettingsError: The state folder cannot be written, or a port variable holds no port.
            PortTakenError: A port that the user set is in use.
            ServiceDownError: A service does not come up; the message names its log.
        """
        services = [service for service in SERVICES if not service.on_demand or service.name in also]
        with _one_at_a_time():
            if not self.running():
                self._end_orphans()
                self._start_supervisor(self._configure(notify))
            for service in services:
                self._start(service)
            self._wait(services, notify)
            make_buckets(self.settings)
        return self.settings

    def down(self) -> bool:
        """Stop every process and keep every byte.

        Returns:
            Whether anything ran.
        """
        with _one_at_a_time():
            ran = self.running()
            if ran:
                pid = self._call("getPID")
                self._call("shutdown")
                with suppress(psutil.NoSuchProcess, psutil.TimeoutExpired):
                    psutil.Process(pid).wait(timeout=40)
            ran = self._end_orphans() or ran
            self._remove_sockets()
        return ran

    def clean(self) -> None:
        """Stop every process and delete what `up` made; what somebody else put into the state folder stays."""
        self.down()
        for name in CONTENTS:
            path = self.state / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        with suppress(OSError):
            self.state.rmdir()

    def running(self) -> bool:
        """Say whether this platform's supervisor answers."""
        try:
            return bool(self._call("getState")["statecode"] == 1)
        except (OSError, xmlrpc.client.Error, http.client.HTTPException, SettingsError, KeyError):
            return False

    def status(self) -> list[ServiceStatus]:
        """Ask the supervisor for every service, whether it runs or not.

        Raises:
            SettingsError: No platform was ever started here.
        """
        settings = self.settings
        entries = {}
        if self.running():
            entries = {entry["name"]: entry for entry in self._call("getAllProcessInfo")}
        return [self._status_of(service, settings, entries.get(service.name)) for service in SERVICES]

    def _status_of(self, service: Service, settings: Settings, entry: Mapping[str, Any] | None) -> ServiceStatus:
        url = self._url(service)
        if entry is None or not entry["pid"]:
            return ServiceStatus(service.name, entry["statename"].lower() if entry else "stopped", url)
        ready = self._answers(service, settings)
        members = [psutil.Process(entry["pid"])]
        members += members[0].children(recursive=True)
        return ServiceStatus(
            service.name,
            "ready" if ready else entry["statename"].lower(),
            url,
            entry["pid"],
            entry["now"] - entry["start"],
            sum(member.memory_info().rss for member in members),
        )

    @property
    def settings(self) -> Settings:
        """The settings under which notebooks and tools reach this platform."""
        return read_settings(self.state)

    def _environment(self) -> dict[str, str]:
        return read_state(self.state)

    def _configure(self, notify: Notify) -> dict[str, str]:
        """Choose ports, make the credentials that are not there yet, write what each service reads."""
        previous = self._environment() if (self.state / SETTINGS_FILE).is_file() else {}
        environment = previous | choose_ports(self._environ, previous, defaults=self._default_ports, notify=notify)
        environment |= {name: previous.get(name) or secrets.token_urlsafe(24) for name in SECRETS}
        environment |= addresses(environment)
        try:
            # What servers that ended left there.
            shutil.rmtree(self.state / "tmp", ignore_errors=True)
            for folder in FOLDERS:
                (self.state / folder).mkdir(mode=0o700, parents=True, exist_ok=True)
            self.state.chmod(0o700)
            write_private(self.state / SETTINGS_FILE, json.dumps({"environment": environment}, indent=2))
            write_private(self.state / "s3.json", s3_config(environment))
            write_private(self.state / "valkey.conf", valkey_config(environment))
            write_private(self.state / "basic_auth.ini", auth_config(environment))
        except OSError as error:
            raise SettingsError(
                f"cannot write {error.filename} ({error.strerror}); free it, or set {STATE_VARIABLE} to another folder"
            ) from error
        return environment

    def _start_supervisor(self, environment: Mapping[str, str]) -> None:
        conf = self.state / "supervisord.conf"
        conf.write_text((resources.files("mlplatform_ops.embedded") / "supervisord.conf").read_text())
        binaries = [str(Path(sys.executable).parent), str(valkey_folder())]
        outcome = subprocess.run(
            [sys.executable, "-m", "supervisor.supervisord", "-c", conf.name],
            cwd=self.state,
            env={
                **{name: value for name, value in self._environ.items() if name in _INHERITED},
                **CLIENT_DEFAULTS,
                **environment,
                "PATH": os.pathsep.join([*binaries, self._environ.get("PATH", os.defpath)]),
                "MLFLOW_AUTH_CONFIG_PATH": "basic_auth.ini",
                "MLPLATFORM_FEATURE_REPO": str(find_root() / "feature_repo"),
                "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
                OWNER_VARIABLE: str(self.state),
                STATE_VARIABLE: str(self.state),
                "PYTHONUNBUFFERED": "1",
                "TMPDIR": str(self.state / "tmp"),
                # SeaweedFS, a Go program, then returns what it no longer uses. With 200 MiB it collects garbage without
                # end: a tenth of a core while nothing is asked of it.
                "GOMEMLIMIT": "400MiB",
            },
            capture_output=True,
            text=True,
            check=False,
        )
        if outcome.returncode:
            reason = (outcome.stderr or outcome.stdout).strip().splitlines()[-1:]
            raise ServiceDownError(f"the supervisor does not start: {' '.join(reason)}; see {self.state / 'logs'}")
        _wait_until(self.running, timeout_s=20, what="the supervisor", log=self.state / "logs" / "supervisord.log")

    def _call(self, method: str, *arguments: object) -> Any:
        environment = self._environment()
        password = environment["MLPLATFORM_SUPERVISOR_PASSWORD"]
        port = environment["MLPLATFORM_SUPERVISOR_PORT"]
        with xmlrpc.client.ServerProxy(f"http://platform:{password}@{HOST}:{port}/RPC2") as proxy:
            return getattr(proxy.supervisor, method)(*arguments)

    def _start(self, service: Service) -> None:
        try:
            self._call("startProcess", service.name, False)
        except xmlrpc.client.Fault as fault:
            if "ALREADY_STARTED" not in fault.faultString:
                raise ServiceDownError(f"{service.name}: {fault.faultString}; see {self._log(service)}") from fault

    def _wait(self, services: list[Service], notify: Notify) -> None:
        settings = self.settings
        waiting = {service.name: service for service in services}
        deadline = time.monotonic() + START_TIMEOUT_S
        while waiting:
            for service in list(waiting.values()):
                if self._answers(service, settings):
                    notify(f"{service.name} answers at {self._url(service)}")
                    del waiting[service.name]
                elif time.monotonic() > deadline or self._state(service) in {"FATAL", "EXITED", "UNKNOWN"}:
                    raise ServiceDownError(
                        f"{service.name} does not come up: {_last_line(self._log(service))}; see {self._log(service)}"
                    )
            time.sleep(0.1 if waiting else 0)

    def _answers(self, service: Service, settings: Settings) -> bool:
        try:
            if service.probe:
                service.probe(settings, PROBE_TIMEOUT_S)
            else:
                urllib.request.urlopen(f"{self._url(service)}/health", timeout=PROBE_TIMEOUT_S).close()  # noqa: S310
        except CredentialsError as error:
            raise ServiceDownError(f"{error}; another program may have taken its port") from error
        except (PlatformError, OSError):
            return False
        # Whatever answered knows our credentials; the supervisor must agree that it is ours.
        return self._state(service) in {"STARTING", "RUNNING"}

    def _state(self, service: Service) -> str:
        return str(self._call("getProcessInfo", service.name)["statename"])

    def _log(self, service: Service) -> Path:
        return self.state / "logs" / f"{service.name}.log"

    def _url(self, service: Service) -> str:
        scheme = "redis" if service.name == "online-store" else "http"
        return f"{scheme}://{HOST}:{self._environment()[service.variable]}"

    def _end_orphans(self) -> bool:
        """End what a killed supervisor left behind: it would hold the data files of the next start."""
        orphans = list(_processes_of(self.state))
        for process in orphans:
            with suppress(psutil.NoSuchProcess):
                process.terminate()
        _, alive = psutil.wait_procs(orphans, timeout=20)
        for process in alive:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(alive, timeout=5)
        return bool(orphans)

    def _remove_sockets(self) -> None:
        """Remove the sockets that SeaweedFS leaves in /tmp; it offers no option for their place."""
        with suppress(SettingsError, KeyError):
            environment = self._environment()
            for part in ("master", "volume", "filer", "s3"):
                port = environment[f"MLPLATFORM_WEED_{part.upper()}_GRPC_PORT"]
                Path("/tmp", f"seaweedfs-{part}-grpc-{port}.sock").unlink(missing_ok=True)  # noqa: S108


# What a service may need of the user's environment; the rest, such as another platform's credentials, stays out.
_INHERITED = {"HOME", "LANG", "LC_ALL", "PATH", "TZ", "OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"}


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Let one platform of this user start or stop at a time, so that two never choose the same port."""
    path = Path(tempfile.gettempdir()) / f"mlplatform-{os.getuid()}.lock"
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _processes_of(state: Path) -> Iterator[psutil.Process]:
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.pid != os.getpid() and process.environ().get(OWNER_VARIABLE) == str(state):
                yield process


def _last_line(log: Path) -> str:
    with suppress(OSError):
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        if lines:
            return lines[-1][:200]
    return "it wrote nothing"


def _wait_until(ready: Callable[[], bool], *, timeout_s: float, what: str, log: Path) -> None:
    deadline = time.monotonic() + timeout_s
    while not ready():
        if time.monotonic() > deadline:
            raise ServiceDownError(f"{what} does not answer after {timeout_s:.0f} s; see {log}")
        time.sleep(0.05)
