"""The platform on a Kubernetes cluster, from this machine: put it there, watch it, reach it, take it away.

Rendering and applying is kubectl's work, which comes as a wheel; asking, waiting and explaining is done with the
official client. No context is used without its name being shown, and one that looks like production only after a
confirmation.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from mlplatform.cluster_secrets import FOLDER, VALUES, read_env, read_kustomization, wanted_files, write_secrets
from mlplatform.embedded import free_port, is_free
from mlplatform.errors import ClusterError, PlatformError, PortTakenError
from mlplatform.settings import Settings

Notify = Callable[[str], None]
Confirm = Callable[[str], bool]
Manifest = dict[str, Any]
# Finds the running pods behind a service: name, port, and whether it is ready.
Target = Callable[[], list[tuple[str, int, bool]]]
PART_OF = "app.kubernetes.io/part-of=mlplatform"
FIELD_MANAGER = "mlplatform"
VALIDATION = "--validate=strict"
TIMEOUT_S = 900.0
# How long a reason that seldom passes by itself is given before we stop waiting, and how many times that.
PATIENCE_S = 60.0
HOPELESS = {
    "CrashLoopBackOff": 1,
    "CreateContainerConfigError": 1,
    "CreateContainerError": 1,
    "ErrImageNeverPull": 1,
    "ErrImagePull": 1,
    "FailedCreate": 1,
    "ImagePullBackOff": 1,
    "InvalidImageName": 1,
    # A node or a volume may be on its way.
    "Unschedulable": 5,
}
# Connecting, and an answer; without them a network that swallows packets holds a request for a quarter of an hour.
REQUEST_TIMEOUT_S = (5, 30)
# Port of each service that a client on this machine uses, and the variable that sets its local port.
SERVICES = {
    "minio-service": (9000, "MLPLATFORM_S3_PORT"),
    "redis": (6379, "MLPLATFORM_REDIS_PORT"),
    "mlflow": (5000, "MLPLATFORM_MLFLOW_PORT"),
    "feature-server": (6566, "MLPLATFORM_FEATURE_SERVER_PORT"),
}
_PRODUCTION = re.compile(r"(?<![a-z])(prod|prd|production|live)(?![a-z])", re.IGNORECASE)
_KINDS = "deployments,statefulsets,jobs,services,configmaps,secrets,networkpolicies,poddisruptionbudgets,ingresses"


@dataclass(frozen=True)
class Workload:
    """What one Deployment, StatefulSet or Job has reached.

    Attributes:
        kind: The object's kind.
        name: The object's name.
        ready: Pods that are ready, or for a Job, done.
        wanted: Pods that are asked for.
        done: Whether the current specification is what runs, and all of it.
        reason: Why not, in a word or two; empty when there is none.
        restarts: How often containers of its pods were restarted.
        failed: Whether it will never be done.
    """

    kind: str
    name: str
    ready: int
    wanted: int
    done: bool
    reason: str = ""
    restarts: int = 0
    failed: bool = False


@dataclass(frozen=True)
class Context:
    """A context of the kubeconfig: its name, its cluster's and its user's names, and the cluster's address."""

    name: str
    cluster: str
    user: str
    server: str


