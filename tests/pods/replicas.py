"""What the endpoint's replicas and the drift watch must do on a cluster, while the alias moves and people ask."""

# ruff: noqa: T201 (it is part of a command of a developer's or CI's machine)

from __future__ import annotations

import copy
import http.client
import json
import re
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from manifests import Manifest, pod_spec, workloads
from people import PERSON
from questions import ask, mlflow, read_secret

from mlplatform import table
from mlplatform.history import STEADY_USER
from mlplatform.monitoring.drift import FEWEST_ROWS
from mlplatform.settings import CHAMPION
from pods import Cluster, Pod, PodError

SERVICE, PORT = "model-endpoint", 3000
CLIENT = "client"
WAIT_S = 120
# Real people through the Service, in the table's order, until somebody says stop; then what was answered.
QUESTIONS = """
import json, os, time
from pathlib import Path
from mlplatform.errors import PlatformError
from mlplatform.history import STEADY_USER
from mlplatform.income import read_income
from mlplatform.serving import model_client

people = read_income(Path("data/income_data.csv"))
environ = os.environ | {"MODEL_ENDPOINT_URL": "http://model-endpoint:3000"}
stop = Path("/tmp/stop")
begun, asked, failed, versions = time.monotonic(), 0, [], set()
# Longer than the endpoint keeps rows before it writes them to its log.
while not stop.exists() or time.monotonic() - begun < 12:
    chosen = people.iloc[asked * 100 % len(people):][:100]
    try:
        answers = [model_client.predict(chosen, environ=environ)]
        # Seldom, or the drift watch finds that many people are this one.
        if asked % 10 == 0:
            answers.append(model_client.predict_users([STEADY_USER], environ=environ))
        for frame in answers:
            versions |= set(frame["model_version"].tolist())
            if frame["score"].isna().any():
                failed.append(f"no score: {frame['reason'].tolist()}"[:300])
    except PlatformError as error:
        failed.append(str(error))
    asked += 1
    time.sleep(0.1)
print(json.dumps({"asked": asked, "failed": failed, "versions": sorted(versions)}))
"""
# A release signs its version in the same way.
SIGNATURE = """
import sys
import mlflow
from mlplatform.connection import connect
from mlplatform.promotion.alias import sign

settings = connect()
sign(mlflow.MlflowClient().get_model_version(sys.argv[1], sys.argv[2]))
"""


def is_endpoint(pod: Pod) -> bool:
    return bool(pod.workload["metadata"]["name"] == SERVICE)


def add_client(manifests: list[Manifest]) -> None:
    """Add a pod of a user: what the README says that one needs is what the notebooks' Job has."""
    job = copy.deepcopy(next(w for w in workloads(manifests) if w["metadata"]["name"] == "notebooks"))
    job["metadata"]["name"] = CLIENT
    pod_spec(job)["containers"][0]["command"] = ["sleep", "infinity"]
    manifests.append(job)


def show_that_it_waits_for_a_champion(cluster: Cluster, replicas: list[Pod]) -> None:
    """Without a champion each replica is alive and not ready, says why, and is sent nothing by the Service."""
    cluster.wait(lambda pod: pod.begun, timeout_s=WAIT_S, what="alive", of=replicas)
    for pod in replicas:
        # It may have looked before MLflow answered.
        until(
            lambda pod=pod: "no alias 'champion'" in ask(pod.address, PORT, "/readyz")[1],
            f"{pod.name} does not say that there is no champion",
        )
        alive, ready = ask(pod.address, PORT, "/healthz"), ask(pod.address, PORT, "/readyz")
        if alive[0] != 200 or ready[0] != 503 or pod.ready:
            raise PodError(f"{pod.name} without a champion says {alive} and {ready}")
    try:
        status, _ = ask(cluster.services[SERVICE][1], PORT, "/healthz")
    except (OSError, http.client.HTTPException):
        print(f"  the endpoint's {len(replicas)} replicas are alive, not ready without a champion, and sent nothing")
    else:
        raise PodError(f"the Service {SERVICE} leads to a replica that is not ready: status {status}")


