"""A stand-in for a cluster's API server: keeps what is applied, and answers what a test wants of the pods.

It knows the part of the API that kubectl and our client use here, and none of the rules of a real server.
"""

from __future__ import annotations

import json
import re
import socket
import struct
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

import pytest
import yaml

from mlplatform_ops.cluster.forwards import local_port
from mlplatform_ops.ports import free_port

# Kind, plural and group version of everything that the manifests hold, and what the client lists beside it.
KINDS = (
    ("Namespace", "namespaces", "v1", False),
    ("ConfigMap", "configmaps", "v1", True),
    ("Secret", "secrets", "v1", True),
    ("Service", "services", "v1", True),
    ("PersistentVolumeClaim", "persistentvolumeclaims", "v1", True),
    ("Pod", "pods", "v1", True),
    ("Event", "events", "v1", True),
    ("Deployment", "deployments", "apps/v1", True),
    ("ReplicaSet", "replicasets", "apps/v1", True),
    ("StatefulSet", "statefulsets", "apps/v1", True),
    ("Job", "jobs", "batch/v1", True),
    ("CronJob", "cronjobs", "batch/v1", True),
    ("NetworkPolicy", "networkpolicies", "networking.k8s.io/v1", True),
    ("Ingress", "ingresses", "networking.k8s.io/v1", True),
    ("PodDisruptionBudget", "poddisruptionbudgets", "policy/v1", True),
)
VERSION = {
    "major": "1", "minor": "37", "gitVersion": "v1.37.0", "gitCommit": "0", "gitTreeState": "clean",
    "buildDate": "2026-09-01T00:00:00Z", "goVersion": "go1.26", "compiler": "gc", "platform": "linux/amd64",
}  # fmt: skip
Objects = dict[tuple[str, str], dict[str, Any]]


class FakeCluster:
    """What the server keeps, and how its pods are to behave.

    Attributes:
        objects: Everything applied, by plural and name.
        requests: Each request that changed something: method, path and content type.
        waiting: Why the pods of a workload do not run, by the workload's name.
        refused: Why a workload gets no pods, by its name.
        unavailable: Workloads whose pods are ready, and not yet for as long as the specification wants.
        failures: Statuses with which the next lists of pods are answered.
        pods: Names of pods that stand for a workload, by the workload's name; one called `<name>-0` by default.
        backends: The local port that a forward to a pod leads to, by the pod's name.
        drops: After how many pieces of data the first forward to a pod is cut, by the pod's name.
    """

    def __init__(self) -> None:
        self.objects: Objects = {}
        self.requests: list[tuple[str, str, str]] = []
        self.waiting: dict[str, str] = {}
        self.refused: dict[str, str] = {}
        self.unavailable: set[str] = set()
        self.failures: list[int] = []
        self.pods: dict[str, list[str]] = {}
        self.backends: dict[str, int] = {}
        self.drops: dict[str, int] = {}

    def list_items(self, plural: str) -> list[dict[str, Any]]:
        if plural == "pods":
            return [pod for workload in self._workloads() for pod in self._pods_of(workload)]
        if plural == "events":
            pods = [pod for name in self.waiting for pod in self.pods.get(name, [f"{name}-0"])]
            events = [(pod, "Failed", "0/1 nodes hold the image") for pod in pods]
            events += [(name, "FailedCreate", why) for name, why in self.refused.items()]
            return [
                {"metadata": {"name": "e"}, "involvedObject": {"name": name}, "reason": reason, "message": message}
                for name, reason, message in events
            ]
        items = [item for (kind, _), item in self.objects.items() if kind == plural]
        return [self._with_status(item) for item in items]

    def _workloads(self) -> list[dict[str, Any]]:
        kinds = {"deployments", "statefulsets", "jobs"}
        return [item for (kind, _), item in self.objects.items() if kind in kinds]

    def _pods_of(self, workload: dict[str, Any]) -> list[dict[str, Any]]:
        name = workload["metadata"]["name"]
        template = workload["spec"]["template"]
        reason = self.waiting.get(name)
        state = {"waiting": {"reason": reason, "message": "as the test wants"}} if reason else {"running": {}}
        return [
            {
                "kind": "Pod",
                "apiVersion": "v1",
                "metadata": {"name": pod, "namespace": "mlplatform", "labels": template["metadata"]["labels"]},
                "spec": template["spec"],
                "status": {
                    "phase": "Running",
                    "conditions": [{"type": "Ready", "status": "False" if reason else "True"}],
                    "containerStatuses": [
                        {
                            "name": entry["name"], "ready": not reason, "restartCount": 3 if reason else 0,
                            "state": state, "image": entry["image"], "imageID": "",
                        }
                        for entry in template["spec"]["containers"]
                    ],
                },
            }
            for pod in self.pods.get(name, [] if name in self.refused else [f"{name}-0"])
        ]  # fmt: skip

    def _with_status(self, item: dict[str, Any]) -> dict[str, Any]:
        ready = item["metadata"]["name"] not in {*self.waiting, *self.refused}
        metadata = item["metadata"] | {"generation": 1}
        count = item.get("spec", {}).get("replicas", 1)
        if item["kind"] == "Job":
            return item | {"status": {"succeeded": int(ready)}}
        if item["kind"] in {"Deployment", "StatefulSet"}:
            status = {"observedGeneration": 1, "replicas": count, "updatedReplicas": count}
            available = count if ready and item["metadata"]["name"] not in self.unavailable else 0
            status |= {"readyReplicas": count if ready else 0, "availableReplicas": available}
            # As a real server fills in for a StatefulSet.
            spec = {"updateStrategy": {"type": "RollingUpdate"}} | item["spec"]
            return item | {"metadata": metadata, "spec": spec, "status": status}
        return item