class Cluster:
    """One namespace of one cluster.

    Args:
        overlay: The overlay's folder, such as `deploy/overlays/local`.
        context: A context of the kubeconfig; the current one by default.
        yes: Whether questions are answered with yes.
        confirm: Asks a question; the default answers no, as there is nobody to ask.
        notify: Called with a line for each step worth showing.

    Raises:
        ClusterError: There is no such overlay, no kubeconfig or no such context in it, it looks like production and
            was not confirmed, or the cluster does not answer.
    """

    def __init__(
        self,
        overlay: Path,
        *,
        context: str | None = None,
        yes: bool = False,
        confirm: Confirm = lambda _: False,
        notify: Notify = lambda _: None,
    ) -> None:
        self.overlay = overlay
        self._yes = yes
        self._confirm = confirm
        self._notify = notify
        self.namespace = _namespace(overlay)
        found = find_context(context)
        self.context = found.name
        notify(f"context {found.name} (cluster {found.cluster}, {found.server}), namespace {self.namespace}")
        if looks_like_production(found.name, found.cluster, found.user, found.server) and not self._agrees(
            f"{found.name} looks like production. Go on?"
        ):
            raise ClusterError(
                f"the context {found.name} looks like production; name another with --context, or add --yes"
            )
        self._client = _client(found)

    def up(self, *, timeout_s: float = TIMEOUT_S, patience_s: float = PATIENCE_S) -> None:
        """Make secrets that are missing, apply the overlay, wait until everything runs.

        Raises:
            ClusterError: It can't be rendered or applied, the cluster's secrets are not here, or a workload does not
                come up; the message names pod and reason, after its last events and log lines were shown.
        """
        self._check_secrets()
        write_secrets(self.overlay, notify=self._notify)
        manifests = render(self.overlay)
        self._delete_jobs(manifests)
        self._notify(f"applying {len(manifests)} objects")
        options = ("--server-side", f"--field-manager={FIELD_MANAGER}", VALIDATION)
        for line in self._kubectl("apply", *options, "-f", "-", stdin=manifests):
            if not line.endswith((" unchanged", " serverside-applied")):
                self._notify(line)
        self.wait(_workload_names(manifests), timeout_s=timeout_s, patience_s=patience_s)

    def wait(self, names: Collection[tuple[str, str]], *, timeout_s: float, patience_s: float = PATIENCE_S) -> None:
        """Wait until workloads run as specified, showing what changes.

        Raises:
            ClusterError: One does not.
        """
        deadline = time.monotonic() + timeout_s
        finished: set[tuple[str, str]] = set()
        shown: dict[str, str] = {}
        troubles: dict[str, tuple[float, float]] = {}
        while True:
            now = time.monotonic()
            try:
                found = {(workload.kind, workload.name): workload for workload in self.workloads()}
            except _AwayError as error:
                if now > deadline:
                    raise
                self._notify(str(error))
                time.sleep(1)
                continue
            # The cluster deletes a Job some time after its end, which may come before the others are up.
            finished |= {name for name, workload in found.items() if name[0] == "Job" and workload.done}
            unfinished = [name for name in names if name not in finished]
            waiting = [found.get(name) or Workload(*name, 0, 1, False, "not there") for name in unfinished]
            waiting = [workload for workload in waiting if not workload.done]
            for workload in found.values():
                line = describe(workload)
                if (workload.kind, workload.name) in names and shown.get(workload.name) != line:
                    shown[workload.name] = line
                    self._notify(line)
            if not waiting:
                return
            overdue = [workload for workload in waiting if _is_overdue(workload, troubles, now, patience_s)]
            if overdue or now > deadline:
                self._give_up(overdue or waiting)
            time.sleep(1)

    def workloads(self) -> list[Workload]:
        """Ask for every workload of the platform.

        Raises:
            ClusterError: The cluster does not answer, or refuses.
        """
        apps, batch, core = (_api(self._client, kind) for kind in ("AppsV1Api", "BatchV1Api", "CoreV1Api"))
        with _translated(self.context):
            pods = core.list_namespaced_pod(self.namespace, label_selector=PART_OF).items
            replica_sets = apps.list_namespaced_replica_set(self.namespace, label_selector=PART_OF).items
            sets = [
                ("Deployment", apps.list_namespaced_deployment(self.namespace, label_selector=PART_OF).items),
                ("StatefulSet", apps.list_namespaced_stateful_set(self.namespace, label_selector=PART_OF).items),
                ("Job", batch.list_namespaced_job(self.namespace, label_selector=PART_OF).items),
            ]
        found = [workload_of(kind, item, pods, replica_sets) for kind, items in sets for item in items]
        return [entry if entry.done or entry.reason else self._explained(entry) for entry in found]

    def _explained(self, workload: Workload) -> Workload:
        """Add why no pod of a workload was made, which only its events tell: a quota, or an admission that refuses."""
        events = self._events(workload.name, "FailedCreate")
        return replace(workload, reason=f"FailedCreate: {events[-1].message}"[:300]) if events else workload

    def _events(self, name: str, reason: str = "") -> list[Any]:
        selector = f"involvedObject.name={name}" + (f",reason={reason}" if reason else "")
        with _translated(self.context):
            core = _api(self._client, "CoreV1Api")
            events = core.list_namespaced_event(self.namespace, field_selector=selector).items
        return sorted(events, key=lambda event: str(event.last_timestamp or event.event_time or ""))

    def down(self, *, delete_data: bool | None = None) -> None:
        """Remove the platform; keep its volumes and namespace unless their deletion is confirmed.

        Args:
            delete_data: Whether to delete the data too; asks when not said.

        Raises:
            ClusterError: The cluster does not answer, or refuses.
        """
        for line in self._kubectl(
            "delete", _KINDS, "-n", self.namespace, "-l", PART_OF, "--ignore-not-found", "--wait"
        ):
            self._notify(line)
        if delete_data is None:
            # `--yes` answers for the context, not for the data.
            delete_data = self._confirm(
                f"Delete every volume of {self.namespace} on {self.context}, with all data in them?"
            )
        if delete_data:
            for line in self._kubectl("delete", "namespace", self.namespace, "--ignore-not-found", "--wait"):
                self._notify(line)
        else:
            self._notify(f"kept the namespace {self.namespace} and its volumes; 'make k8s-up' finds them again")

    @contextmanager
    def forwarded(self, environ: Mapping[str, str]) -> Iterator[Settings]:
        """Reach the platform's services on ports of this machine, for as long as the block runs.

        A forward whose pod ends is led to another one, on the same local port.

        Args:
            environ: Where local ports that the user set are looked up; others are free ones.

        Yields:
            The platform's settings, with the credentials of the overlay's secret files.

        Raises:
            ClusterError: A secret file is missing, or a service has no ready pod.
            PortTakenError: A local port that was asked for is in use.
        """
        client_secrets = read_env(self.overlay / FOLDER / "client.env")
        forwards: dict[str, Forward] = {}
        try:
            for service in self._services():
                port, variable = SERVICES[service]
                local = _local_port(service, port, environ.get(variable), variable)
                forwards[service] = Forward(
                    service, local, self._target(service, port), self._forward_command, self._notify
                )
            for forward in forwards.values():
                forward.start()
            yield forwarded_settings(client_secrets, {name: forward.port for name, forward in forwards.items()})
        finally:
            for forward in forwards.values():
                forward.stop()

    def _services(self) -> list[str]:
        with _translated(self.context):
            core = _api(self._client, "CoreV1Api")
            found = core.list_namespaced_service(self.namespace, label_selector=PART_OF).items
        names = [name for name in SERVICES if name in {service.metadata.name for service in found}]
        if not {"minio-service", "redis", "mlflow"} <= set(names):
            raise ClusterError(
                f"the platform is not in the namespace {self.namespace} of {self.context}; run 'make k8s-up'"
            )
        return names

    def _target(self, service: str, port: int) -> Target:
        """Make a function that finds the running pods behind a service."""

        def find() -> list[tuple[str, int, bool]]:
            core = _api(self._client, "CoreV1Api")
            with _translated(self.context):
                spec = core.read_namespaced_service(service, self.namespace).spec
                selector = ",".join(f"{key}={value}" for key, value in spec.selector.items())
                pods = core.list_namespaced_pod(self.namespace, label_selector=selector).items
            target = next(entry.target_port for entry in spec.ports if entry.port == port)
            running = [pod for pod in pods if pod.status.phase == "Running" and not pod.metadata.deletion_timestamp]
            numbers = [target if isinstance(target, int) else _named_port(pod, target) for pod in running]
            return sorted(
                (str(pod.metadata.name), number, _is_ready(pod)) for pod, number in zip(running, numbers, strict=True)
            )

        return find

    def _forward_command(self, pod: str, local: int, remote: int) -> list[str]:
        return [
            *_kubectl_command(self.context), "port-forward", "--namespace", self.namespace, "--address", "127.0.0.1",
            f"pod/{pod}", f"{local}:{remote}",
        ]  # fmt: skip

    def _check_secrets(self) -> None:
        """Refuse to make secrets for a platform that has some: new ones would lock everybody out of its data."""
        values = self.overlay / FOLDER / VALUES
        if values.exists():
            return
        with _translated(self.context):
            core = _api(self._client, "CoreV1Api")
            claims = core.list_namespaced_persistent_volume_claim(self.namespace).items
        if claims:
            raise ClusterError(
                f"{self.context} holds data of this platform, and the secrets that it was made with are not here; put "
                f"{values} back, from where your team keeps it, or delete the data: make k8s-down DATA=delete"
            )

    def _delete_jobs(self, manifests: list[Manifest]) -> None:
        """Delete Jobs of an earlier run and their pods: a Job's template can't be changed, and it is to run again."""
        names = [name for kind, name in _workload_names(manifests) if kind == "Job"]
        if names:
            self._kubectl("delete", "job", *names, "-n", self.namespace, "--ignore-not-found", "--cascade=foreground")

    def _give_up(self, workloads: list[Workload]) -> None:
        """Show what is known of workloads that do not come up, and raise."""
        core = _api(self._client, "CoreV1Api")
        with _translated(self.context):
            pods = core.list_namespaced_pod(self.namespace, label_selector=PART_OF).items
        # One that only waits for another has no reason of its own.
        first, *others = sorted(workloads, key=lambda workload: not workload.reason)
        for workload in [first, *(other for other in others if other.reason)]:
            pod = _pod_to_blame(pods, workload)
            name = str(pod.metadata.name) if pod else workload.name
            self._notify(f"{'pod' if pod else workload.kind} {name}:")
            for event in self._events(name)[-5:]:
                self._notify(f"  event {event.reason}: {event.message}")
            for line in self._log_tail(core, pod) if pod else ():
                self._notify(f"  log   {line}")
        pod = _pod_to_blame(pods, first)
        kind, name = ("pod", pod.metadata.name) if pod else (first.kind.lower(), first.name)
        reason = first.reason or f"{first.ready} of {first.wanted} ready"
        also = f" (nor do {', '.join(other.name for other in others)})" if others else ""
        raise ClusterError(
            f"{kind} {name} does not come up: {reason}{also}; see "
            f"'kubectl --context {self.context} -n {self.namespace} describe {kind} {name}'"
        )

    def _log_tail(self, core: Any, pod: Any) -> list[str]:
        from kubernetes.client.exceptions import ApiException

        container = _unready_container(pod)
        for previous in (False, True):
            try:
                text = core.read_namespaced_pod_log(
                    pod.metadata.name, self.namespace, container=container, tail_lines=10, previous=previous
                )
            except ApiException:
                continue
            if text:
                return [line[:300] for line in str(text).splitlines()]
        return []

    def _kubectl(self, *arguments: str, stdin: list[Manifest] | None = None) -> list[str]:
        outcome = subprocess.run(
            [*_kubectl_command(self.context), *arguments],
            input=yaml.safe_dump_all(stdin) if stdin is not None else None,
            capture_output=True,
            text=True,
            check=False,
        )
        if outcome.returncode:
            reason = " ".join(outcome.stderr.split())[:500] or f"exit status {outcome.returncode}"
            raise ClusterError(f"kubectl {arguments[0]} on {self.context} failed: {reason}")
        return outcome.stdout.splitlines()

    def _agrees(self, question: str) -> bool:
        return self._yes or self._confirm(question)


