"""The platform on one machine: SeaweedFS, Valkey and MLflow under one supervisor, without Docker and without root.

All state lies in one folder. `supervisord.conf`, beside this module, says how each service is started; this module
chooses ports, makes credentials, waits until every service answers, and stops them again.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import sys
import time
import urllib.request
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock, Timeout

from mlplatform.errors import CredentialsError, PlatformError, ServiceDownError, SettingsError
from mlplatform.settings import (
    CLIENT_DEFAULTS,
    SETTINGS_COPY,
    SETTINGS_FILE,
    STATE_VARIABLE,
    Settings,
    find_root,
    read_settings,
    read_state,
)
from mlplatform.storage.refusals import s3_errors
from mlplatform_ops.console import Notify
from mlplatform_ops.embedded.services import (
    CONTENTS,
    FOLDERS,
    SECRETS,
    SERVICES,
    SHARED_MLFLOW,
    Service,
    addresses,
    auth_config,
    check_databases,
    choose_ports,
    growth_config,
    grpc_sockets,
    make_buckets,
    make_certificates,
    recover_secrets,
    s3_config,
    security_config,
    valkey_config,
    valkey_folder,
    wait_for_objects,
)
from mlplatform_ops.embedded.supervisor import Supervisor, end_processes, processes_of
from mlplatform_ops.embedded.users import programs, read_users, write_users
from mlplatform_ops.files import private_folder, write_private
from mlplatform_ops.ports import HOST, Listener

START_TIMEOUT_S = 180.0
PROBE_TIMEOUT_S = 3.0
# Less than MLflow's database, the store's log and one upload need for the next second.
LEAST_FREE_BYTES = 2**20
# A service that has run for longer than a start takes, on a machine with ten other things to do, must answer soon.
STARTED_AFTER_S = 120
HANG_TIMEOUT_S = 5.0
# One that ends so often while `up` waits does not come up; the supervisor goes on trying for minutes.
ENDS = 2
NOT_SUPERVISED = "not supervised"
# Longer than another platform's start, during which it keeps the lock.
LOCK_TIMEOUT_S = START_TIMEOUT_S + 60


@dataclass(frozen=True)
class ServiceStatus:
    """What is known of one service.

    Attributes:
        name: The service's name.
        state: `ready` when it answers, `does not answer` when it runs and should, `not supervised` when its supervisor
            has ended and left it running, else the supervisor's word, such as `starting`.
        url: Where it listens.
        pid: Its process id, 0 when it does not run.
        uptime_s: Seconds since it started, 0 when it does not run.
        memory_bytes: Resident memory of the process; each service is one.
    """

    name: str
    state: str
    url: str
    pid: int = 0
    uptime_s: int = 0
    memory_bytes: int = 0


class EmbeddedPlatform:
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
        self._supervisor = Supervisor(self.state, self._environment)

    def up(self, *, also: Collection[str] = (), notify: Notify = lambda _: None) -> Settings:
        """Start what does not run, wait until each service answers, make the buckets.

        Args:
            also: Names of on-demand services to start as well.
            notify: Called with a line for each step worth showing.

        Raises:
            SettingsError: The state folder cannot be written, or a port variable holds no port.
            PortTakenError: A port that the user set is in use.
            ServiceDownError: A service does not come up; the message names its log. Or no space is left.
            DataError: A database is damaged.
        """
        services = [service for service in SERVICES if not service.on_demand or service.name in also]
        with _one_at_a_time(notify):
            self.check_space()
            if not self.running():
                # Read before anything is ended.
                previous = self._previous(notify)
                if self._end_processes():
                    notify("the supervisor had ended; what it left running is ended too and starts again")
                check_databases(self.state / "mlflow")
                environment = self._variables(self._configure(previous, notify))
                self._supervisor.launch(environment, programs(read_users(self.state)))
            for service in services:
                self._supervisor.start(service.name)
            self._wait(services, notify)
            with s3_errors(self.settings.s3_endpoint):
                make_buckets(self.settings, read_users(self.state), notify=notify)
                wait_for_objects(self.settings, notify=notify)
        return self.settings

    def down(self, *, notify: Notify = lambda _: None) -> bool:
        """Stop every process and keep every byte.

        Args:
            notify: Called with a line for each step worth showing.

        Returns:
            Whether anything ran.
        """
        with _one_at_a_time(notify):
            ran = False
            try:
                ran = self.running()
                if ran:
                    self._supervisor.shutdown()
            except ServiceDownError as error:
                notify(f"{error.args[0].partition(';')[0]}; ending its processes without it")
            return self._end_processes() or ran

    def _end_processes(self) -> bool:
        """End what runs without its supervisor, and remove the sockets that SeaweedFS leaves in /tmp."""
        ended = end_processes(self.state)
        with suppress(SettingsError, KeyError, OSError):
            for path in grpc_sockets(self._environment()):
                path.unlink(missing_ok=True)
        return ended

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

    def check_space(self) -> None:
        """Make sure that the servers can write; each says in its own way, and late, that it cannot.

        Raises:
            ServiceDownError: No space is left.
        """
        # What starts the servers makes the folder, or says why it cannot.
        with suppress(FileNotFoundError, NotADirectoryError):
            if shutil.disk_usage(self.state).free < LEAST_FREE_BYTES:
                raise ServiceDownError(
                    f"no space left in {self.state}; free some, then type this again: the servers go on by themselves"
                )

    def start(self, *programs: str) -> None:
        """Start programs by name, without waiting until they answer."""
        for program in programs:
            self._supervisor.start(program)

    def stop(self, *programs: str) -> None:
        """End programs by name."""
        for program in programs:
            self._supervisor.stop(program)

    def entry(self, program: str) -> dict[str, Any]:
        """Give what the supervisor knows of a program: its `statename` and `pid` among others."""
        return self._supervisor.entry(program)

    def running(self) -> bool:
        """Say whether this platform's supervisor answers.

        Raises:
            ServiceDownError: It runs, and does not answer within seconds.
        """
        try:
            return self._supervisor.running()
        except SettingsError:
            return False

    def status(self) -> list[ServiceStatus]:
        """Ask the supervisor for every service, whether it runs or not.

        Raises:
            SettingsError: No platform was ever started here.
            ServiceDownError: The supervisor runs, and does not answer within seconds.
        """
        settings = self.settings
        if not self.running():
            return self._left_running()
        entries = self._supervisor.entries()
        # Side by side: each that hangs takes the time limit of its probe.
        with ThreadPoolExecutor(len(SERVICES)) as pool:
            asked = [pool.submit(self._status_of, entry, settings, entries.get(entry.name)) for entry in SERVICES]
            return [status.result() for status in asked]

    def _left_running(self) -> list[ServiceStatus]:
        """Look for services without a supervisor: when it was killed, they run on, and nobody starts them again."""
        left: dict[int, psutil.Process] = {}
        for process in processes_of(self.state):
            with suppress(psutil.Error):
                listening = (entry for entry in process.net_connections("tcp4") if entry.status == psutil.CONN_LISTEN)
                left |= {entry.laddr.port: process for entry in listening}
        found = []
        for service in SERVICES:
            status = ServiceStatus(service.name, "stopped", self._url(service))
            with suppress(psutil.Error, KeyError):
                process = left[int(self._environment()[service.variable])]
                with process.oneshot():
                    uptime_s, memory_bytes = time.time() - process.create_time(), process.memory_info().rss
                status = replace(
                    status, state=NOT_SUPERVISED, pid=process.pid, uptime_s=int(uptime_s), memory_bytes=memory_bytes
                )
            found.append(status)
        return found

    def _status_of(self, service: Service, settings: Settings, entry: Mapping[str, Any] | None) -> ServiceStatus:
        url = self._url(service)
        if entry is None or not entry["pid"]:
            return ServiceStatus(service.name, entry["statename"].lower() if entry else "stopped", url)
        state = "ready" if self._answers(service, settings) else entry["statename"].lower()
        memory_bytes = 0
        with suppress(psutil.NoSuchProcess):
            memory_bytes = psutil.Process(entry["pid"]).memory_info().rss
        return ServiceStatus(
            service.name,
            "does not answer" if state == "running" else state,
            url,
            entry["pid"],
            entry["now"] - entry["start"],
            memory_bytes,
        )

    def listeners(self) -> list[Listener]:
        """List every socket on which a process of this platform listens."""
        names = {entry["pid"]: name for name, entry in self._supervisor.entries().items() if entry["pid"]}
        found: set[Listener] = set()
        for process in processes_of(self.state):
            with suppress(psutil.Error):
                family = [process, *process.parents()]
                service = next((names[member.pid] for member in family if member.pid in names), "supervisor")
                for connection in process.net_connections("inet"):
                    if connection.status == psutil.CONN_LISTEN:
                        found.add(Listener(service, f"{connection.laddr.ip}:{connection.laddr.port}"))
                for connection in process.net_connections("unix"):
                    if connection.laddr and not connection.raddr:
                        path = self.state / str(connection.laddr)
                        if path.is_socket():
                            found.add(Listener(service, str(path)))
        return sorted(found, key=lambda entry: (entry.service, entry.address))

    @property
    def settings(self) -> Settings:
        """The settings under which notebooks and tools reach this platform."""
        return read_settings(self.state, also=[service.variable for service in SERVICES])

    def _environment(self) -> dict[str, str]:
        return read_state(self.state)

    def _previous(self, notify: Notify) -> dict[str, str]:
        """Read the variables of the last start; those of damaged or older settings come from what the servers read."""
        recovered = recover_secrets(self.state)
        try:
            return recovered | self._environment()
        except SettingsError as error:
            if recovered:
                damage = error.args[0].partition(";")[0]
                notify(f"{damage}; made again, with {', '.join(recovered)} as the servers know them")
            return recovered

    def _configure(self, previous: Mapping[str, str], notify: Notify) -> dict[str, str]:
        """Choose ports, make the credentials that are not there yet, write what each service reads.

        Args:
            previous: The variables of the last start.
            notify: Called with a line for each port that is not the expected one.
        """
        environment = {**previous, **choose_ports(self._environ, previous, defaults=self._default_ports, notify=notify)}
        environment |= {name: previous.get(name) or secrets.token_urlsafe(24) for name in SECRETS}
        environment |= addresses(environment)
        try:
            # What servers that ended left there.
            shutil.rmtree(self.state / "tmp", ignore_errors=True)
            self.state.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.state.chmod(0o700)
            for folder in FOLDERS:
                (self.state / folder).mkdir(mode=0o700, exist_ok=True)
            make_certificates(self.state / "certificates")
            for name in (SETTINGS_FILE, SETTINGS_COPY):
                write_private(self.state / name, json.dumps({"environment": environment}, indent=2))
            users = read_users(self.state)
            write_private(self.state / "s3.json", s3_config(environment, users))
            write_private(self.state / "security.toml", security_config())
            if users:
                write_private(self.state / "master.toml", growth_config())
            write_private(self.state / "valkey.conf", valkey_config(environment, users))
            write_private(self.state / "basic_auth.ini", auth_config(environment, users))
            write_users(self.state, users, environment)
        except OSError as error:
            raise SettingsError(
                f"cannot write {error.filename} ({error.strerror}); free it, or set {STATE_VARIABLE} to another folder"
            ) from error
        return environment

    def _variables(self, environment: Mapping[str, str]) -> dict[str, str]:
        """Give the variables that the supervisor hands to every service."""
        binaries = [str(Path(sys.executable).parent), str(valkey_folder())]
        return {
            **{name: value for name, value in self._environ.items() if name in _INHERITED},
            **CLIENT_DEFAULTS,
            **environment,
            "PATH": os.pathsep.join([*binaries, self._environ.get("PATH", os.defpath)]),
            "MLFLOW_AUTH_CONFIG_PATH": "basic_auth.ini",
            **(SHARED_MLFLOW if read_users(self.state) else {}),
            "MLPLATFORM_FEATURE_REPO": str(find_root() / "feature_repo"),
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            STATE_VARIABLE: str(self.state),
            "PYTHONUNBUFFERED": "1",
            "TMPDIR": str(self.state / "tmp"),
            # SeaweedFS, a Go program, then returns what it no longer uses. With 200 MiB it collects garbage without
            # end: a tenth of a core while nothing is asked of it.
            "GOMEMLIMIT": "400MiB",
        }

    def _wait(self, services: list[Service], notify: Notify) -> None:
        settings = self.settings
        waiting = {service.name: service for service in services}
        ends: dict[str, set[int]] = {name: set() for name in waiting}
        began = time.monotonic()
        said = began
        while waiting:
            for service in list(waiting.values()):
                if self._answers(service, settings):
                    notify(f"{service.name} answers at {self._url(service)}")
                    del waiting[service.name]
                    continue
                waited = time.monotonic() - began
                entry = self._supervisor.entry(service.name)
                log = self._log(service)
                if entry["statename"] != "STARTING":
                    self.check_space()
                    check_databases(self.state / "mlflow")
                ends[service.name].add(entry["stop"])  # the first one was before this start
                over = entry["statename"] in {"FATAL", "EXITED", "UNKNOWN"} or len(ends[service.name]) > ENDS
                if over or waited > START_TIMEOUT_S:
                    if service.on_demand:
                        self._supervisor.stop(service.name)  # or it would be started again and again
                    raise ServiceDownError(f"{service.name} does not come up: {_last_line(log)}; see {log}")
                if waited > HANG_TIMEOUT_S and entry["now"] - entry["start"] > STARTED_AFTER_S:
                    raise ServiceDownError(
                        f"{service.name} (pid {entry['pid']}) runs and does not answer; "
                        f"run 'make down', then 'make up'; see {log}"
                    )
            self.check_space()
            if waiting and time.monotonic() - said > 8:
                notify(f"waiting for {', '.join(waiting)}")
                said = time.monotonic()
            time.sleep(0.1 if waiting else 0)

    def _answers(self, service: Service, settings: Settings) -> bool:
        try:
            if service.probe:
                service.probe(settings, PROBE_TIMEOUT_S)
            else:
                urllib.request.urlopen(f"{self._url(service)}{service.health}", timeout=PROBE_TIMEOUT_S).close()  # noqa: S310
        except CredentialsError as error:
            raise ServiceDownError(f"{error}; another program may have taken its port") from error
        except (PlatformError, OSError):
            return False
        # The service accepted our password. Also check that it is the one that our supervisor started.
        port = int(self._environment()[service.variable])
        with suppress(psutil.NoSuchProcess):
            listening = psutil.Process(self._supervisor.entry(service.name)["pid"]).net_connections("inet")
            return any(entry.status == psutil.CONN_LISTEN and entry.laddr.port == port for entry in listening)
        return False

    def _log(self, service: Service) -> Path:
        return self.state / "logs" / f"{service.name}.log"

    def url(self, name: str) -> str:
        """Say where a service listens."""
        return self._url(next(service for service in SERVICES if service.name == name))

    def _url(self, service: Service) -> str:
        scheme = "redis" if service.name == "online-store" else "http"
        return f"{scheme}://{HOST}:{self._environment()[service.variable]}"


# What a service may need of the user's environment; the rest, such as another platform's credentials, stays out.
_INHERITED = {"HOME", "LANG", "LC_ALL", "PATH", "TZ", "OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"}


@contextmanager
def _one_at_a_time(notify: Notify) -> Iterator[None]:
    """Let one platform of this user start or stop at a time, so that two never choose the same port.

    The lock lies in a folder of this user's alone: in a shared one, somebody else could hold it for ever.

    Raises:
        ServiceDownError: Another start or stop does not end.
    """
    path = private_folder() / "start.lock"
    lock = FileLock(path, mode=0o600)
    try:
        lock.acquire(timeout=1)
    except Timeout:
        notify("another platform of yours starts or stops; waiting for it")
        try:
            lock.acquire(timeout=LOCK_TIMEOUT_S)
        except Timeout:
            raise ServiceDownError(
                f"another start or stop has held {path} for {LOCK_TIMEOUT_S:.0f} s; end it, then type this again"
            ) from None
    try:
        yield
    finally:
        lock.release()


def _last_line(log: Path) -> str:
    with suppress(OSError):
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        if lines:
            return lines[-1][:200]
    return "it wrote nothing"
