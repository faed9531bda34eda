"""What Dask's workers must do on a cluster: give the laptop's answers, outlive one another, and refuse strangers."""

# ruff: noqa: T201 (it is part of a command of a developer's or CI's machine)

from __future__ import annotations

import base64
import copy
import json
import os
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from manifests import DEPLOY, Manifest, of_kind, pod_spec, render, workloads
from questions import read_secret
from replicas import check_denied

from mlplatform_ops.certificates import Certificates, certificates_of
from pods import Cluster, Pod, PodError, run

SCHEDULER, WORKER = "dask-scheduler", "dask-worker"
CLIENT = "client"
STEP = "score"
PORTS = {SCHEDULER: 8786, WORKER: 8788}
WAIT_S = 60
# In a user's pod. Two projects with the same history: one through the workers, one in the process. While the workers
# join, it names one that holds answers, waits until the scheduler has lost it, and says whether the join went on.
QUESTIONS = """
import json, os, shutil, threading, time
from pathlib import Path

import numpy as np
import pandas as pd
import redis

from mlplatform import features, history, objectstore
from mlplatform.connection import connect
from mlplatform.engines import cluster
from mlplatform.history import USER_ID
from mlplatform.income import read_income

settings = connect()
scheduler = os.environ[cluster.VARIABLE]
versions = history.build_history(read_income(Path("/app/data/income_data.csv"))).reset_index(drop=True)
took = {}


def made(project):
    folder = Path("/tmp/shop", project)
    shutil.copytree("/app/feature_repo", folder)
    for file, old, new in (
        ("feature_store.yaml", "project: income", f"project: {project}"),
        ("feature_store.yaml", "registry.db", f"{project}.db"),
        ("entity.py", '"income"', f'"{project}"'),
        ("features.py", "s3://feature-data-sets/", "s3://feature-data-sets/shop/"),
    ):
        text = (folder / file).read_text()
        assert old in text, file
        (folder / file).write_text(text.replace(old, new))
    return folder


def stored(project):
    with redis.Redis.from_url(settings.redis_url) as client:
        end = project.encode()
        keys = [key for key in client.scan_iter(count=10_000) if key.endswith(end)]
        pipeline = client.pipeline(transaction=False)
        for key in keys:
            pipeline.hgetall(key)
        return {key.removesuffix(end): fields for key, fields in zip(keys, pipeline.execute())}


def timed(name, act):
    begun = time.monotonic()
    answer = act()
    took[name] = round(time.monotonic() - begun, 1)
    return answer


shutil.copytree("/app/data", "/tmp/shop/data")
for view, frame in history.split_views(versions).items():
    uri = f"s3://feature-data-sets/shop/{view}.parquet"
    objectstore.write_bytes(objectstore.encode(frame, uri), uri)
asked = versions[[USER_ID, "event_timestamp"]]
some = asked.head(500)
asked = pd.concat(
    [
        asked,
        some.assign(event_timestamp=some["event_timestamp"] + pd.Timedelta(days=365)),
        some.assign(event_timestamp=some["event_timestamp"] - pd.Timedelta(days=800)),
        some.assign(user_id="stranger-" + some[USER_ID]),
    ],
    ignore_index=True,
).sample(frac=1, random_state=7)

store = features.apply(made("shared"))
rows = [entry.rows for entry in timed("load", lambda: features.materialise(store))]
mine = timed("history", lambda: features.point_in_time(store, asked))

# The same again in many small tasks, and a worker is lost meanwhile.
cluster.ROWS_PER_TASK = 4_000
times, direct = {}, set()


def watch():
    with cluster.cluster(scheduler) as client:
        while "done" not in times:
            sockets = [line.split()[2] for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
            direct.update(other for other in sockets if other.endswith(f":{8788:04X}"))
            held = {worker: len(keys) for worker, keys in client.has_what().items()}
            busy = sum(len(tasks) for tasks in client.processing().values())
            if "lost" not in times and "named" not in times and busy and all(held.values()):
                times["named"] = max(held, key=held.get)
                print(times["named"], flush=True)
            elif "named" in times and "lost" not in times and times["named"] not in held:
                times["lost"] = time.monotonic()
            time.sleep(0.01)


thread = threading.Thread(target=watch)
thread.start()
again = timed("history, a worker lost", lambda: features.point_in_time(store, asked))
times["done"] = time.monotonic()
thread.join()

del os.environ[cluster.VARIABLE]
single = features.apply(made("single"))
features.materialise(single)
alone = timed("history in one process", lambda: features.point_in_time(single, asked))
held = stored("shared")
print(
    json.dumps(
        {
            "rows": rows,
            "asked": len(asked),
            "history": mine.equals(alone),
            "history, a worker lost": again.equals(alone),
            "lost in time": times.get("lost", times["done"]) < times["done"],
            "connections to workers": len(direct),
            "users": len(held),
            "online store": held == stored("single"),
            "took": took,
        }
    )
)
"""
# In the pod of a pipeline's step: what the steps do that take an engine.
STEPS = """
import json

import mlflow
import pandas as pd

from mlplatform import income, objectstore, registry
from mlplatform_pipeline import steps

steps.ready()
holder = registry.require()
people = income.read_income()
data = objectstore.write_frame(people, "s3://mlflow-datasets/window/window.parquet")
asked = people.assign(user_id=[str(place) for place in people.index], event_timestamp=pd.Timestamp(0, tz="UTC"))
features = objectstore.write_frame(asked, "s3://mlflow-datasets/window/features.parquet")
scored = [steps.score(features, "champion", str(holder.version), 0, 2, engine) for engine in ("local", "dask")]
runs = [mlflow.get_run(run_id) for run_id in (holder.run_id, steps.train(data, "champion", 42, engine="dask"))]
areas = [run.data.metrics["roc_auc_score_test"] for run in runs]
trained = {"trained by": runs[1].data.params["engine"], "like the champion": abs(areas[0] - areas[1]) < 0.001}
print(json.dumps({"scores": scored[0] == scored[1], **trained}))
"""
# In a pod of Dask's: everything that listens, and what a web server says there.
PAGES = """
import http.client, json
from pathlib import Path

listening, pages = [], {}
for name in ("tcp", "tcp6"):
    for line in Path("/proc/net", name).read_text().splitlines()[1:]:
        _, local, _, state = line.split()[:4]
        if state == "0A":
            address, port = local.split(":")
            listening.append((address, int(port, 16)))
for address, port in listening:
    for path in ("/", "/status", "/health", "/metrics", "/info/main/workers.html", "/json/counts.json", "/api/v1"):
        if address == "0100007F":
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", path)
            pages[f"{port}{path}"] = connection.getresponse().status
print(json.dumps({"open": sorted({port for address, port in listening if address != "0100007F"}), "pages": pages}))
"""