class Forward:
    """One forwarded port that outlives the pod it leads to.

    Args:
        name: What is forwarded, for messages.
        port: The local port.
        target: Finds the running pods: name, port, and whether it is ready.
        command: Gives the command that forwards, from pod, local and remote port.
        notify: Called with a line when the forward moves.
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
                # The API server may be away for a moment; what was handed out must work again when it is back.
                self._notify(f"{self.name}: {error}")
                self._stopping.wait(1)

    def _follow(self, pod: str, remote: int) -> bool:
        """Forward to one pod until the forward ends or the pod is no longer the one to lead to.

        Returns:
            Whether the forward was ever open.
        """
        process = subprocess.Popen(
            self._command(pod, self.port, remote), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self._process = process
        lines: list[str] = []
        reader = threading.Thread(target=self._read, args=(process, lines), daemon=True)
        reader.start()
        try:
            while not self._stopping.is_set() and not _has_ended(process, within_s=1.0):
                # An API server that is away for a moment is no reason to drop a forward that works.
                with suppress(ClusterError):
                    # Nor is a pod that is not ready for a moment, unless another one is.
                    states = {name: is_ready for name, _, is_ready in self._target()}
                    if pod not in states or (not states[pod] and any(states.values())):
                        break
        finally:
            self._end()
            reader.join(timeout=5)
            if process.stdout:
                process.stdout.close()
        if any("unable to listen" in line.lower() for line in lines):
            variable = SERVICES[self.name][1] if self.name in SERVICES else "its port"
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
                # Some versions of kubectl stay after this, and forward to nobody.
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


def render(overlay: Path) -> list[Manifest]:
    """Render an overlay.

    Raises:
        ClusterError: A secret file is missing, or the overlay is wrong.
    """
    for name in sorted(wanted_files(overlay)):
        if not (overlay / FOLDER / name).exists():
            raise ClusterError(f"the secret file {overlay / FOLDER / name} is missing; run 'make k8s-secrets'")
    outcome = subprocess.run([_kubectl_path(), "kustomize", str(overlay)], capture_output=True, text=True, check=False)
    if outcome.returncode:
        raise ClusterError(f"{overlay} can't be rendered: {' '.join(outcome.stderr.split())}")
    return [document for document in yaml.safe_load_all(outcome.stdout) if document]


def images(manifests: list[Manifest]) -> list[str]:
    """List the images that rendered manifests name."""
    found = set()
    for manifest in manifests:
        spec = manifest.get("spec", {}).get("template", {}).get("spec", {})
        found |= {entry["image"] for entry in (*spec.get("initContainers", ()), *spec.get("containers", ()))}
    return sorted(found)


def find_context(name: str | None) -> Context:
    """Find a context of the kubeconfig, as kubectl reads it.

    Args:
        name: Its name; the current one by default.

    Raises:
        ClusterError: There is no kubeconfig, it can't be read, or there is no such context in it.
    """
    command = [_kubectl_path(), "config", "view", "--output=json"]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False)
    if outcome.returncode:
        raise ClusterError(f"the kubeconfig can't be read: {' '.join(outcome.stderr.split())}; set KUBECONFIG")
    config = json.loads(outcome.stdout)
    contexts = {entry["name"]: entry["context"] for entry in config.get("contexts") or ()}
    if not contexts:
        raise ClusterError("no kubeconfig to find a cluster in; set KUBECONFIG, or make a cluster: kind create cluster")
    wanted = name or config.get("current-context")
    if wanted not in contexts:
        missing = f"no context {wanted!r} in the kubeconfig" if wanted else "the kubeconfig has no current context"
        raise ClusterError(f"{missing}; name one with CONTEXT=: {', '.join(contexts)}")
    cluster, user = (str(contexts[wanted].get(key, "")) for key in ("cluster", "user"))
    servers = {entry["name"]: entry["cluster"].get("server", "") for entry in config.get("clusters") or ()}
    return Context(str(wanted), cluster, user, str(servers.get(cluster, "")))


def looks_like_production(*names: str) -> bool:
    """Say whether the name of a context, cluster or server reads as if much depends on it."""
    return any(_PRODUCTION.search(name) for name in names)


def describe(workload: Workload) -> str:
    """Describe a workload in a line."""
    state = "done" if workload.done and workload.kind == "Job" else f"{workload.ready}/{workload.wanted} ready"
    parts = [f"{workload.kind} {workload.name}: {state}"]
    if workload.reason and not workload.done:
        parts.append(workload.reason)
    if workload.restarts:
        parts.append(f"{workload.restarts} restarts")
    return ", ".join(parts)


def workload_of(kind: str, item: Any, pods: Sequence[Any], replica_sets: Sequence[Any] = ()) -> Workload:
    """Judge a workload as `kubectl rollout status` does, and say what holds it up.

    Args:
        kind: `Deployment`, `StatefulSet` or `Job`.
        item: The object.
        pods: The namespace's pods.
        replica_sets: The namespace's ReplicaSets, which tell a Deployment's pods of today from earlier ones.
    """
    status, name = item.status, item.metadata.name
    own = _current(kind, item, [pod for pod in pods if _belongs(pod, name)], replica_sets)
    restarts = sum(entry.restart_count for pod in own for entry in _container_statuses(pod))
    conditions = {condition.type: condition for condition in status.conditions or ()}
    if kind == "Job":
        wanted, ready = item.spec.completions or 1, status.succeeded or 0
        failed = conditions.get("Failed")
        if failed and failed.status == "True":
            return Workload(kind, name, ready, wanted, False, f"{failed.reason}: {failed.message}", restarts, True)
        return Workload(kind, name, ready, wanted, ready >= wanted, _reason(own), restarts)
    wanted, ready = item.spec.replicas, status.ready_replicas or 0
    seen = (status.observed_generation or 0) >= item.metadata.generation
    updated = (status.updated_replicas or 0) >= wanted
    if kind == "Deployment":
        current = (status.replicas or 0) <= (status.updated_replicas or 0)
    else:
        current = not status.update_revision or status.current_revision == status.update_revision
    reason = _reason(own)
    refused, progress = conditions.get("ReplicaFailure"), conditions.get("Progressing")
    if refused and refused.status == "True":
        reason = reason or f"{refused.reason}: {refused.message}"[:300]
    late = bool(seen and progress and progress.status == "False")
    if progress and late:
        reason = reason or f"{progress.reason}: {progress.message}"[:300]
    done = seen and updated and current and ready >= wanted
    return Workload(kind, name, ready, wanted, done, reason, restarts, late and not done)


def forwarded_settings(secrets: Mapping[str, str], ports: Mapping[str, int]) -> Settings:
    """Combine the credentials of the cluster with addresses on this machine.

    Args:
        secrets: What `client.env` holds.
        ports: Local ports by service.
    """
    redis = secrets["REDIS_CONNECTION_STRING"].split(",", 1)[1]
    return Settings.from_env(
        {
            **secrets,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{ports['minio-service']}",
            "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{ports['mlflow']}",
            "REDIS_CONNECTION_STRING": f"127.0.0.1:{ports['redis']},{redis}",
            "FEATURE_SERVER_URL": f"http://127.0.0.1:{ports.get('feature-server', SERVICES['feature-server'][0])}",
        }
    )


@contextmanager
def _translated(context: str) -> Iterator[None]:
    """Turn the client's errors into one line."""
    from kubernetes.client.exceptions import ApiException
    from urllib3.exceptions import HTTPError

    try:
        yield
    except ApiException as error:
        said = _message(error)
        if error.status in {401, 403}:
            raise ClusterError(f"the cluster of context {context} refuses: {said}; check the context's user") from error
        kind = _AwayError if error.status == 429 or error.status >= 500 else ClusterError
        raise kind(f"the cluster of context {context} answers {error.status}: {said}") from error
    except (HTTPError, OSError) as error:
        raise _AwayError(
            f"the cluster of context {context} does not answer; start it, or name another with --context"
        ) from error


