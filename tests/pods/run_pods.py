"""Run the rendered pod specs for real, without Kubernetes: `python tests/pods/run_pods.py` as root.

Starts everything and runs the notebooks against it (`pods.py`, on the file systems of `images.py`), has Dask lose a
worker and Redis its primary, backs Postgres up and restores it, and breaks two specs. What this shows and what it
doesn't is in deploy/README.md.
"""

# ruff: noqa: S607, T201 (it is a command of a developer's or CI's machine, whose PATH it trusts)

from __future__ import annotations

import argparse
import copy
import ctypes
import json
import os
import platform
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import redis
from images import built_image, make_roots, stand_ins
from manifests import Manifest, compose, of_kind, pod_spec, render, workloads
from questions import mlflow
from replicas import (
    add_client,
    check_denied,
    is_endpoint,
    show_that_it_waits_for_a_champion,
    show_the_drift_watch,
    show_the_endpoint,
    show_the_endpoint_again,
)
from seccomp import DEFAULT_PROFILE
from workers import STEP, add_step, show_that_a_step_uses_the_workers, show_the_workers

from mlplatform_ops.cluster.credentials import write_secrets
from pods import Cluster, Image, Pod, PodError, run, secret_data

NEEDED = {"runc": "runc", "mmdebstrap": "mmdebstrap", "ip": "iproute2"}
START_TIMEOUT_S = 300


def leave_the_machines_mounts(folder: Path) -> None:
    """Go on with mounts of our own, which end with this process; file systems are made in memory."""
    unshare_mounts()
    folder.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=80%,mode=755", "tmpfs", folder)


def unshare_mounts() -> None:
    """Go on with mounts of our own."""
    _leave(0x00020000)
    run("mount", "--make-rprivate", "/")


def leave_the_machines_network() -> None:
    """Go on with a network of our own: nothing of it is reachable from outside."""
    _leave(0x40000000)
    Path("/run/netns").mkdir(exist_ok=True)
    run("mount", "-t", "tmpfs", "tmpfs", "/run/netns")


def _leave(namespace: int) -> None:
    if ctypes.CDLL(None, use_errno=True).unshare(namespace):
        raise PodError(f"no namespace of its own: {os.strerror(ctypes.get_errno())}")


def named(pods: list[Pod], name: str) -> list[Pod]:
    return [pod for pod in pods if pod.workload["metadata"]["name"] == name]


def show_that_it_works(overlay: Path, images: Mapping[str, Image], folder: Path, command: list[str] | None) -> None:
    """Start everything, wait until it is ready, run the notebooks' Job against it, then what needs its model."""
    manifests = render(overlay)
    if {"model-endpoint", "dask-worker"} & {w["metadata"]["name"] for w in workloads(manifests)}:
        add_client(manifests)
    if "dask-worker" in {w["metadata"]["name"] for w in workloads(manifests)}:
        add_step(manifests)
    if command:
        job = next(w for w in workloads(manifests) if w["metadata"]["name"] == "notebooks")
        pod_spec(job)["containers"][0]["command"] = command
    cluster = Cluster(manifests, images, folder)
    notebooks, watches, clients, steps = (named(cluster.pods, name) for name in ("notebooks", "drift", "client", STEP))
    jobs = [pod for pod in cluster.pods if pod.is_job and pod not in (*notebooks, *watches, *clients, *steps)]
    replicas = [pod for pod in cluster.pods if is_endpoint(pod)]
    servers = [pod for pod in cluster.pods if not pod.is_job and pod not in replicas]
    begun = time.monotonic()
    try:
        cluster.connect()
        for pod in (*servers, *jobs, *replicas, *clients):
            cluster.start_pod(pod)
        cluster.wait(lambda pod: pod.done, timeout_s=START_TIMEOUT_S, what="done", of=jobs)
        cluster.wait(lambda pod: pod.ready, timeout_s=START_TIMEOUT_S, what="ready", of=servers)
        print(
            f"  {len(servers)} pods ready and {len(jobs)} Jobs done after {time.monotonic() - begun:.0f} s", flush=True
        )
        show_that_calls_are_refused(cluster)
        if replicas:
            show_that_it_waits_for_a_champion(cluster, replicas)
        for pod in notebooks:
            cluster.start_pod(pod)
        cluster.wait(lambda pod: pod.done, timeout_s=900, what="done", of=notebooks)
        for pod in notebooks:
            print(f"  the notebooks' Job is done after {time.monotonic() - begun:.0f} s:")
            print("".join(f"    | {line}\n" for line in pod.containers[-1].log.read_text().splitlines()[-25:]))
        cluster.wait(lambda pod: pod.ready, timeout_s=5, what="ready any more", of=servers)
        if named(servers, "dask-worker"):
            show_the_workers(cluster, servers, asked_by_notebooks=not command)
            for pod in steps:
                show_that_a_step_uses_the_workers(cluster, pod)
        if replicas:
            people = show_the_endpoint(cluster, replicas)
            for watch in watches:
                show_the_drift_watch(cluster, watch, people=people)
        # Side by side: the one mostly waits, the other mostly imports MLflow.
        with ThreadPoolExecutor() as pool:
            shown = []
            if named(servers, "redis-proxy"):
                shown.append(pool.submit(show_a_failover, cluster, servers))
            if named(servers, "postgres"):
                shown.append(pool.submit(show_backup_and_rotation, cluster, servers, overlay))
            for each in shown:
                each.result()
        if replicas:
            show_the_endpoint_again(cluster, replicas)
        check_denied(cluster)
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
    password = secret_data(users)["REDIS_PASSWORD"].decode()

    def role(pod: Pod) -> str:
        with redis.Redis(pod.address, password=password, socket_timeout=2) as node:
            return str(node.info("replication")["role"])

    primary = next(pod for pod in nodes if role(pod) == "master")
    address = cluster.services["redis"][1]
    with redis.Redis(address, password=password, socket_timeout=2) as store:
        users, taken = store.dbsize(), int(store.info("memory")["used_memory_dataset"])
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
    print(f"  Redis held {users:,} users in {taken / 2**20:.1f} MiB and lost its primary {primary.name}:")
    print(f"  writes again after {took_s:.0f} s, nothing lost, it follows now")


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


