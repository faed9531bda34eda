"""Run pods as their specs say, with runc and a network, without Kubernetes.

Each container is started by runc as its spec says: user, capabilities, read-only root, environment from Secrets and
ConfigMaps, mounts, memory limit; its probes are executed; init containers come first and Jobs run to their end. Each
pod has a network namespace of its own on one bridge; a small proxy in the place of kube-proxy gives each Service an
address, leads it to the ready pods that its selector finds, and refuses what the network policies do not allow.
"""

# ruff: noqa: S607, T201 (it is part of a command of a developer's or CI's machine, whose PATH it trusts)

from __future__ import annotations

import asyncio
import base64
import contextlib
import http.client
import ipaddress
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from seccomp import DEFAULT_PROFILE, runtime_default

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

from manifests import (
    NAMESPACE,
    Manifest,
    allows,
    matches,
    of_kind,
    pod_labels,
    pod_spec,
    quantity_bytes,
    workloads,
)

PODS = ipaddress.ip_network("10.244.7.0/24")
SERVICES = ipaddress.ip_network("10.96.7.0/24")
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
    begun: bool = False
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
        namespace = self.workload["metadata"]["namespace"]
        return pod_labels(self.workload) | {"statefulset.kubernetes.io/pod-name": self.name, NAMESPACE: namespace}

    @property
    def is_job(self) -> bool:
        return bool(self.workload["kind"] == "Job")

    @property
    def begun(self) -> bool:
        return all(container.begun for container in self.containers if not container.init)

    @property
    def ready(self) -> bool:
        return all(container.ready for container in self.containers if not container.init)


def run(*command: str | Path, **options: Any) -> str:
    outcome = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, **options)
    if outcome.returncode:
        raise PodError(f"{' '.join(str(part) for part in command)}: {(outcome.stderr or outcome.stdout).strip()}")
    return outcome.stdout


@dataclass
class Image:
    """The file system of an image, and what its configuration says."""

    root: Path
    entrypoint: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    binds: Mapping[str, Path] = field(default_factory=dict)


def short_name(image_name: str) -> str:
    """Return an image's name without registry and tag."""
    return re.sub(r"[:@].*$", "", image_name).rsplit("/", 1)[-1]


