"""Ports of this machine that lead to pods of a cluster, and stay open when a pod is replaced.

kubectl carries the data. The official client could (`kubernetes.stream.portforward`), but its version 37 drops the
answer when the asking side has ended its half of a connection, and changes the API client that other threads use.
"""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from mlplatform.errors import ClusterError, PlatformError, PortTakenError
from mlplatform.settings import Settings
from mlplatform_ops.console import Notify
from mlplatform_ops.ports import SERVICE_PORTS, ServicePort, free_port, is_free

# Finds the running pods behind a service: name, port, and whether it is ready.
Target = Callable[[], list[tuple[str, int, bool]]]
DASK = "dask-scheduler"
# The cluster's services that a client on this machine uses, each with its port and what sets its local port.
SERVICES = {
    "minio-service": SERVICE_PORTS["object-store"],
    "redis": SERVICE_PORTS["online-store"],
    "mlflow": SERVICE_PORTS["mlflow"],
    "feature-server": SERVICE_PORTS["feature-server"],
    DASK: ServicePort("MLPLATFORM_DASK_PORT", 8786),
}

# A dropped forward refuses connections until kubectl has started again, a second or two of which a client waits.
S3_ATTEMPTS = 6


class Forward:
    """One forwarded port, which stays open when the pod behind it is replaced.

    Args:
        name: What is forwarded, for messages.
        port: The local port.
        target: Finds the running pods behind the service.
        command: Makes the command line that forwards, from the pod's name, the local port and the pod's port.
        notify: Called with a line when the forward goes on to another pod, or fails.
    """

    def __init__(
        self,
        name: str,
        port: int,
        target: Target,
        command: Callable[[str, int, int], list[str]],
        notify: Notify = lambda _: None,
    ) -> None:
        self.name = name
        self.port = port
        self._target = target
        self._command = command
        self._notify = notify
        self._stopping = threading.Event()
        self._ready = threading.Event()
        self._failure: PlatformError | None = None
        self._said = ""
        self._process: subprocess.Popen[str] | None = None
        self._thread = threading.Thread(target=self._run, daemon=True, name=f"forward-{name}")

    def start(self, *, timeout_s: float = 60.0) -> None:
        """Start forwarding and wait until the local port is open.

        Raises:
            ClusterError: There is no ready pod within the time.
            PortTakenError: Another program has the local port.
        """
        self._thread.start()
        deadline = time.monotonic() + timeout_s
        while not self._ready.wait(0.1):
            if self._failure:
                raise self._failure
            if time.monotonic() > deadline:
                reason = f": {self._said}" if self._said else ""
                raise ClusterError(
                    f"{self.name} can't be forwarded within {timeout_s:.0f} s{reason}; run 'make k8s-status'"
                )

    def stop(self) -> None:
        """End the forward."""
        self._stopping.set()
        self._end()
        if self._thread.is_alive():
            self._thread.join(timeout=10)

    def _run(self) -> None:
        previous: str | None = None
        while not self._stopping.is_set():
            try:
                ready = [(pod, remote) for pod, remote, is_ready in self._target() if is_ready]
                if not ready:
                    self._stopping.wait(0.5)
                    continue
                pod, remote = ready[0]
                if previous:
                    self._notify(f"{self.name}: the forward to {previous} dropped; leading to {pod}")
                previous = pod if self._follow(pod, remote) else None
                if not previous:
                    self._stopping.wait(1)
            except PortTakenError as error:
                self._failure = error
                self._notify(str(error))
                return
            except PlatformError as error:
                # The API server may be away for a moment; the local port must work again when it is back.
                self._notify(f"{self.name}: {error}")
                self._stopping.wait(1)

    def _follow(self, pod: str, remote: int) -> bool:
        """Forward to one pod until the forward ends, or until another pod should be used.

        Returns:
            Whether the forward was ever open.
        """
        process = subprocess.Popen(
            self._command(pod, self.port, remote),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # a terminal's Ctrl-C must not end it before what still needs it
        )
        self._process = process
        lines: list[str] = []
        reader = threading.Thread(target=self._read, args=(process, lines), daemon=True)
        reader.start()
        try:
            while not self._stopping.is_set() and not _has_ended(process, within_s=1.0):
                # Keep a forward that works while the API server does not answer.
                with suppress(ClusterError):
                    # Keep it too while its pod is not ready, unless another pod is.
                    states = {name: ready for name, _, ready in self._target()}
                    if pod not in states or (not states[pod] and any(states.values())):
                        break
        finally:
            self._end()
            reader.join(timeout=5)
            if process.stdout:
                process.stdout.close()
        if any("unable to listen" in line.lower() for line in lines):
            variable = SERVICES[self.name].variable if self.name in SERVICES else "its port"
            raise PortTakenError(
                f"port {self.port}, on which {self.name} is forwarded, is taken by another program; "
                f"stop it, or set {variable} to a free port"
            )
        self._said = lines[-1] if lines else ""
        return any(line.startswith("Forwarding from") for line in lines)

    def _read(self, process: subprocess.Popen[str], lines: list[str]) -> None:
        for line in process.stdout or ():
            if not line.startswith("Handling connection"):
                lines.append(line.strip())
            if line.startswith("Forwarding from"):
                self._ready.set()
            elif "lost connection" in line.lower():
                # Some versions of kubectl go on running after this, and forward nothing.
                process.terminate()

    def _end(self) -> None:
        process = self._process
        if process and process.poll() is None:
            process.terminate()
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def forwarded_settings(secrets: Mapping[str, str], ports: Mapping[str, int], dask_config: Path) -> Settings:
    """Combine the credentials of the cluster with addresses on this machine.

    Args:
        secrets: What `client.env` holds.
        ports: Local ports by service.
        dask_config: The file with certificates for the Dask scheduler, where there is one.
    """
    # A client speaks with the scheduler alone, and nobody asks which host a certificate is for.
    dask = {}
    if DASK in ports:
        dask = {"DASK_SCHEDULER_ADDRESS": f"tls://127.0.0.1:{ports[DASK]}", "DASK_CONFIG": str(dask_config)}
    redis = secrets["REDIS_CONNECTION_STRING"].split(",", 1)[1]
    return Settings.from_env(
        {
            **secrets,
            **dask,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_MAX_ATTEMPTS": str(S3_ATTEMPTS),
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{ports['minio-service']}",
            "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{ports['mlflow']}",
            "REDIS_CONNECTION_STRING": f"127.0.0.1:{ports['redis']},{redis}",
            "FEATURE_SERVER_URL": f"http://127.0.0.1:{ports.get('feature-server', SERVICES['feature-server'].port)}",
        }
    )


def local_port(service: str, port: int, wanted: str | None, variable: str) -> int:
    """Choose the local port of a service: the one that was asked for, its own, or a free one.

    Args:
        service: The service's name.
        port: Its own port.
        wanted: What the user asked for, if anything.
        variable: Where that was asked for.

    Raises:
        PortTakenError: The port that was asked for is taken, or is none.
    """
    if wanted is None:
        return port if is_free(port) else free_port()
    if not wanted.isdigit() or not is_free(int(wanted)):
        raise PortTakenError(
            f"{variable}={wanted}, on which {service} is to be forwarded, is taken or no port; "
            f"stop what uses it, or set {variable} to a free port"
        )
    return int(wanted)


def _has_ended(process: subprocess.Popen[str], *, within_s: float) -> bool:
    try:
        process.wait(within_s)
    except subprocess.TimeoutExpired:
        return False
    return True