class _Handler(BaseHTTPRequestHandler):
    cluster: FakeCluster
    # Or each answer's body waits 40 ms for the client to acknowledge its headers.
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, body: Any, status: int = 200) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain" if isinstance(body, bytes) else "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _missing(self) -> None:
        self._answer({"kind": "Status", "status": "Failure", "reason": "NotFound", "code": 404, "message": "none"}, 404)

    def _resource(self) -> tuple[str, str, str]:
        """Split a path into plural, name and subresource."""
        found = re.match(r"^/apis?/.*?v1/(?:namespaces/[^/]+/(?=\w))?(\w+)(?:/([^/]+))?(?:/(\w+))?$", self._path())
        return (found[1], found[2] or "", found[3] or "") if found else ("", "", "")

    def _path(self) -> str:
        return urlparse(self.path).path.rstrip("/")

    def _kind(self, plural: str) -> tuple[str, str]:
        return next((kind, version) for kind, name, version, _ in KINDS if name == plural)

    def do_GET(self) -> None:
        path = self._path()
        groups = sorted({version.split("/")[0] for _, _, version, _ in KINDS if "/" in version})
        if path == "/version":
            self._answer(VERSION)
        elif path == "/api":
            self._answer({"kind": "APIVersions", "versions": ["v1"]})
        elif path == "/apis":
            versions = [{"groupVersion": f"{group}/v1", "version": "v1"} for group in groups]
            entries = [
                {"name": group, "versions": [version], "preferredVersion": version}
                for group, version in zip(groups, versions, strict=True)
            ]
            self._answer({"kind": "APIGroupList", "apiVersion": "v1", "groups": entries})
        elif re.fullmatch(r"/api/v1|/apis/[^/]+/v1", path):
            version = path.removeprefix("/apis/").removeprefix("/api/")
            verbs = ["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"]
            resources = [
                {"name": plural, "singularName": kind.lower(), "namespaced": spaced, "kind": kind, "verbs": verbs}
                for kind, plural, known, spaced in KINDS
                if known == version
            ]
            self._answer({"kind": "APIResourceList", "groupVersion": version, "resources": resources})
        else:
            self._get_resource()

    def _get_resource(self) -> None:
        plural, name, sub = self._resource()
        pods = {pod["metadata"]["name"]: pod for pod in self.cluster.list_items("pods")} if plural == "pods" else {}
        if sub == "log":
            self._answer(b"starting\nno such table: experiments\n")
        elif sub == "portforward":
            # kubectl asks for a WebSocket first, and for SPDY when a server knows none.
            self._answer({"kind": "Status", "status": "Failure", "code": 400, "message": "no WebSockets here"}, 400)
        elif name in pods:
            self._answer(pods[name])
        elif name and (plural, name) in self.cluster.objects:
            self._answer(self.cluster.objects[plural, name])
        elif name or not plural:
            self._missing()
        elif "watch" in parse_qs(urlparse(self.path).query):
            # It says nothing of changes; kubectl then asks for a list again.
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            if plural == "pods" and self.cluster.failures:
                code = self.cluster.failures.pop(0)
                self._answer({"kind": "Status", "status": "Failure", "code": code, "message": "not now"}, code)
                return
            kind, version = self._kind(plural)
            labels, fields = (self._pairs(name) for name in ("labelSelector", "fieldSelector"))
            items = [
                item
                for item in self.cluster.list_items(plural)
                if all(item["metadata"].get("labels", {}).get(key) == value for key, value in labels)
                and all(_field(item, key) == value for key, value in fields)
            ]
            self._answer({"kind": f"{kind}List", "apiVersion": version, "metadata": {}, "items": items})

    def _pairs(self, selector: str) -> list[list[str]]:
        wanted = parse_qs(urlparse(self.path).query).get(selector, [""])[0]
        return [pair.split("=", 1) for pair in wanted.split(",") if pair]

    def do_PATCH(self) -> None:
        plural, name, _ = self._resource()
        kind = self.headers["Content-Type"]
        body = yaml.safe_load(self.rfile.read(int(self.headers["Content-Length"])))
        self.cluster.requests.append(("PATCH", self._path(), kind))
        self.cluster.objects[plural, name] = body
        body["metadata"]["uid"] = f"{plural}-{name}"
        self._answer(body)

    def do_POST(self) -> None:
        _, name, sub = self._resource()
        if sub != "portforward" or name not in self.cluster.backends:
            self._missing()
            return
        self.send_response(101)
        for header, value in (("Connection", "Upgrade"), ("Upgrade", "SPDY/3.1")):
            self.send_header(header, value)
        self.send_header("X-Stream-Protocol-Version", "portforward.k8s.io")
        self.end_headers()
        self.close_connection = True
        _Forwarding(self, name).serve()

    def do_DELETE(self) -> None:
        plural, name, _ = self._resource()
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if (plural, name) not in self.cluster.objects:
            self._missing()
            return
        self.cluster.requests.append(("DELETE", self._path(), ""))
        self._answer(self.cluster.objects.pop((plural, name)))