class _AwayError(ClusterError):
    """The cluster does not answer now, and may do so in a moment."""


def _message(error: Any) -> str:
    """Give the server's own words, which say what was refused."""
    try:
        return str(json.loads(error.body)["message"])
    except (ValueError, KeyError, TypeError):
        return str(error.reason)


def _client(context: Context) -> Any:
    """Connect to a cluster and make sure that it answers."""
    import kubernetes.config

    config: Any = kubernetes.config
    try:
        api = config.new_client_from_config(context=context.name)
    except config.ConfigException as error:
        raise ClusterError(f"the context {context.name!r} can't be used: {error}") from error
    api.configuration.retries = 1
    api.rest_client = type(api.rest_client)(api.configuration)
    request = api.rest_client.request

    def bounded(*arguments: Any, _request_timeout: Any = None, **options: Any) -> Any:
        return request(*arguments, _request_timeout=_request_timeout or REQUEST_TIMEOUT_S, **options)

    api.rest_client.request = bounded
    with _translated(f"{context.name} ({context.server})"):
        _api(api, "VersionApi").get_code()
    return api


def _api(client: Any, kind: str) -> Any:
    # Untyped on purpose: the client declares every field of every answer optional.
    import kubernetes.client

    return getattr(kubernetes.client, kind)(client)


