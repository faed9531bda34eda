"""A run that reaches a cluster through forwards survives that each of them drops in the middle of it.

The servers are this session's, in the place of a cluster's; a relay stands in for `kubectl port-forward`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from mlplatform import notebooks
from mlplatform.cluster import SERVICES, Forward, forwarded_settings
from mlplatform.embedded import free_port
from mlplatform.settings import Settings

ROOT = Path(__file__).parents[2]
# Its first life ends in the middle: the last of so many pieces that clients send goes nowhere, and all is cut.
RELAY = """
import os, socket, sys, threading
local, remote, dropped, pieces = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4])
left = [0 if os.path.exists(dropped) else pieces]

def pipe(source, target, counts):
    try:
        while piece := source.recv(65536):
            if counts and left[0]:
                left[0] -= 1
                if not left[0]:
                    open(dropped, "w").close()
                    os._exit(1)
            target.sendall(piece)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        pass

server = socket.create_server(("127.0.0.1", local))
print("Forwarding from 127.0.0.1:" + str(local), flush=True)
while True:
    client, _ = server.accept()
    there = socket.create_connection(("127.0.0.1", remote))
    threading.Thread(target=pipe, args=(client, there, True), daemon=True).start()
    threading.Thread(target=pipe, args=(there, client, False), daemon=True).start()
"""
# Enough that the run is under way: its first pieces ask whether the servers are there, and it must not wait for those.
PIECES = {"mlflow": 8, "minio-service": 8, "redis": 8, "feature-server": 1}


def _remote_ports(settings: Settings) -> dict[str, int]:
    addresses = {
        "mlflow": settings.tracking_uri,
        "minio-service": settings.s3_endpoint,
        "redis": settings.redis_url,
        "feature-server": settings.feature_server,
    }
    return {service: urlsplit(address).port or 0 for service, address in addresses.items()}


@contextmanager
def _forwards(settings: Settings, folder: Path, notify: Callable[[str], None]) -> Iterator[Settings]:
    """Lead free local ports to the platform as `Cluster.forwarded` leads them to a cluster."""

    def command(service: str, local: int, remote: int) -> list[str]:
        return [sys.executable, "-c", RELAY, str(local), str(remote), str(folder / service), str(PIECES[service])]

    def start(service: str, remote: int) -> Forward:
        forward = Forward(service, free_port(), lambda: [(service, remote)], command, notify)
        stack.callback(forward.stop)
        forward.start()
        return forward

    with ExitStack() as stack:
        ports = {service: start(service, remote).port for service, remote in _remote_ports(settings).items()}
        yield forwarded_settings(settings.to_env(), ports)


def test_a_run_goes_on_when_every_forward_drops_in_the_middle_of_it(
    executed: dict[str, Path], platform: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    with _forwards(platform, tmp_path, said.append) as settings:
        for name, value in settings.to_env().items():
            monkeypatch.setenv(name, value)
        execution = notebooks.execute(ROOT / "notebooks" / "06_predict_income.ipynb", tmp_path, {}, lambda _: None)
    assert execution.error == ""
    assert sorted(said) == sorted(f"{name}: the forward to {name} dropped; leading to {name}" for name in SERVICES)
    again, before = (notebooks.read_results(path) for path in (execution.executed, executed["06_predict_income"]))
    assert again["single"] == before["single"]
    assert again["predictions"] == before["predictions"]