def is_worker(pod: Pod) -> bool:
    return bool(pod.workload["metadata"]["name"] in PORTS)


def show_the_workers(cluster: Cluster, servers: list[Pod], *, asked_by_notebooks: bool) -> None:
    """Load and ask through the workers from a user's pod, lose one in mid-job, and knock as a stranger."""
    begun = time.monotonic()
    scheduler = next(pod for pod in servers if pod.workload["metadata"]["name"] == SCHEDULER)
    clients = scheduler.containers[0].log.read_text().count("Receive client connection")
    if asked_by_notebooks and not clients:
        raise PodError("the notebooks' Job did its work without the Dask workers that were there")
    for pod in servers:
        if is_worker(pod):
            show_that_strangers_are_refused(cluster, pod)
            show_that_there_is_no_page(cluster, pod)
    show_that_others_may_not_reach_the_scheduler(cluster)
    show_that_a_laptop_reaches_the_workers(cluster)
    said = ask_and_lose_a_worker(cluster, servers)
    expected = {"rows": [28_066] * 3, "users": 28_066, "history": True, "history, a worker lost": True}
    expected |= {"online store": True, "lost in time": True, "connections to workers": 0}
    if wrong := {name: said[name] for name, value in expected.items() if said[name] != value}:
        raise PodError(f"the Dask workers do not give the laptop's answers: {wrong}")
    cluster.wait(lambda pod: pod.ready, timeout_s=WAIT_S, what="ready after a worker was lost", of=servers)
    took = ", ".join(f"{name} {seconds} s" for name, seconds in said["took"].items())
    print(
        f"  the Dask workers, which the notebooks' Job used {clients} times, load {said['users']} users and answer "
        f"{said['asked']} rows as one process does, with a worker killed meanwhile too ({took}); a client outside of "
        f"the pods reaches them; nobody without a certificate of theirs is answered, no page is served "
        f"({time.monotonic() - begun:.0f} s)",
        flush=True,
    )


