"""Ask what runs in a pod, over HTTP."""

from __future__ import annotations

import base64
import http.client
import json
from collections.abc import Mapping
from typing import Any

from manifests import of_kind

from pods import Cluster, Pod, PodError, secret_data


def ask(
    address: str, port: int, path: str, body: Mapping[str, Any] | None = None, headers: Mapping[str, str] | None = None
) -> tuple[int, str]:
    """Send one request, with a body as JSON by POST, and give the answer's status and text.

    Raises:
        OSError: Nobody answers.
        http.client.HTTPException: The connection ends without an answer.
    """
    connection = http.client.HTTPConnection(address, port, timeout=30)
    try:
        given = {"Content-Type": "application/json", **(headers or {})}
        connection.request("GET" if body is None else "POST", path, None if body is None else json.dumps(body), given)
        response = connection.getresponse()
        return response.status, response.read().decode(errors="replace")
    finally:
        connection.close()


def read_secret(cluster: Cluster, name: str) -> dict[str, str]:
    """Read a Secret."""
    found = next(entry for entry in of_kind(cluster.manifests, "Secret") if entry["metadata"]["name"] == name)
    return {key: value.decode() for key, value in secret_data(found).items()}


def mlflow(cluster: Cluster, pod: Pod, call: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Ask one MLflow server, as the admin."""
    login = read_secret(cluster, "platform-client")
    credentials = f"{login['MLFLOW_TRACKING_USERNAME']}:{login['MLFLOW_TRACKING_PASSWORD']}".encode()
    headers = {"Authorization": "Basic " + base64.b64encode(credentials).decode(), "Host": "mlflow:5000"}
    status, said = ask(pod.address, 5000, f"/api/2.0/mlflow/{call}", body, headers)
    if status != 200:
        raise PodError(f"{pod.name}: {call}: status {status}: {said[:300]}")
    return dict(json.loads(said))