class Cluster:
    """Everything that the manifests describe, on this machine."""

    def __init__(
        self,
        manifests: list[Manifest],
        images: Mapping[str, Image],
        folder: Path,
        *,
        max_restarts: int = 3,
    ) -> None:
        self.images = images
        self.max_restarts = max_restarts
        self.manifests = manifests
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
            container.begun = container.ready = False
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
        ports = [(name, entry, port) for name, entry in self.services.items() for port in entry[0]["spec"]["ports"]]
        servers: dict[tuple[str, int], asyncio.Server] = {}
        while not self.stopping.is_set():
            for name, (service, address), port in ports:
                key = name, port["port"]
                # A Service without a ready pod refuses connections.
                if not self._behind(service, port):
                    if key in servers:
                        servers.pop(key).close()
                elif key not in servers:
                    servers[key] = await asyncio.start_server(self._handler(name, service, port), address, port["port"])
            await asyncio.sleep(0.2)
        for server in servers.values():
            server.close()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    def _behind(self, service: Manifest, port: Mapping[str, Any]) -> list[tuple[Pod, int]]:
        """List the pods that a Service leads to, and their ports."""
        unready = service["spec"].get("publishNotReadyAddresses", False)
        found = [
            (pod, port_number(pod, port.get("targetPort", port["port"])))
            for pod in self.pods
            if matches({"matchLabels": service["spec"]["selector"]}, pod.labels)
            and (pod.ready or unready)
            and not pod.done
        ]
        return [(pod, number) for pod, number in found if number is not None]

    def _handler(self, name: str, service: Manifest, port: Mapping[str, Any]) -> Any:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            source = next((pod for pod in self.pods if pod.address == writer.get_extra_info("peername")[0]), None)
            for pod, number in sorted(self._behind(service, port), key=lambda _: secrets.randbelow(1000)):
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
                reference = {**volume["secret"], "name": volume["secret"]["secretName"]}
                found = self._find("Secret", reference, pod)
                self._project(path, secret_data(found) if found else {}, volume["secret"], group)
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

    def _find(self, kind: str, reference: Mapping[str, Any] | None, pod: Pod) -> Manifest | None:
        """Find what a reference names; nothing where there is none, or where what it names may be missing and is."""
        names = [manifest["metadata"]["name"] for manifest in of_kind(self.manifests, kind)]
        if reference is None or (reference.get("optional") and reference["name"] not in names):
            return None
        return self._object(kind, reference["name"], pod)

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
            _known(source, {"secretRef", "configMapRef"}, pod.name)
            if secret := self._find("Secret", source.get("secretRef"), pod):
                values |= {key: value.decode() for key, value in secret_data(secret).items()}
            if settings := self._find("ConfigMap", source.get("configMapRef"), pod):
                values |= settings["data"]
        for entry in container.spec.get("env", ()):
            if "value" in entry:
                values[entry["name"]] = expand(entry["value"], values)
                continue
            reference = entry["valueFrom"]
            if "fieldRef" in reference:
                if reference["fieldRef"]["fieldPath"] != "metadata.name":
                    raise PodError(f"pod {pod.name}: unknown field {reference['fieldRef']['fieldPath']}")
                values[entry["name"]] = pod.name
                continue
            ((source, named),) = reference.items()
            kind = "ConfigMap" if source == "configMapKeyRef" else "Secret"
            if found := self._find(kind, named, pod):
                data = found["data"] if kind == "ConfigMap" else secret_data(found)
                if named["key"] not in data:
                    raise PodError(
                        f"pod {pod.name} names the key {named['key']} of {named['name']}, which is not there"
                    )
                value = data[named["key"]]
                values[entry["name"]] = value.decode() if isinstance(value, bytes) else value
        return values

    def _start_container(self, container: Container, volumes: Mapping[str, Path]) -> None:
        generation = f"{container.pod.generation}.{container.restarts}"
        container.id = f"{self.id}-{container.pod.name}-{container.name}-{generation}"
        bundle = self.folder / "bundles" / container.id
        for part in ("rootfs", "upper", "work"):
            (bundle / part).mkdir(parents=True)
        layers = f"lowerdir={self._image(container).root},upperdir={bundle / 'upper'},workdir={bundle / 'work'}"
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
        mounts = [
            _mount("/proc", "proc", "proc"),
            _mount("/dev", "tmpfs", "tmpfs", "nosuid", "strictatime", "mode=755", "size=65536k"),
            _mount("/dev/pts", "devpts", "devpts", "nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"),
            _mount("/dev/shm", "tmpfs", "shm", "nosuid", "noexec", "nodev", "mode=1777", "size=65536k"),  # noqa: S108
            _mount("/sys", "sysfs", "sysfs", "nosuid", "noexec", "nodev", "ro"),
            _mount("/etc/hosts", "bind", str(hosts), "rbind", "ro"),
        ]
        for entry in spec.get("volumeMounts", ()):
            _known(entry, {"name", "mountPath", "readOnly"}, pod.name)
            if entry["name"] not in volumes:
                raise PodError(f"pod {pod.name}: no volume is called {entry['name']}")
            mode = "ro" if entry.get("readOnly") else "rw"
            mounts.append(_mount(entry["mountPath"], "bind", str(volumes[entry["name"]]), "rbind", mode))
        # Behind the volumes, since what stands in for an image may lie where a pod mounts its /tmp.
        mounts += [_mount(target, "bind", str(path), "rbind", "ro") for target, path in image.binds.items()]
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
        name = short_name(container.spec["image"])
        if name not in self.images:
            raise PodError(f"nothing here stands in for the image {name}")
        return self.images[name]

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
        container.begun, restarts = "startupProbe" not in container.spec, 0
        stopping = container.pod.stopping
        while not (self.stopping.is_set() or stopping.wait(0.1)):
            self._record_peak(container)
            if container.restarts != restarts:
                container.begun, restarts = "startupProbe" not in container.spec, container.restarts
            if not container.process or container.process.poll() is not None:
                continue
            if container.begun and "readinessProbe" not in container.spec:
                self._mark_ready(container)
            for kind in ("readinessProbe", "livenessProbe") if container.begun else ("startupProbe",):
                probe = container.spec.get(kind)
                if not probe or time.monotonic() < due[kind]:
                    continue
                due[kind] = time.monotonic() + probe.get("periodSeconds", 10)
                reason = container.last_probe = self._ask(container, probe)
                if stopping.is_set():
                    return
                failures[kind] = failures[kind] + 1 if reason else 0
                if not reason:
                    container.begun = container.begun or kind == "startupProbe"
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


def secret_data(secret: Manifest) -> dict[str, bytes]:
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