def _field(item: Any, path: str) -> Any:
    for part in path.split("."):
        item = item.get(part, {})
    return item


class _Forwarding:
    """The server's side of `kubectl port-forward`: as much of SPDY/3.1 as that speaks.

    Each forwarded connection is a pair of streams. What they are is said in headers whose compression wants SPDY's
    dictionary; here the one that the client closes without a word is taken for the stream of errors, the other for
    the data's, whose client must speak first.
    """

    SYN_STREAM, SYN_REPLY, RST_STREAM, PING = 1, 2, 3, 6
    FIN = 1

    def __init__(self, handler: _Handler, pod: str) -> None:
        self._cluster, self._pod = handler.cluster, pod
        self._client, self._frames = handler.connection, handler.rfile
        self._sending = threading.Lock()
        self._headers = zlib.compressobj()
        self._streams: dict[int, socket.socket] = {}

    def serve(self) -> None:
        try:
            while len(head := self._frames.read(8)) == 8:
                word, tail = struct.unpack(">II", head)
                flags, body = tail >> 24, self._frames.read(tail & 0xFFFFFF)
                if not word >> 31:
                    self._take(word, body, last=bool(flags & self.FIN))
                elif word & 0xFFFF == self.SYN_STREAM:
                    self._accept(body[:4])
                elif word & 0xFFFF == self.PING:
                    self._control(self.PING, body)
                elif word & 0xFFFF == self.RST_STREAM:
                    self._close(struct.unpack(">I", body[:4])[0])
        except OSError:
            pass
        finally:
            for stream in list(self._streams):
                self._close(stream)

    def _accept(self, stream: bytes) -> None:
        with self._sending:
            none = self._headers.compress(struct.pack(">I", 0)) + self._headers.flush(zlib.Z_SYNC_FLUSH)
            self._client.sendall(self._frame(0x80030000 | self.SYN_REPLY, stream + none))

    def _take(self, stream: int, body: bytes, *, last: bool) -> None:
        if stream not in self._streams:
            if last and not body:
                self._data(stream, b"", self.FIN)
                return
            backend = socket.create_connection(("127.0.0.1", self._cluster.backends[self._pod]))
            self._streams[stream] = backend
            threading.Thread(target=self._give, args=(stream, backend), daemon=True).start()
        left = self._cluster.drops.get(self._pod, 0)
        if left == 1:
            self._client.shutdown(socket.SHUT_RDWR)
        self._cluster.drops[self._pod] = max(0, left - 1)
        if left == 1:
            return
        self._streams[stream].sendall(body)
        if last:
            self._streams[stream].shutdown(socket.SHUT_WR)

    def _give(self, stream: int, backend: socket.socket) -> None:
        try:
            while body := backend.recv(65536):
                self._data(stream, body)
            self._data(stream, b"", self.FIN)
        except OSError:
            pass

    def _close(self, stream: int) -> None:
        if backend := self._streams.pop(stream, None):
            # Closed alone, it stays open for as long as `_give` waits in `recv`, and the backend waits with it.
            with suppress(OSError):
                backend.shutdown(socket.SHUT_RDWR)
            backend.close()

    def _control(self, kind: int, body: bytes) -> None:
        with self._sending:
            self._client.sendall(self._frame(0x80030000 | kind, body))

    def _data(self, stream: int, body: bytes, flags: int = 0) -> None:
        with self._sending:
            self._client.sendall(self._frame(stream, body, flags))

    @staticmethod
    def _frame(word: int, body: bytes, flags: int = 0) -> bytes:
        return struct.pack(">II", word, flags << 24 | len(body)) + body