def _kubectl_path() -> str:
    beside = Path(sys.executable).parent / "kubectl"
    found = str(beside) if beside.exists() else shutil.which("kubectl")
    if not found:
        raise ClusterError("kubectl is missing; run 'make install'")
    return found


def _kubectl_command(context: str) -> list[str]:
    return [_kubectl_path(), "--context", context]


def _has_ended(process: subprocess.Popen[str], *, within_s: float) -> bool:
    try:
        process.wait(within_s)
    except subprocess.TimeoutExpired:
        return False
    return True


def _workload_names(manifests: list[Manifest]) -> list[tuple[str, str]]:
    kinds = ("Deployment", "StatefulSet", "Job")
    return [(item["kind"], item["metadata"]["name"]) for item in manifests if item["kind"] in kinds]


def _local_port(service: str, port: int, wanted: str | None, variable: str) -> int:
    if wanted is None:
        return port if is_free(port) else free_port()
    if not wanted.isdigit() or not is_free(int(wanted)):
        raise PortTakenError(
            f"{variable}={wanted}, on which {service} is to be forwarded, is taken or no port; "
            f"stop what uses it, or set {variable} to a free port"
        )
    return int(wanted)


def _namespace(overlay: Path) -> str:
    namespace = read_kustomization(overlay).get("namespace")
    if not namespace:
        raise ClusterError(
            f"{overlay / 'kustomization.yaml'} names no namespace; add one, such as namespace: mlplatform"
        )
    return str(namespace)