def experiments(cluster: Cluster, pod: Pod) -> dict[str, str]:
    found = mlflow(cluster, pod, "experiments/search", {"max_results": 1000})["experiments"]
    return {experiment["name"]: experiment["experiment_id"] for experiment in found}


def psql(cluster: Cluster, statement: str) -> str:
    command = ("psql", "-U", "mlflow", "--no-psqlrc", "--tuples-only", "--no-align", "--set=ON_ERROR_STOP=1", "mlflow")
    return cluster.execute("postgres-0", *command, stdin=statement.encode()).decode().strip()


def postgres_password(cluster: Cluster) -> str:
    secret = next(s for s in of_kind(cluster.manifests, "Secret") if "POSTGRES_PASSWORD" in s.get("data", {}))
    return secret_data(secret)["POSTGRES_PASSWORD"].decode()


def log_in_as(cluster: Cluster, overlay: Path, login: str) -> None:
    """Make MLflow's secrets anew for another login and render again, so that pods that start read those."""
    values = overlay / "secrets" / "values.env"
    values.write_text(values.read_text() + f"POSTGRES_LOGIN={login}\n")
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


def without_token(container: dict[str, Any]) -> None:
    container["env"].append({"name": "MODEL_ENDPOINT_TOKEN", "value": ""})


def show_that_mutations_fail(manifests: list[Manifest], images: Mapping[str, Image], folder: Path) -> None:
    """A harness that can't fail shows nothing: break a spec, and expect the reason."""
    cases = (
        ("a mount removed", "seaweedfs", without_mount("/etc/seaweedfs"), r"container seaweedfs: "),
        ("a limit too small", "seaweedfs", with_limit("16Mi"), r"more memory than its limit of 16 MiB"),
        (
            "no token",
            "model-endpoint",
            without_token,
            r"anyone who reaches 0\.0\.0\.0 could ask; set MODEL_ENDPOINT_TOKEN",
        ),
    )
    there = {w["metadata"]["name"] for w in workloads(manifests)}
    for index, (what, workload, change, expected) in enumerate(case for case in cases if case[1] in there):
        cluster = Cluster(mutated(manifests, workload, change), images, folder / str(index), max_restarts=0)
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
    parser.add_argument(
        "--roots", type=Path, help="where Debian's roots are, or are made and kept: saves half a minute"
    )
    parser.add_argument(
        "--image", action="store_true", help="build the notebooks' image (buildah) and run the Job in it"
    )
    parser.add_argument("--command", help="run this in the notebooks' Job instead of its own command")
    parser.add_argument("--keep", action="store_true", help="keep the logs")
    options = parser.parse_args()
    # A user's pod is made like the notebooks' Job.
    for component, maker in (("dask", "notebooks"), ("endpoint", "notebooks"), ("drift", "endpoint")):
        if component in options.component and maker not in options.component:
            parser.error(f"--component {component} needs --component {maker}, which makes what it works on or asks it")
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
        roots = options.roots or folder / "images"
        if not (roots / "servers").exists():
            make_roots(roots)
        images = stand_ins(roots)
        if options.image:
            images["mlplatform"] = built_image(folder / "images" / "notebooks")
        leave_the_machines_network()
        print(f"  file systems after {time.monotonic() - begun:.0f} s", flush=True)
        overlay = compose(folder / "manifests", overlay=options.overlay, components=options.component)
        manifests = render(overlay)
        print(f"pods of overlay {options.overlay} with {', '.join(options.component) or 'nothing added'}", flush=True)
        command = json.loads(options.command) if options.command else None
        show_that_it_works(overlay, images, folder / "run", command)
        print("mutations", flush=True)
        show_that_mutations_fail(manifests, images, folder / "mutations")
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
