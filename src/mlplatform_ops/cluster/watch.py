"""Watch what runs on a cluster: ask for every workload, wait until all are done, explain what is stuck."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from mlplatform.errors import ClusterError
from mlplatform_ops.cluster.api import AwayError, api_errors, api_of
from mlplatform_ops.cluster.rollouts import (
    STUCK_AFTER_S,
    StuckTimer,
    Workload,
    belongs,
    blocking_pod,
    describe,
    rarely_recovers,
    unready_container,
    workload_of,
)
from mlplatform_ops.console import Notify

# Every object of the platform carries this label.
PART_OF = "app.kubernetes.io/part-of=mlplatform"


class Watch:
    """Watches the workloads of one namespace.

    Args:
        client: The official client, connected.
        context: The context's name, for messages.
        namespace: The namespace.
        notify: Called with a line for each change worth showing.
    """

    def __init__(self, client: Any, context: str, namespace: str, notify: Notify) -> None:
        self._client = client
        self._context = context
        self._namespace = namespace
        self._notify = notify

    def workloads(self) -> list[Workload]:
        """Ask for every workload of the platform.

        Raises:
            ClusterError: The cluster does not answer, or refuses.
        """
        apps, batch = (api_of(self._client, kind) for kind in ("AppsV1Api", "BatchV1Api"))
        pods = self._pods()
        with api_errors(self._context):
            replica_sets = apps.list_namespaced_replica_set(self._namespace, label_selector=PART_OF).items
            sets = [
                ("Deployment", apps.list_namespaced_deployment(self._namespace, label_selector=PART_OF).items),
                ("StatefulSet", apps.list_namespaced_stateful_set(self._namespace, label_selector=PART_OF).items),
                ("Job", batch.list_namespaced_job(self._namespace, label_selector=PART_OF).items),
            ]
        found = [workload_of(kind, item, pods, replica_sets) for kind, items in sets for item in items]
        return [entry if entry.done or entry.reason else self._explained(entry, pods) for entry in found]

    def wait(
        self, names: Collection[tuple[str, str]], *, timeout_s: float, stuck_after_s: float = STUCK_AFTER_S
    ) -> None:
        """Wait until workloads run as specified, and show what changes.

        Args:
            names: Kind and name of each workload.
            timeout_s: How long to wait at most, in seconds.
            stuck_after_s: How long a reason that rarely passes by itself may last, in seconds.

        Raises:
            ClusterError: A workload does not come up; the message names pod and reason, after its last events and log
                lines were shown.
        """
        deadline = time.monotonic() + timeout_s
        finished: set[tuple[str, str]] = set()
        shown: dict[str, str] = {}
        timer = StuckTimer(stuck_after_s)
        while True:
            now = time.monotonic()
            try:
                found = {(workload.kind, workload.name): workload for workload in self.workloads()}
            except AwayError as error:
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
            stuck = [workload for workload in waiting if timer.is_stuck(workload, now)]
            if stuck or now > deadline:
                self._give_up(waiting)
            time.sleep(1)

    def _pods(self) -> list[Any]:
        core = api_of(self._client, "CoreV1Api")
        with api_errors(self._context):
            return list(core.list_namespaced_pod(self._namespace, label_selector=PART_OF).items)

    def _explained(self, workload: Workload, pods: Sequence[Any]) -> Workload:
        """Add why pods are not made, which only events tell: a quota, or an admission that refuses."""
        if sum(belongs(pod, workload.name) for pod in pods) >= workload.wanted:
            return workload
        events = self._events(workload.name, "FailedCreate")
        return replace(workload, reason=f"FailedCreate: {events[-1].message}"[:300]) if events else workload

    def _events(self, name: str, reason: str = "") -> list[Any]:
        selector = f"involvedObject.name={name}" + (f",reason={reason}" if reason else "")
        with api_errors(self._context):
            core = api_of(self._client, "CoreV1Api")
            events = core.list_namespaced_event(self._namespace, field_selector=selector).items
        return sorted(events, key=lambda event: str(event.last_timestamp or event.event_time or ""))

    def _give_up(self, workloads: list[Workload]) -> None:
        """Show what is known of workloads that do not come up, and raise."""
        pods = self._pods()
        # The one that can't recover comes first: others may only wait for it.
        first, *others = sorted(
            workloads, key=lambda each: (not rarely_recovers(each), not each.failed, not each.reason)
        )
        for workload in [first, *(other for other in others if other.reason)]:
            self._show(workload, blocking_pod(pods, workload))
        pod = blocking_pod(pods, first)
        kind, name = ("pod", pod.metadata.name) if pod else (first.kind.lower(), first.name)
        reason = first.reason or f"{first.ready} of {first.wanted} ready"
        also = f" (nor do {', '.join(other.name for other in others)})" if others else ""
        raise ClusterError(
            f"{kind} {name} does not come up: {reason}{also}; see "
            f"'kubectl --context {self._context} -n {self._namespace} describe {kind} {name}'"
        )

    def _show(self, workload: Workload, pod: Any) -> None:
        """Show the last events of a workload, and the last log lines of the pod that blocks it."""
        name = str(pod.metadata.name) if pod else workload.name
        self._notify(f"{'pod' if pod else workload.kind} {name}:")
        for event in self._events(name)[-5:]:
            self._notify(f"  event {event.reason}: {event.message}")
        for line in self._log_tail(pod) if pod else ():
            self._notify(f"  log   {line}")

    def _log_tail(self, pod: Any) -> list[str]:
        from kubernetes.client.exceptions import ApiException

        core = api_of(self._client, "CoreV1Api")
        container = unready_container(pod)
        for previous in (False, True):
            try:
                text = core.read_namespaced_pod_log(
                    pod.metadata.name, self._namespace, container=container, tail_lines=10, previous=previous
                )
            except ApiException:
                continue
            if text:
                return [line[:300] for line in str(text).splitlines()]
        return []
