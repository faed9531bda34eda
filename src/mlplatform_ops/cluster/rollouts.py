"""Judge what the workloads of a cluster have reached, as `kubectl rollout status` does, and say what holds them up.

Everything here is a function of what the API server answered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

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
# For how long a trouble has to be away to count as passed, in seconds.
FORGOTTEN_S = 60.0


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
    own = _current(kind, item, [pod for pod in pods if belongs(pod, name)], replica_sets)
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


class Patience:
    """Tells when waiting for a workload is in vain.

    A container that crashes now and then is well in between, so a trouble counts from when it was first seen, unless
    it was away for a minute.

    Args:
        patience_s: How long a reason that seldom passes by itself is given, in seconds.
    """

    def __init__(self, patience_s: float) -> None:
        self._patience_s = patience_s
        self._troubles: dict[tuple[str, str], tuple[float, float]] = {}

    def is_over(self, workload: Workload, now: float) -> bool:
        """Say whether a workload that is not done should be given up.

        Args:
            workload: What it has reached.
            now: A monotonic time, in seconds; later at each call.
        """
        if workload.failed or not is_hopeless(workload):
            return workload.failed
        trouble = workload.name, _word(workload.reason)
        since, last = self._troubles.get(trouble, (now, now))
        if now - last > FORGOTTEN_S:
            since = now
        self._troubles[trouble] = since, now
        return now - since >= self._patience_s * HOPELESS[_word(workload.reason)]


def is_hopeless(workload: Workload) -> bool:
    """Say whether what holds a workload up seldom passes by itself."""
    return _word(workload.reason) in HOPELESS


def pod_to_blame(pods: Sequence[Any], workload: Workload) -> Any:
    """Find the pod that holds a workload up, the newest that has the reason, or else any that is not ready."""
    own = [
        pod
        for pod in pods
        if belongs(pod, workload.name) and not pod.metadata.deletion_timestamp and pod.status.phase != "Succeeded"
    ]
    unready = [pod for pod in own if not is_ready(pod)]
    return max(
        unready,
        key=lambda pod: (_reason([pod]) == workload.reason, str(pod.metadata.creation_timestamp)),
        default=None,
    )


def unready_container(pod: Any) -> str:
    """Name the container that holds a pod up."""
    statuses = _container_statuses(pod)
    # An init container that is through is not ready either, and not what holds the pod up.
    through = [
        entry for entry in statuses if entry.state and entry.state.terminated and entry.state.terminated.exit_code == 0
    ]
    unready = [entry for entry in statuses if not entry.ready and entry not in through]
    return str((unready or statuses)[0].name) if statuses else str(pod.spec.containers[0].name)


def is_ready(pod: Any) -> bool:
    """Say whether a pod serves, and goes on doing so."""
    if pod.metadata.deletion_timestamp:
        return False
    return any(entry.type == "Ready" and entry.status == "True" for entry in pod.status.conditions or ())


def belongs(pod: Any, name: str) -> bool:
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
            if belongs(entry, item.metadata.name) and (entry.metadata.annotations or {}).get(revision) == wanted
        }  # fmt: skip
    else:
        update = item.status.update_revision if kind == "StatefulSet" else None
        label, hashes = "controller-revision-hash", {update} if update else set()
    pods = [pod for pod in pods if not pod.metadata.deletion_timestamp]
    return [pod for pod in pods if not hashes or pod.metadata.labels.get(label) in hashes]


def _container_statuses(pod: Any) -> list[Any]:
    return [*(pod.status.init_container_statuses or ()), *(pod.status.container_statuses or ())]


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
    return min(reasons, key=lambda reason: _word(reason) not in HOPELESS, default="")


def _word(reason: str) -> str:
    return reason.split(":")[0]