def _is_overdue(workload: Workload, troubles: dict[str, tuple[float, float]], now: float, patience_s: float) -> bool:
    """Say whether waiting for a workload is in vain.

    A container that crashes now and then is well in between, so a trouble counts from when it was first seen until
    it was away for as long as our patience lasts.
    """
    since, last = troubles.get(workload.name, (now, now))
    word = workload.reason.split(":")[0]
    if word not in HOPELESS:
        if now - last > patience_s:
            troubles.pop(workload.name, None)
        return workload.failed
    troubles[workload.name] = (since, now)
    return now - since >= patience_s * HOPELESS[word]


def _belongs(pod: Any, name: str) -> bool:
    """Say whether a pod is a workload's: our workloads give their pods their own name as label."""
    return bool((pod.metadata.labels or {}).get("app.kubernetes.io/name") == name)


def _current(kind: str, item: Any, pods: list[Any], replica_sets: Sequence[Any]) -> list[Any]:
    """Keep the pods of a workload's present template: an earlier one's may be broken, and are on their way out."""
    revision = "deployment.kubernetes.io/revision"
    if kind == "Deployment":
        wanted = (item.metadata.annotations or {}).get(revision)
        label, hashes = "pod-template-hash", {
            entry.metadata.labels["pod-template-hash"]
            for entry in replica_sets
            if _belongs(entry, item.metadata.name) and (entry.metadata.annotations or {}).get(revision) == wanted
        }  # fmt: skip
    else:
        update = item.status.update_revision if kind == "StatefulSet" else None
        label, hashes = "controller-revision-hash", {update} if update else set()
    pods = [pod for pod in pods if not pod.metadata.deletion_timestamp]
    return [pod for pod in pods if not hashes or pod.metadata.labels.get(label) in hashes]


