"""Ports on this machine's loopback address: which are free, and which service gets which."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from mlplatform.errors import PortTakenError, SettingsError

HOST = "127.0.0.1"
LAST_PORT = 65_535


class ServicePort(NamedTuple):
    """Where a service listens on this machine: the variable that sets its port, and the port where nobody set it."""

    variable: str
    port: int


@dataclass(frozen=True)
class Listener:
    """A socket on which a process of the platform listens.

    Attributes:
        service: Whose it is.
        address: `host:port`, or the path of a Unix socket.
    """

    service: str
    address: str

    @property
    def unix(self) -> bool:
        """Whether it is a Unix socket."""
        return self.address.startswith("/")


SERVICE_PORTS = {
    "object-store": ServicePort("MLPLATFORM_S3_PORT", 9000),
    "online-store": ServicePort("MLPLATFORM_REDIS_PORT", 6379),
    "mlflow": ServicePort("MLPLATFORM_MLFLOW_PORT", 5000),
    "feature-server": ServicePort("MLPLATFORM_FEATURE_SERVER_PORT", 6566),
    "feast-ui": ServicePort("MLPLATFORM_FEAST_UI_PORT", 6567),
    "model-endpoint": ServicePort("MLPLATFORM_ENDPOINT_PORT", 3000),
}
# Below the ranges from which Linux and macOS take the local ports of outgoing connections.
FREE_PORTS = range(20_000, 32_000)


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


def users_port(variable: str, value: str) -> str:
    """Check a port that the user chose.

    Raises:
        SettingsError: It is no port.
        PortTakenError: It is in use.
    """
    if not value.isdigit() or not 1 <= int(value) <= LAST_PORT:
        raise SettingsError(f"{variable}={value!r} is not a port; set it to a number from 1 to 65535")
    if not is_free(int(value)):
        raise PortTakenError(
            f"{variable}={value}: port {value} is taken by another program; stop it, or set {variable} to a free port"
        )
    return value