def show_the_endpoint(cluster: Cluster, replicas: list[Pod]) -> int:
    """Ask through the Service while the alias moves, and see each replica follow.

    Returns:
        How many people were asked about.
    """
    begun = time.monotonic()
    cluster.wait(lambda pod: pod.ready, timeout_s=WAIT_S, what="ready, though there is a champion", of=replicas)
    champion = check_answers(cluster, replicas)
    with ThreadPoolExecutor() as pool:
        asking = pool.submit(cluster.execute, CLIENT, "python", "-c", QUESTIONS)
        try:
            took_s = move_the_alias(cluster, replicas, champion)
        finally:
            cluster.execute(CLIENT, "touch", "/tmp/stop")  # noqa: S108 - in the pod
        said = json.loads(asking.result())
    if said["failed"] or len(said["versions"]) != 2:
        raise PodError(f"while the alias moved, of {said['asked']} requests these failed: {said['failed'][:5]}; {said}")
    show_that_a_policy_is_missed(cluster)
    print(
        f"  the endpoint's {len(replicas)} replicas refuse an unsigned version, and follow the alias, the last one "
        f"{took_s:.1f} s after the command that signed or moved it; {said['asked']} requests meanwhile, each for 100 "
        f"people, none failed ({time.monotonic() - begun:.0f} s)",
        flush=True,
    )
    return 100 * int(said["asked"])


def check_answers(cluster: Cluster, replicas: list[Pod]) -> int:
    """Ask the Service for a person and for a user, with the token and without; give the version that answers."""
    address = cluster.services[SERVICE][1]
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        status, said = ask(address, PORT, "/predict", {"people": [PERSON]}, headers)
        if status != 401:
            raise PodError(f"the endpoint answers {status} to {headers or 'no token'}: {said[:200]}")
    for path, body in (("predict", {"people": [PERSON]}), ("predict_users", {"users": [STEADY_USER]})):
        status, said = ask(address, PORT, f"/{path}", body, token(cluster))
        if status != 200 or not 0 < json.loads(said)["predictions"][0]["score"] < 1:
            raise PodError(f"the endpoint answers {status} to {path}: {said[:200]}")
    versions = {answering(cluster, pod) for pod in replicas}
    if len(versions) != 1:
        raise PodError(f"the replicas answer with versions {versions}")
    return versions.pop()


def move_the_alias(cluster: Cluster, replicas: list[Pod], champion: int) -> float:
    """Move the alias by hand: to a version that nobody signed, which is refused until it is signed, and back.

    Returns:
        The longest time that a replica took to follow after a command had signed or moved, in seconds.
    """
    signed = signatures(cluster)
    unsigned = next((version for version in sorted(signed) if not signed[version]), None)
    if unsigned is None:
        raise PodError(f"the notebooks left no version without a signature: {signed}")
    move(cluster, unsigned)
    refusal = f"version {unsigned} is not signed"
    for pod in replicas:
        until(lambda pod=pod: refusal in pod.containers[0].log.read_text(), f"{pod.name} does not say: {refusal}")
        if answering(cluster, pod) != champion:
            raise PodError(f"{pod.name} answers with version {answering(cluster, pod)}, which nobody signed")
    cluster.execute(CLIENT, "python", "-c", SIGNATURE, table.current().model, str(unsigned))
    took_s = follows(cluster, replicas, unsigned)
    move(cluster, champion)
    return max(took_s, follows(cluster, replicas, champion))


def signatures(cluster: Cluster) -> dict[int, bool]:
    """Say of each version whether it is signed."""
    query = f"model-versions/search?filter=name%3D%27{table.current().model}%27"
    found = mlflow(cluster, mlflow_server(cluster), query)["model_versions"]
    return {int(v["version"]): any(tag["key"] == "signature" for tag in v.get("tags", ())) for v in found}


def move(cluster: Cluster, version: int) -> None:
    body = {"name": table.current().model, "alias": CHAMPION, "version": str(version)}
    mlflow(cluster, mlflow_server(cluster), "registered-models/alias", body)


def mlflow_server(cluster: Cluster) -> Pod:
    return next(pod for pod in cluster.pods if pod.workload["metadata"]["name"] == "mlflow" and pod.ready)