def _pod_to_blame(pods: Sequence[Any], workload: Workload) -> Any:
    """Find the pod that holds a workload up, the newest that has the reason, or else any that is not ready."""
    own = [
        pod
        for pod in pods
        if _belongs(pod, workload.name) and not pod.metadata.deletion_timestamp and pod.status.phase != "Succeeded"
    ]
    unready = sorted((pod for pod in own if not _is_ready(pod)), key=lambda pod: str(pod.metadata.creation_timestamp))
    return max(unready, key=lambda pod: _reason([pod]) == workload.reason, default=None)


def _container_statuses(pod: Any) -> list[Any]:
    return [*(pod.status.init_container_statuses or ()), *(pod.status.container_statuses or ())]


def _is_ready(pod: Any) -> bool:
    if pod.metadata.deletion_timestamp:
        return False
    return any(entry.type == "Ready" and entry.status == "True" for entry in pod.status.conditions or ())


def _reason(pods: Sequence[Any]) -> str:
    """Say why pods are not ready, preferring what does not pass by itself."""
    reasons = []
    for pod in pods:
        for entry in _container_statuses(pod):
            waiting = entry.state.waiting if entry.state else None
            ended = (entry.state and entry.state.terminated) or (entry.last_state and entry.last_state.terminated)
            end = f"{ended.reason}, exit status {ended.exit_code}" if ended and ended.exit_code else ""
            if waiting and waiting.reason:
                message = f": {waiting.message}" if waiting.message else ""
                reasons.append(f"{waiting.reason}{message}"[:300] + (f" (it ended before: {end})" if end else ""))
            elif end and not entry.ready:
                reasons.append(f"it ended before: {end}")
        for condition in pod.status.conditions or ():
            if condition.type == "PodScheduled" and condition.status == "False":
                reasons.append(f"{condition.reason}: {condition.message}"[:300])
    return min(reasons, key=lambda reason: reason.split(":")[0] not in HOPELESS, default="")


def _unready_container(pod: Any) -> str:
    statuses = _container_statuses(pod)
    # An init container that is through is not ready either, and not what holds the pod up.
    through = [
        entry for entry in statuses if entry.state and entry.state.terminated and entry.state.terminated.exit_code == 0
    ]
    unready = [entry for entry in statuses if not entry.ready and entry not in through]
    return str((unready or statuses)[0].name) if statuses else str(pod.spec.containers[0].name)


def _named_port(pod: Any, name: str) -> int:
    for container in pod.spec.containers:
        for port in container.ports or ():
            if port.name == name:
                return int(port.container_port)
    raise ClusterError(f"the pod {pod.metadata.name} has no port {name}")