def add_step(manifests: list[Manifest]) -> None:
    """Add the pod of the batch's step that scores: what the compiled pipeline gives it, in Kubeflow's namespace."""
    compiled = DEPLOY / "components" / "pipeline" / "compiled" / "batch.yaml"
    _, platforms = yaml.safe_load_all(compiled.read_text())
    given = platforms["platforms"]["kubernetes"]["deploymentSpec"]["executors"]["exec-score"]
    job = copy.deepcopy(next(w for w in workloads(manifests) if w["metadata"]["name"] == "notebooks"))
    job["metadata"] |= {"name": STEP, "namespace": "kubeflow"}
    job["spec"]["template"]["metadata"]["labels"] = given["podMetadata"]["labels"]
    container = pod_spec(job)["containers"][0]
    container |= {"command": ["python", "-W", "ignore", "-c", STEPS], "envFrom": []}
    container["resources"]["limits"]["memory"] = "2Gi"
    container["env"] = [entry for entry in container["env"] if entry["name"] == "HOME"]  # the image's own
    for source, kind, name, key in (
        ("secretAsEnv", "secretKeyRef", "secretName", "secretKey"),
        ("configMapAsEnv", "configMapKeyRef", "configMapName", "configMapKey"),
    ):
        container["env"] += [
            {"name": entry["envVar"], "valueFrom": {kind: {"name": named[name], "key": entry[key]}}}
            for named in given[source]
            for entry in named["keyToEnv"]
        ]
    (files,) = given["secretAsVolume"]
    for entry, key in ((container, "volumeMounts"), (pod_spec(job), "volumes")):
        entry[key] = [volume for volume in entry[key] if volume["name"] == "tmp"]
    container["volumeMounts"].append({"name": "dask", "mountPath": files["mountPath"]})
    pod_spec(job)["volumes"].append({"name": "dask", "secret": {"secretName": files["secretName"]}})
    # As deploy/README.md says.
    secret = copy.deepcopy(next(s for s in of_kind(manifests, "Secret") if s["metadata"]["name"] == "dask"))
    secret["metadata"] = {"name": files["secretName"], "namespace": "kubeflow"}
    address = f"tls://{SCHEDULER}.mlplatform.svc:{PORTS[SCHEDULER]}"
    secret["data"]["DASK_SCHEDULER_ADDRESS"] = base64.b64encode(address.encode()).decode()
    manifests += [job, secret, *render(DEPLOY / "components" / "pipeline")]


def show_that_a_step_uses_the_workers(cluster: Cluster, step: Pod) -> None:
    """Run the step's pod, which scores and trains on the workers, with Kubeflow's policies."""
    begun = time.monotonic()
    cluster.start_pod(step)
    cluster.wait(lambda pod: pod.done, timeout_s=300, what="done", of=[step])
    said = json.loads(step.containers[0].log.read_text().splitlines()[-1])
    if said != {"scores": True, "trained by": "dask", "like the champion": True}:
        raise PodError(f"a pipeline's step on the Dask workers says {said}")
    print(f"  a pipeline's step scores and trains on the Dask workers ({time.monotonic() - begun:.0f} s)", flush=True)


def ask_and_lose_a_worker(cluster: Cluster, servers: list[Pod]) -> dict[str, Any]:
    """Run the questions in the user's pod, and kill the worker that they name, as the kernel kills one."""
    client = next(pod for pod in cluster.pods if pod.name == CLIENT)
    command = [*cluster.runc, "exec", client.containers[-1].id, "python", "-W", "ignore", "-c", QUESTIONS]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert process.stdout
        lines = []
        for line in process.stdout:
            lines.append(line.strip())
            if line.startswith("tls://"):
                lost = next(pod for pod in servers if pod.address in line)
                run(*cluster.runc, "kill", lost.containers[0].id, "KILL")
        if process.wait():
            errors.seek(0)
            raise PodError(f"the questions to the Dask workers end with {process.returncode}: {errors.read()[-2000:]}")
    return dict(json.loads(lines[-1]))


