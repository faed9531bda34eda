"""Judge what the workloads of a cluster have reached, as `kubectl rollout status` does, and say what blocks them.

The functions take what the API server answered, and ask nothing themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

# How long a reason that rarely passes by itself may last before we stop waiting, and how many times as long.
STUCK_AFTER_S = 60.0
RARELY_RECOVERS = {
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
# A reason that was not seen for this long has passed, in seconds.
PASSED_AFTER_S = 60.0


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
    """Judge a workload as `kubectl rollout status` does, and say what blocks it.

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


class StuckTimer:
    """Measures for how long each workload has had a reason that rarely passes by itself.

    A container that crashes again and again runs in between, so the time goes on from when the reason was first seen.
    It starts anew after a minute without the reason.

    Args:
        stuck_after_s: How long such a reason may last, in seconds; some may last longer (`RARELY_RECOVERS`).
    """

    def __init__(self, stuck_after_s: float) -> None:
        self._stuck_after_s = stuck_after_s
        self._seen: dict[tuple[str, str], tuple[float, float]] = {}

    def is_stuck(self, workload: Workload, now: float) -> bool:
        """Say whether to stop waiting for a workload that is not done.

        Args:
            workload: What it has reached.
            now: A monotonic time, in seconds; later at each call.
        """
        if workload.failed or not rarely_recovers(workload):
            return workload.failed
        word = _word(workload.reason)
        first, last = self._seen.get((workload.name, word), (now, now))
        if now - last > PASSED_AFTER_S:
            first = now
        self._seen[workload.name, word] = first, now
        return now - first >= self._stuck_after_s * RARELY_RECOVERS[word]


def rarely_recovers(workload: Workload) -> bool:
    """Say whether what blocks a workload rarely passes by itself."""
    return _word(workload.reason) in RARELY_RECOVERS


def blocking_pod(pods: Sequence[Any], workload: Workload) -> Any:
    """Find the pod that blocks a workload: the newest that has its reason, or else any that is not ready."""
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
    """Name the container that blocks a pod."""
    statuses = _container_statuses(pod)
    # An init container that has ended well is not ready either, and does not block the pod.
    ended_well = [
        entry for entry in statuses if entry.state and entry.state.terminated and entry.state.terminated.exit_code == 0
    ]
    unready = [entry for entry in statuses if not entry.ready and entry not in ended_well]
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
    """Keep the pods of a workload's present template. Pods of an earlier one may be broken, and will be deleted."""
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
    """Say why pods are not ready; a reason that rarely passes by itself comes first."""
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
    return min(reasons, key=lambda reason: _word(reason) not in RARELY_RECOVERS, default="")


def _word(reason: str) -> str:
    return reason.split(":")[0]
