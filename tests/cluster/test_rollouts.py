"""How workloads are judged, on answers as an API server gives them."""

from __future__ import annotations

from typing import Any

import pytest

from mlplatform_ops.cluster.rollouts import (
    STUCK_AFTER_S,
    StuckTimer,
    Workload,
    blocking_pod,
    describe,
    unready_container,
    workload_of,
)

REVISION = "deployment.kubernetes.io/revision"


class Answer:
    """An object as the client gives it: what the server left out is None."""

    def __init__(self, **fields: Any) -> None:
        self.__dict__.update(fields)

    def __getattr__(self, name: str) -> None:
        return None


def _pod(name: str, *, waiting: str = "", ended: tuple[str, int] | None = None, **fields: Any) -> Answer:
    """Make a pod of mlflow that is not ready, with one container."""
    terminated = Answer(terminated=Answer(reason=ended[0], exit_code=ended[1])) if ended else None
    container = Answer(
        name="mlflow",
        ready=False,
        restart_count=1 if ended else 0,
        state=Answer(waiting=Answer(reason=waiting, message="as told") if waiting else None),
        last_state=terminated,
    )
    labels = {"app.kubernetes.io/name": "mlflow", "pod-template-hash": fields.get("template", "new")}
    metadata = Answer(
        name=name,
        labels=labels,
        deletion_timestamp=fields.get("deleted"),
        creation_timestamp=fields.get("created", "2026-01-01"),
    )
    conditions = [Answer(type="Ready", status="False"), *fields.get("conditions", ())]
    status = Answer(phase=fields.get("phase", "Running"), conditions=conditions, container_statuses=[container])
    return Answer(metadata=metadata, status=status)


def _deployment(**status: Any) -> Answer:
    metadata = Answer(name="mlflow", generation=2, annotations={REVISION: "2"})
    fields = {"observed_generation": 2, "replicas": 1, "updated_replicas": 1} | status
    return Answer(metadata=metadata, spec=Answer(replicas=1), status=Answer(**fields))


def _replica_set(template: str, revision: str) -> Answer:
    labels = {"app.kubernetes.io/name": "mlflow", "pod-template-hash": template}
    return Answer(metadata=Answer(name=f"mlflow-{template}", labels=labels, annotations={REVISION: revision}))


def test_pods_of_an_earlier_template_block_nothing() -> None:
    replica_sets = [_replica_set("old", "1"), _replica_set("new", "2")]
    pods = [_pod("a", waiting="ImagePullBackOff", template="old"), _pod("b", waiting="ContainerCreating")]
    assert workload_of("Deployment", _deployment(), pods, replica_sets).reason == "ContainerCreating: as told"
    assert workload_of("Deployment", _deployment(), pods, []).reason == "ImagePullBackOff: as told"


def test_a_stateful_set_is_judged_by_the_pods_of_its_present_revision() -> None:
    pods = [_pod("mlflow-0", waiting="CrashLoopBackOff")]
    pods[0].metadata.labels["controller-revision-hash"] = "one"
    item = _deployment(update_revision="two", current_revision="one")
    assert workload_of("StatefulSet", item, pods) == Workload("StatefulSet", "mlflow", 0, 1, False)
    item.status.update_revision = "one"
    assert workload_of("StatefulSet", item, pods).reason == "CrashLoopBackOff: as told"


def test_a_container_that_outgrew_its_memory_is_named_so_also_between_its_crashes() -> None:
    crashing = _pod("a", waiting="CrashLoopBackOff", ended=("OOMKilled", 137))
    running = _pod("a", ended=("OOMKilled", 137))
    for pod, expected in (
        (crashing, "CrashLoopBackOff: as told (it ended before: OOMKilled, exit status 137)"),
        (running, "it ended before: OOMKilled, exit status 137"),
    ):
        workload = workload_of("Deployment", _deployment(), [pod])
        assert workload.reason == expected
        assert describe(workload) == f"Deployment mlflow: 0/1 ready, {expected}, 1 restarts"