def show_that_a_laptop_reaches_the_workers(cluster: Cluster) -> None:
    """Compute on a worker from outside the pods, with what a forward gives a client: an address and a file."""
    code = (
        "import sys; from mlplatform.engines import cluster\n"
        "with cluster.cluster(sys.argv[1]) as client: print(client.submit(max, [1, 2]).result())"
    )
    address = f"tls://{cluster.services[SCHEDULER][1]}:{PORTS[SCHEDULER]}"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "dask.yaml")
        file.write_text(read_secret(cluster, "dask")["dask.yaml"])
        said = run(sys.executable, "-W", "ignore", "-c", code, address, env={**os.environ, "DASK_CONFIG": str(file)})
    if said.strip() != "2":
        raise PodError(f"a client outside of the pods gets {said!r} of the workers")


def show_that_strangers_are_refused(cluster: Cluster, pod: Pod) -> None:
    """Knock without TLS, without a certificate, with one of another authority; and with the right one."""
    port = PORTS[pod.workload["metadata"]["name"]]
    ours = yaml.safe_load(read_secret(cluster, "dask")["dask.yaml"])["distributed"]["comm"]["tls"]
    mine = Certificates(ours["ca-file"], ours["client"]["cert"], ours["client"]["key"])
    others = certificates_of("somebody else's", name="dask")
    tried = {
        "no TLS": greets(pod.address, port, None),
        "no certificate": greets(pod.address, port, Certificates(mine.authority, "", "")),
        "another authority": greets(pod.address, port, others),
        "ours": greets(pod.address, port, mine),
    }
    if tried != {"no TLS": False, "no certificate": False, "another authority": False, "ours": True}:
        raise PodError(f"{pod.name}: who is answered: {tried}")


def greets(address: str, port: int, shown: Certificates | None) -> bool:
    """Say whether Dask greets a connection; each side does so first of all."""
    with socket.create_connection((address, port), timeout=5) as plain, tempfile.TemporaryDirectory() as folder:
        try:
            if shown is None:
                # What a client without TLS begins with: the length of its greeting.
                plain.sendall(b"\x08" + b"\0" * 15)
                return bool(plain.recv(1))
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname = False
            # The stranger does not mind whom it speaks to.
            context.verify_mode = ssl.CERT_NONE
            if shown.certificate:
                files = Path(folder, "certificate"), Path(folder, "key")
                for file, text in zip(files, (shown.certificate, shown.key), strict=True):
                    file.write_text(text)
                context.load_cert_chain(*files)
            with context.wrap_socket(plain) as secured:
                return bool(secured.recv(1))
        except (OSError, ssl.SSLError):
            return False


def show_that_others_may_not_reach_the_scheduler(cluster: Cluster) -> None:
    """A pod that is no client of Dask's is refused by the policies, and the harness names it."""
    check_denied(cluster)
    knock = f"import socket; socket.create_connection(('{SCHEDULER}', {PORTS[SCHEDULER]}), 5).recv(1)"
    cluster.execute("mlflow-0", "python", "-c", knock)
    refused = [entry.split(" (")[0] for entry in cluster.denied]
    cluster.denied.clear()
    if refused != [f"mlflow-0 to {SCHEDULER}:{PORTS[SCHEDULER]}"]:
        raise PodError(f"mlflow-0 may reach {SCHEDULER}: refused was {refused}")


def show_that_there_is_no_page(cluster: Cluster, pod: Pod) -> None:
    """Nothing but Dask's own port is open to others, and what listens on the pod's loopback has no page."""
    port = PORTS[pod.workload["metadata"]["name"]]
    said = json.loads(cluster.execute(pod.name, "python", "-c", PAGES))
    if said["open"] != [port] or not said["pages"] or set(said["pages"].values()) != {404}:
        raise PodError(f"{pod.name} has more open than port {port}, or pages: {said}")