def follows(cluster: Cluster, replicas: list[Pod], version: int) -> float:
    """Wait until each replica answers with a version, and give the seconds that the last one took."""
    begun = time.monotonic()
    for pod in replicas:
        until(lambda pod=pod: answering(cluster, pod) == version, f"{pod.name} does not follow to version {version}")
    return time.monotonic() - begun


def until(happened: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not happened():
        if time.monotonic() > deadline:
            raise PodError(otherwise)
        time.sleep(0.1)


def token(cluster: Cluster) -> dict[str, str]:
    return {"Authorization": f"Bearer {read_secret(cluster, 'platform-client')['MODEL_ENDPOINT_TOKEN']}"}


def answering(cluster: Cluster, pod: Pod) -> int:
    """Ask one replica which version answers, for a user whom nobody knows, since what is known goes to the log."""
    status, said = ask(pod.address, PORT, "/predict_users", {"users": ["nobody"]}, token(cluster))
    if status != 200:
        raise PodError(f"{pod.name} answers {status}: {said[:300]}")
    return int(json.loads(said)["model_version"])


def show_that_a_policy_is_missed(cluster: Cluster) -> None:
    """Take the endpoint's policy away: a user's pod must be refused, and the harness must name it."""
    check_denied(cluster)
    policies = cluster.policies
    cluster.policies = [policy for policy in policies if policy["metadata"]["name"] != "endpoint"]
    try:
        asking = "import sys, urllib.request; urllib.request.urlopen(sys.argv[1], timeout=10)"
        cluster.execute(CLIENT, "python", "-c", asking, f"http://{SERVICE}:{PORT}/healthz")
    except PodError:
        refused = any(entry.startswith(f"{CLIENT} to {SERVICE}:{PORT} ") for entry in cluster.denied)
    else:
        refused = False
    finally:
        cluster.policies = policies
        cluster.denied.clear()
    if not refused:
        raise PodError("the endpoint's policy was taken away, and a user's pod still reaches it")


def check_denied(cluster: Cluster) -> None:
    if cluster.denied:
        raise PodError("the network policies forbid what is needed: " + "; ".join(sorted(set(cluster.denied))))


def show_the_drift_watch(cluster: Cluster, watch: Pod, *, people: int) -> None:
    """Run the Job that the CronJob makes, on what the endpoint has just seen: the same people, so no alarm."""
    begun = time.monotonic()
    cluster.start_pod(watch)
    cluster.wait(lambda pod: pod.done, timeout_s=WAIT_S, what="done", of=[watch])
    log = watch.containers[-1].log.read_text()
    run_id = re.search(r"run ([0-9a-f]{32}) of MLflow's experiment income-drift", log)
    if not run_id:
        raise PodError(f"the drift watch names no run: {log[-500:]}")
    data: dict[str, Any] = mlflow(cluster, mlflow_server(cluster), f"runs/get?run_id={run_id[1]}")["run"]["data"]
    metrics = {entry["key"]: entry["value"] for entry in data["metrics"]}
    tags = {entry["key"]: entry["value"] for entry in data["tags"]}
    if tags["alarm"] != "false" or not FEWEST_ROWS <= metrics["rows"] <= 2 * people:
        raise PodError(f"the drift watch judged {metrics['rows']:.0f} rows, alarm {tags['alarm']}: {log[-500:]}")
    print(
        f"  the CronJob's Job: status 0, {metrics['rows']:,.0f} rows that the endpoint logged, no alarm, in MLflow's "
        f"run {run_id[1][:8]} ({time.monotonic() - begun:.0f} s)",
        flush=True,
    )


def show_the_endpoint_again(cluster: Cluster, replicas: list[Pod]) -> None:
    """After the faults of the parts below, each replica must answer for a user, and go on following the alias."""

    def answers(pod: Pod) -> bool:
        return ask(pod.address, PORT, "/predict_users", {"users": [STEADY_USER]}, token(cluster))[0] == 200

    for pod in replicas:
        until(lambda pod=pod: answers(pod), f"{pod.name} does not answer for a user after Redis' failover")
    champion = answering(cluster, replicas[0])
    other = next(version for version, signed in signatures(cluster).items() if signed and version != champion)
    move(cluster, other)
    follows(cluster, replicas, other)
    cluster.wait(lambda pod: pod.ready, timeout_s=WAIT_S, what="ready any more", of=replicas)