def test_a_quota_that_lets_no_pod_be_made_is_said() -> None:
    refused = Answer(type="ReplicaFailure", status="True", reason="FailedCreate", message="exceeded quota: small")
    workload = workload_of("Deployment", _deployment(conditions=[refused]), [])
    assert workload.reason == "FailedCreate: exceeded quota: small"


def test_a_rollout_past_its_deadline_has_failed_unless_it_is_done_after_all() -> None:
    late = Answer(type="Progressing", status="False", reason="ProgressDeadlineExceeded", message="timed out")
    assert workload_of("Deployment", _deployment(conditions=[late]), []).failed
    done = workload_of("Deployment", _deployment(conditions=[late], ready_replicas=1), [])
    assert (done.done, done.failed) == (True, False)
    # What the condition says is of an earlier template as long as the controller has not seen this one.
    assert not workload_of("Deployment", _deployment(conditions=[late], observed_generation=1), []).failed


def test_a_job_that_failed_is_given_up_at_once() -> None:
    failed = Answer(type="Failed", status="True", reason="BackoffLimitExceeded", message="too often")
    item = Answer(metadata=Answer(name="mlflow"), spec=Answer(completions=1), status=Answer(conditions=[failed]))
    workload = workload_of("Job", item, [])
    assert workload.reason == "BackoffLimitExceeded: too often"
    assert StuckTimer(STUCK_AFTER_S).is_stuck(workload, 0)


@pytest.mark.parametrize(("reason", "seconds"), [("ImagePullBackOff: x", 60), ("Unschedulable: no volume", 300)])
def test_a_reason_that_rarely_passes_may_last_its_time(reason: str, seconds: int) -> None:
    timer, workload = StuckTimer(60), Workload("Deployment", "mlflow", 0, 1, False, reason)
    assert [second for second in range(seconds + 1) if timer.is_stuck(workload, second)] == [seconds]


def test_the_time_of_a_container_that_crashes_again_and_again_goes_on_while_it_runs() -> None:
    timer = StuckTimer(60)
    crashed, runs = (Workload("Job", "mlflow", 0, 1, False, reason) for reason in ("CrashLoopBackOff: x", ""))
    states = [crashed if second % 50 < 10 else runs for second in range(101)]
    assert [second for second, state in enumerate(states) if timer.is_stuck(state, second)] == [100]


def test_a_reason_that_passed_starts_anew() -> None:
    timer, slow = StuckTimer(60), Workload("Job", "mlflow", 0, 1, False, "ErrImagePull: x")
    timer.is_stuck(slow, 0)
    assert not timer.is_stuck(slow, 200)


def test_each_reason_has_a_time_of_its_own() -> None:
    timer = StuckTimer(60)
    for second in range(100):
        assert not timer.is_stuck(Workload("Job", "mlflow", 0, 1, False, "Unschedulable: no node"), second)
    pulls = Workload("Job", "mlflow", 0, 1, False, "ErrImagePull: x")
    assert [timer.is_stuck(pulls, second) for second in (100, 130, 160)] == [False, False, True]


def test_the_newest_pod_with_the_reason_blocks_and_not_one_that_is_deleted() -> None:
    going = _pod("a", waiting="CrashLoopBackOff", deleted="now")
    done = _pod("b", phase="Succeeded")
    older = _pod("c", waiting="CrashLoopBackOff", created="2026-01-01")
    newer = _pod("d", waiting="ContainerCreating", created="2026-01-02")
    pods = [going, done, newer, older]
    workload = workload_of("Deployment", _deployment(), pods)
    assert blocking_pod(pods, workload) is older
    newest = _pod("e", waiting="CrashLoopBackOff", created="2026-01-03")
    assert blocking_pod([*pods, newest], workload) is newest
    assert blocking_pod([going, done], workload) is None
    assert unready_container(older) == "mlflow"
