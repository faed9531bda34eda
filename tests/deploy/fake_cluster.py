"""A stand-in for a cluster's API server: keeps what is applied, and answers what a test wants of the pods.

It knows the part of the API that kubectl and our client use here, and none of the rules of a real server.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

import yaml

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
    ("StatefulSet", "statefulsets", "apps/v1", True),
    ("Job", "jobs", "batch/v1", True),
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
        pods: Names of pods that stand for a workload, by the workload's name; one called `<name>-0` by default.
    """

    def __init__(self) -> None:
        self.objects: Objects = {}
        self.requests: list[tuple[str, str, str]] = []
        self.waiting: dict[str, str] = {}
        self.pods: dict[str, list[str]] = {}

    def list_items(self, plural: str) -> list[dict[str, Any]]:
        if plural == "pods":
            return [pod for workload in self._workloads() for pod in self._pods_of(workload)]
        if plural == "events":
            message = "0/1 nodes hold the image"
            return [{"metadata": {"name": "e"}, "involvedObject": {}, "reason": "Failed", "message": message}]
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
                "metadata": {"name": pod, "namespace": "mlplatform", "labels": template["metadata"]["labels"]},
                "spec": template["spec"],
                "status": {
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
            for pod in self.pods.get(name, [f"{name}-0"])
        ]  # fmt: skip

    def _with_status(self, item: dict[str, Any]) -> dict[str, Any]:
        ready = item["metadata"]["name"] not in self.waiting
        metadata = item["metadata"] | {"generation": 1}
        count = item.get("spec", {}).get("replicas", 1)
        if item["kind"] == "Job":
            return item | {"status": {"succeeded": int(ready)}}
        if item["kind"] in {"Deployment", "StatefulSet"}:
            status = {"observedGeneration": 1, "replicas": count, "updatedReplicas": count}
            return item | {"metadata": metadata, "status": status | {"readyReplicas": count if ready else 0}}
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
        if sub == "log":
            self._answer(b"starting\nno such table: experiments\n")
        elif name and (plural, name) in self.cluster.objects:
            self._answer(self.cluster.objects[plural, name])
        elif name or not plural:
            self._missing()
        else:
            kind, version = self._kind(plural)
            wanted = parse_qs(urlparse(self.path).query).get("labelSelector", [""])[0]
            pairs = [pair.split("=", 1) for pair in wanted.split(",") if pair]
            items = [
                item
                for item in self.cluster.list_items(plural)
                if all(item["metadata"].get("labels", {}).get(key) == value for key, value in pairs)
            ]
            self._answer({"kind": f"{kind}List", "apiVersion": version, "metadata": {}, "items": items})

    def do_PATCH(self) -> None:
        plural, name, _ = self._resource()
        kind = self.headers["Content-Type"]
        body = yaml.safe_load(self.rfile.read(int(self.headers["Content-Length"])))
        self.cluster.requests.append(("PATCH", self._path(), kind))
        self.cluster.objects[plural, name] = body
        body["metadata"]["uid"] = f"{plural}-{name}"
        self._answer(body)

    def do_DELETE(self) -> None:
        plural, name, _ = self._resource()
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if (plural, name) not in self.cluster.objects:
            self._missing()
            return
        self.cluster.requests.append(("DELETE", self._path(), ""))
        self._answer(self.cluster.objects.pop((plural, name)))


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


def write_kubeconfig(path: Path, server: str, context: str) -> Path:
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": context,
        "clusters": [{"name": "c", "cluster": {"server": server}}],
        "users": [{"name": "u", "user": {"token": "t"}}],
        "contexts": [{"name": context, "context": {"cluster": "c", "user": "u"}}],
    }
    path.write_text(yaml.safe_dump(config))
    return path