@contextmanager
def serve(folder: Path, *, context: str = "kind-test") -> Iterator[tuple[FakeCluster, Path]]:
    """Run the server; yield what it keeps, and a kubeconfig whose current context leads to it."""
    cluster = FakeCluster()
    handler = type("Handler", (_Handler,), {"cluster": cluster, "protocol_version": "HTTP/1.1"})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield cluster, write_kubeconfig(folder / "kubeconfig", f"http://127.0.0.1:{server.server_port}", context)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def use(kubeconfig: Path, patch: pytest.MonkeyPatch) -> None:
    """Have kubectl and the official client read this kubeconfig and no other."""
    patch.setenv("KUBECONFIG", str(kubeconfig))
    patch.setenv("HOME", str(kubeconfig.parent))
    # The client reads the variable when it is imported.
    patch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(kubeconfig))
    # The stand-in publishes no schema to validate against; that is done when the manifests are tested.
    patch.setattr("mlplatform_ops.cluster.cluster.VALIDATION", "--validate=false")
    # Another process of the tests may take a service's usual port between the choice and kubectl's start.
    patch.setattr(
        "mlplatform_ops.cluster.cluster.local_port",
        lambda service, port, *wanted: local_port(service, free_port(), *wanted),
    )


def write_kubeconfig(path: Path, server: str, context: str, *, cluster: str = "c", current: bool = True) -> Path:
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": context if current else "",
        "clusters": [{"name": cluster, "cluster": {"server": server}}],
        "users": [{"name": "u", "user": {"token": "t"}}],
        "contexts": [{"name": context, "context": {"cluster": cluster, "user": "u"}}],
    }
    path.write_text(yaml.safe_dump(config))
    return path
