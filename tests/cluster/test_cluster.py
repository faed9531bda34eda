"""Putting the platform on a cluster, watching, reaching and removing it, against a stand-in for the API server."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import socketserver
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from configparser import ConfigParser
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import yaml
from fake_cluster import FakeCluster, serve, use, write_kubeconfig
from manifests import DEPLOY, compose
from sqlalchemy import make_url

from mlplatform.errors import ClusterError, PortTakenError
from mlplatform.settings import Settings, s3_attempts
from mlplatform_ops.cluster.api import looks_like_production
from mlplatform_ops.cluster.cluster import Cluster
from mlplatform_ops.cluster.credentials import GROUPS, PREVIOUS, changed_values, derived_files, write_secrets
from mlplatform_ops.cluster.forwards import Forward
from mlplatform_ops.cluster.kubectl import render
from mlplatform_ops.cluster.overlay import read_env
from mlplatform_ops.cluster.rollouts import Workload, describe
from mlplatform_ops.ports import free_port


@pytest.fixture
def overlay(tmp_path: Path) -> Path:
    return compose(tmp_path)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCluster]:
    with serve(tmp_path) as (cluster, kubeconfig):
        use(kubeconfig, monkeypatch)
        yield cluster


# --- secrets


def test_secrets_are_random_private_and_kept(tmp_path: Path) -> None:
    overlay = compose(tmp_path)
    files = sorted((overlay / "secrets").iterdir())
    assert {stat.S_IMODE(path.stat().st_mode) for path in files if path.name != "values.env"} == {0o600}
    before = {path.name: path.read_text() for path in files}
    assert write_secrets(overlay) == []
    assert {path.name: path.read_text() for path in files} == before
    values = read_env(overlay / "secrets" / "values.env")
    assert len(set(values.values())) == len(values)
    (overlay / "secrets" / "values.env").unlink()
    (overlay / "secrets" / "client.env").unlink()
    write_secrets(overlay)
    assert read_env(overlay / "secrets" / "values.env") != values
    assert stat.S_IMODE((overlay / "secrets" / "values.env").stat().st_mode) == 0o600


def test_values_are_edited_and_every_other_file_is_made_from_them(overlay: Path) -> None:
    folder = overlay / "secrets"
    acl = (folder / "users.acl").read_text()
    (folder / "users.acl").write_text("user default on nopass ~* +@all\n")
    values = read_env(folder / "values.env") | {"REDIS_PASSWORD": "chosen-by-somebody"}
    (folder / "values.env").write_text("".join(f"{name}={value}\n" for name, value in values.items()))
    lines: list[str] = []
    write_secrets(overlay, notify=lines.append)
    assert {line.rsplit("/", 1)[1] for line in lines} == {"users.acl", "redis.env", "client.env"}
    assert read_env(folder / "values.env") == values
    assert "chosen-by-somebody" in (folder / "users.acl").read_text()
    assert (folder / "users.acl").read_text().splitlines()[1:] == acl.splitlines()[1:]


@pytest.mark.parametrize("group", sorted(GROUPS))
def test_a_rotated_secret_is_valid_beside_the_old_one_until_that_is_retired(tmp_path: Path, group: str) -> None:
    overlay = compose(tmp_path, overlay="production")
    path = overlay / "secrets" / "values.env"
    old = read_env(path)
    write_secrets(overlay, rotate=[group])
    both = read_env(path)
    for name in GROUPS[group]:
        assert both[name] != old[name]
        assert both[name + PREVIOUS] == old[name]
    with pytest.raises(ClusterError, match=f"RETIRE={group}"):
        write_secrets(overlay, rotate=[group])
    write_secrets(overlay, retire=[group])
    assert read_env(path) == {name: value for name, value in both.items() if not name.endswith(PREVIOUS)}


def test_servers_accept_old_and_new_values_during_a_rotation(tmp_path: Path) -> None:
    overlay = compose(tmp_path, overlay="production")
    old = read_env(overlay / "secrets" / "values.env")
    write_secrets(overlay, rotate=["redis", "object-store", "feature-server"])
    new = read_env(overlay / "secrets" / "values.env")
    acl = (overlay / "secrets" / "users.acl").read_text().splitlines()[0]
    identities = (overlay / "secrets" / "s3.json").read_text()
    server = (overlay / "secrets" / "feature-server.env").read_text()
    client = (overlay / "secrets" / "client.env").read_text()
    for values in (old, new):
        assert f">{values['REDIS_PASSWORD']} " in acl
        assert values["S3_ACCESS_KEY"] in identities
        assert values["FEATURE_SERVER_TOKEN"] in server
    assert new["REDIS_PASSWORD"] in client
    assert old["REDIS_PASSWORD"] not in client


def test_a_group_that_does_not_exist_is_named(overlay: Path) -> None:
    with pytest.raises(ClusterError, match=r"no secrets are called 'radis'; choose from .*redis"):
        write_secrets(overlay, rotate=["radis"])


def test_an_overlay_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="no overlay at"):
        write_secrets(tmp_path / "nowhere")


def test_a_missing_secret_file_is_named_with_what_makes_it(overlay: Path) -> None:
    (overlay / "secrets" / "client.env").unlink()
    with pytest.raises(ClusterError, match=r"client\.env is missing; run 'make k8s-secrets'"):
        render(overlay)


def test_the_feature_server_can_only_read_where_the_store_knows_identities() -> None:
    values = changed_values({})
    assert "reader" in derived_files(values, postgres=False, seaweedfs=True)["feature-server.env"].splitlines()[0]
    assert "platform" in derived_files(values, postgres=False, seaweedfs=False)["feature-server.env"].splitlines()[0]


@pytest.mark.parametrize(
    ("named", "where"),
    [
        ({}, "mlflow:{POSTGRES_PASSWORD}@postgres:5432"),
        ({"POSTGRES_LOGIN": "mlflow_b:other"}, "mlflow_b:other@postgres:5432"),
        ({"POSTGRES_ADDRESS": "db.example.com:5433"}, "mlflow:{POSTGRES_PASSWORD}@db.example.com:5433"),
    ],
)
def test_mlflow_finds_postgres_as_the_values_say_after_a_rotation_too(
    tmp_path: Path, named: dict[str, str], where: str
) -> None:
    overlay = compose(tmp_path, overlay="production")
    folder = overlay / "secrets"
    with (folder / "values.env").open("a") as values:
        values.writelines(f"{name}={value}\n" for name, value in named.items())
    write_secrets(overlay, rotate=["mlflow"])
    address = f"postgresql+psycopg2://{where.format(**read_env(folder / 'values.env'))}"
    assert f"MLFLOW_BACKEND_STORE_URI={address}/mlflow\n" in (folder / "mlflow-database.env").read_text()
    assert f"database_uri = {address}/mlflow_auth\n" in (folder / "basic_auth.ini").read_text()


def test_the_files_follow_the_overlay(tmp_path: Path) -> None:
    overlay = compose(tmp_path)
    folder, file = overlay / "secrets", overlay / "kustomization.yaml"
    production = compose(tmp_path / "production", overlay="production")
    file.write_text((production / "kustomization.yaml").read_text())
    kept = (folder / "users.acl").read_text()
    write_secrets(overlay)
    assert "database_uri = postgresql" in (folder / "basic_auth.ini").read_text()
    assert "reader-" in (folder / "feature-server.env").read_text()
    assert (folder / "users.acl").read_text() == kept


@pytest.mark.parametrize("login", ["mlflow:p@ss/w%rd:1", "team b:ü"])
def test_postgres_gets_user_and_password_as_they_were_given(tmp_path: Path, login: str) -> None:
    overlay = compose(tmp_path, overlay="production")
    with (overlay / "secrets" / "values.env").open("a") as values:
        values.write(f"POSTGRES_LOGIN={login}\n")
    write_secrets(overlay)
    users = ConfigParser()
    users.read(overlay / "secrets" / "basic_auth.ini")
    database = read_env(overlay / "secrets" / "mlflow-database.env")
    for address in (users["mlflow"]["database_uri"], database["MLFLOW_BACKEND_STORE_URI"]):
        url = make_url(address)
        assert f"{url.username}:{url.password}" == login
        assert url.host == "postgres"


def test_a_password_with_a_percent_sign_reaches_mlflow(overlay: Path) -> None:
    odd = "50%off"
    with (overlay / "secrets" / "values.env").open("a") as values:
        values.write(f"MLFLOW_ADMIN_PASSWORD={odd}\n")
    write_secrets(overlay)
    users = ConfigParser()
    users.read(overlay / "secrets" / "basic_auth.ini")
    assert users["mlflow"]["admin_password"] == odd


# --- contexts


@pytest.mark.parametrize("name", ["production", "eks-prod-1", "PROD", "arn:aws:eks:eu:1:cluster/live", "gke_x_prd"])
def test_a_name_that_looks_like_production_is_seen(name: str) -> None:
    assert looks_like_production(name)


@pytest.mark.parametrize("name", ["kind-test", "product-team", "reproduce", "olive", "docker-desktop"])
def test_a_name_that_only_resembles_one_is_not(name: str) -> None:
    assert not looks_like_production(name)


def test_production_is_touched_only_after_a_confirmation(
    tmp_path: Path, overlay: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve(tmp_path, context="eks-prod") as (_, kubeconfig):
        use(kubeconfig, monkeypatch)
        with pytest.raises(ClusterError, match=r"eks-prod looks like production; .* --yes"):
            Cluster(overlay)
        asked: list[str] = []
        lines: list[str] = []
        Cluster(overlay, confirm=lambda question: not asked.append(question), notify=lines.append)
        assert asked == ["eks-prod looks like production. Go on?"]
        assert "eks-prod" in lines[0]
        Cluster(overlay, yes=True)


def test_an_unknown_context_is_named_with_those_there_are(fake: FakeCluster, overlay: Path) -> None:
    with pytest.raises(
        ClusterError, match="no context 'kind-tets' in the kubeconfig; name one with CONTEXT=: kind-test"
    ):
        Cluster(overlay, context="kind-tets")


def test_the_names_of_cluster_and_server_can_look_like_production_too(
    tmp_path: Path, overlay: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve(tmp_path) as (_, kubeconfig):
        server = yaml.safe_load(kubeconfig.read_text())["clusters"][0]["cluster"]["server"]
        use(write_kubeconfig(tmp_path / "config", server, "work", cluster="prod-eu"), monkeypatch)
        with pytest.raises(ClusterError, match="work looks like production"):
            Cluster(overlay)


def test_a_context_need_not_be_the_current_one_when_it_is_named(
    tmp_path: Path, overlay: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve(tmp_path) as (_, kubeconfig):
        server = yaml.safe_load(kubeconfig.read_text())["clusters"][0]["cluster"]["server"]
        use(write_kubeconfig(tmp_path / "config", server, "work", current=False), monkeypatch)
        assert Cluster(overlay, context="work").context == "work"
        with pytest.raises(ClusterError, match="the kubeconfig has no current context; name one with CONTEXT=: work"):
            Cluster(overlay)


def test_no_kubeconfig_is_said(tmp_path: Path, overlay: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use(tmp_path / "nothing", monkeypatch)
    with pytest.raises(ClusterError, match="no kubeconfig to find a cluster in"):
        Cluster(overlay)


def test_a_cluster_that_does_not_answer_is_named_within_seconds(
    tmp_path: Path, overlay: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(write_kubeconfig(tmp_path / "config", f"http://127.0.0.1:{free_port()}", "kind-away"), monkeypatch)
    begun = time.monotonic()
    with pytest.raises(ClusterError, match=r"the cluster of context kind-away .* does not answer; start it"):
        Cluster(overlay)
    assert time.monotonic() - begun < 15


# --- up, status, down


def test_up_applies_every_object_server_side_and_shows_each_rollout(fake: FakeCluster, overlay: Path) -> None:
    lines: list[str] = []
    Cluster(overlay, notify=lines.append).up()
    applied = {name for _, name in fake.objects}
    assert applied == {manifest["metadata"]["name"] for manifest in render(overlay)}
    assert {kind for method, _, kind in fake.requests if method == "PATCH"} == {"application/apply-patch+yaml"}
    assert re.fullmatch(r"context kind-test \(cluster c, http://127.0.0.1:\d+\), namespace mlplatform", lines[0])
    assert "Deployment mlflow: 1/1 ready" in lines
    assert "Job buckets: done" in lines


def test_up_ends_when_kubectl_says_that_every_rollout_is_done(fake: FakeCluster, overlay: Path) -> None:
    fake.unavailable = {"mlflow"}
    lines: list[str] = []
    with pytest.raises(ClusterError, match=r"kubectl rollout on kind-test failed: .*timed out waiting"):
        Cluster(overlay, notify=lines.append).up(timeout_s=3)
    assert "Deployment mlflow: 1/1 ready" in lines


def test_new_secrets_are_not_made_for_a_cluster_that_holds_data(fake: FakeCluster, overlay: Path) -> None:
    Cluster(overlay).up()
    before = dict(fake.objects)
    shutil.rmtree(overlay / "secrets")
    refused = r"on kind-test was made with other secrets than .*/secrets holds; put that folder back"
    with pytest.raises(ClusterError, match=refused):
        Cluster(overlay).up()
    assert not (overlay / "secrets").exists()
    # Nor are those of somebody who made some, as an error message may have told them to.
    write_secrets(overlay)
    with pytest.raises(ClusterError, match=refused):
        Cluster(overlay).up()
    assert fake.objects == before


def test_a_rotation_is_no_other_platform(fake: FakeCluster, overlay: Path) -> None:
    for change in ({}, {"rotate": ["object-store"]}, {"retire": ["object-store"]}):
        write_secrets(overlay, **change)
        Cluster(overlay).up()


def test_the_namespace_is_the_overlays(fake: FakeCluster, overlay: Path) -> None:
    file = overlay / "kustomization.yaml"
    file.write_text(file.read_text().replace("namespace: mlplatform", "namespace: team-b"))
    for _ in range(2):
        Cluster(overlay).up()
    assert {path.split("/namespaces/")[1].split("/")[0] for _, path, _ in fake.requests} == {"team-b"}
    assert "DELETE" in {method for method, _, _ in fake.requests}
    file.write_text(file.read_text().replace("namespace: team-b\n", ""))
    with pytest.raises(ClusterError, match=r"kustomization\.yaml names no namespace"):
        Cluster(overlay)


def test_up_goes_on_when_the_api_server_is_away_for_a_moment(fake: FakeCluster, overlay: Path) -> None:
    lines: list[str] = []
    fake.failures = [504, 429]
    Cluster(overlay, notify=lines.append).up()
    assert "the cluster of context kind-test answers 504: not now" in lines
    fake.failures = [403]
    with pytest.raises(ClusterError, match="refuses: not now; check the context's user"):
        Cluster(overlay).up()


def test_up_again_after_a_rotation_runs_the_jobs_anew(fake: FakeCluster, overlay: Path) -> None:
    cluster = Cluster(overlay)
    cluster.up()
    write_secrets(overlay, rotate=["object-store"])
    fake.requests.clear()
    cluster.up()
    assert ("DELETE", "/apis/batch/v1/namespaces/mlplatform/jobs/buckets", "") in fake.requests
    assert ("jobs", "buckets") in fake.objects


def test_a_job_that_is_done_and_deleted_before_the_rest_is_up_holds_nothing_up(
    fake: FakeCluster, overlay: Path
) -> None:
    fake.waiting["mlflow"] = "ContainerCreating"

    def expire(line: str) -> None:
        if line == "Job buckets: done":
            del fake.objects["jobs", "buckets"]
            fake.waiting.clear()

    Cluster(overlay, notify=expire).up(timeout_s=10)
    assert ("jobs", "buckets") not in fake.objects


def test_users_that_servers_read_again_are_applied_alone(fake: FakeCluster, tmp_path: Path) -> None:
    """The command in deploy/production.md."""
    overlay = compose(tmp_path / "production", overlay="production")
    kubectl = str(Path(sys.executable).parent / "kubectl")
    rendered = subprocess.run([kubectl, "kustomize", str(overlay)], capture_output=True, check=True).stdout
    options = ["--server-side", "--field-manager=mlplatform", "--validate=false"]
    only = ["--selector", "app.kubernetes.io/component=identities"]
    subprocess.run([kubectl, "apply", *options, *only, "-f", "-"], input=rendered, capture_output=True, check=True)
    assert set(fake.objects) == {("secrets", "redis-users"), ("secrets", "seaweedfs-identities")}


def test_a_pod_that_never_gets_ready_is_named_with_its_last_events_and_log(fake: FakeCluster, overlay: Path) -> None:
    fake.waiting["mlflow"] = "PodInitializing"
    lines: list[str] = []
    with pytest.raises(
        ClusterError, match=r"pod mlflow-0 does not come up: PodInitializing: .*; see 'kubectl --context"
    ):
        Cluster(overlay, notify=lines.append).up(timeout_s=1)
    assert "  event Failed: 0/1 nodes hold the image" in lines
    assert "  log   no such table: experiments" in lines


def test_all_that_is_stuck_is_named_and_first_what_has_a_reason(fake: FakeCluster, overlay: Path) -> None:
    fake.waiting = {"feature-server": "", "minio": "ContainerCreating", "redis": "ContainerCreating"}
    lines: list[str] = []
    with pytest.raises(ClusterError, match=r"pod minio-0 does not come up: .* \(nor do redis, feature-server\)"):
        Cluster(overlay, notify=lines.append).up(timeout_s=1)
    assert {"pod minio-0:", "pod redis-0:"} <= set(lines)


def test_why_no_pod_is_made_is_said_early(fake: FakeCluster, overlay: Path) -> None:
    fake.refused["redis"] = "pods redis-0 is forbidden: exceeded quota"
    lines: list[str] = []
    with pytest.raises(ClusterError, match=r"statefulset redis does not come up: FailedCreate: .* exceeded quota"):
        Cluster(overlay, notify=lines.append).up(stuck_after_s=1)
    assert "  event FailedCreate: pods redis-0 is forbidden: exceeded quota" in lines


def test_a_refusal_of_earlier_is_not_held_against_pods_that_were_made_since(fake: FakeCluster, overlay: Path) -> None:
    cluster = Cluster(overlay)
    cluster.up()
    fake.refused["redis"], fake.pods["redis"] = "exceeded quota, an hour ago", ["redis-0"]
    (redis,) = (workload for workload in cluster.workloads() if workload.name == "redis")
    assert (redis.done, redis.reason) == (False, "")


def test_an_image_that_can_not_be_pulled_ends_the_wait_early(fake: FakeCluster, overlay: Path) -> None:
    fake.waiting["feature-server"] = "ImagePullBackOff"
    begun = time.monotonic()
    with pytest.raises(ClusterError, match="pod feature-server-0 does not come up: ImagePullBackOff"):
        Cluster(overlay).up(timeout_s=300, stuck_after_s=1)
    assert time.monotonic() - begun < 30


def test_down_keeps_the_volumes_unless_their_deletion_is_confirmed(fake: FakeCluster, overlay: Path) -> None:
    Cluster(overlay).up()
    asked: list[str] = []
    Cluster(overlay, yes=True, confirm=lambda question: bool(asked.append(question))).down()
    assert set(fake.objects) == {("namespaces", "mlplatform"), ("persistentvolumeclaims", "mlflow")}
    assert "with all data" in asked[0]
    Cluster(overlay, confirm=lambda _: True).down()
    assert ("namespaces", "mlplatform") not in fake.objects


def test_down_leaves_nothing_that_a_component_made(fake: FakeCluster, tmp_path: Path) -> None:
    everything = [path.name for path in (DEPLOY / "components").iterdir() if path.name != "pipeline"]
    overlay = compose(tmp_path, components=everything)
    Cluster(overlay).up()
    assert ("cronjobs", "drift") in fake.objects
    Cluster(overlay, yes=True).down()
    assert set(fake.objects) == {("namespaces", "mlplatform")}


def test_status_tells_ready_from_waiting(fake: FakeCluster, overlay: Path) -> None:
    cluster = Cluster(overlay)
    cluster.up()
    fake.waiting["redis"] = "CrashLoopBackOff"
    found = {workload.name: workload for workload in cluster.workloads()}
    assert found["mlflow"].done
    assert not found["redis"].done
    assert describe(found["redis"]) == "StatefulSet redis: 0/1 ready, CrashLoopBackOff: as the test wants, 3 restarts"
    assert describe(Workload("Job", "buckets", 1, 1, True)) == "Job buckets: done"


# --- forwarding


RELAY = """
import socket, sys
server = socket.create_server(("127.0.0.1", int(sys.argv[1])))
print("Forwarding from 127.0.0.1:" + sys.argv[1], flush=True)
while True:
    connection, _ = server.accept()
    connection.sendall(sys.argv[2].encode())
    connection.close()
"""


def _relay(pod: str, local: int, remote: int) -> list[str]:
    return [sys.executable, "-c", RELAY, str(local), f"{pod}:{remote}"]


def _ask(port: int) -> str:
    with socket.create_connection(("127.0.0.1", port), 2) as connection:
        return connection.recv(100).decode()


@pytest.fixture
def echo() -> Iterator[int]:
    """The port of a server that sends back what it gets."""

    class Echo(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with suppress(ConnectionError):
                while data := self.request.recv(65536):
                    self.request.sendall(data)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Echo) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


def _send(port: int, data: bytes) -> bytes:
    """Send something through a forward, and return what comes back before it ends."""
    with socket.create_connection(("127.0.0.1", port), 10) as connection:

        def write() -> None:
            with suppress(OSError):
                connection.sendall(data)
                connection.shutdown(socket.SHUT_WR)

        thread = threading.Thread(target=write)
        thread.start()
        got = b""
        with suppress(ConnectionError):
            while piece := connection.recv(65536):
                got += piece
        thread.join()
    return got


def _eventually(check: Callable[[], bool], timeout_s: float = 15) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            if check():
                return
        except OSError:
            pass
        time.sleep(0.1)
    pytest.fail("did not happen")


def test_a_forward_that_drops_in_the_middle_of_a_run_comes_back_on_the_same_port() -> None:
    port = free_port()
    started: list[int] = []

    def command(pod: str, local: int, remote: int) -> list[str]:
        started.append(remote)
        return _relay(pod, local, remote)

    forward = Forward("mlflow", port, lambda: [("mlflow-0", 5000, True)], command)
    try:
        forward.start()
        assert _ask(port) == "mlflow-0:5000"
        process = forward._process
        assert process is not None
        os.kill(process.pid, signal.SIGKILL)
        _eventually(lambda: len(started) == 2 and _ask(port) == "mlflow-0:5000")
    finally:
        forward.stop()


def test_a_forward_follows_when_its_pod_is_replaced() -> None:
    port, pods, lines = free_port(), ["mlflow-a"], list[str]()
    forward = Forward("mlflow", port, lambda: [(pod, 5000, True) for pod in pods], _relay, lines.append)
    try:
        forward.start()
        pods[:] = []
        time.sleep(1.5)
        pods[:] = ["mlflow-b"]
        _eventually(lambda: _ask(port) == "mlflow-b:5000")
        assert lines == ["mlflow: the forward to mlflow-a dropped; leading to mlflow-b"]
    finally:
        forward.stop()


def test_a_forward_that_works_outlives_an_api_server_that_is_away() -> None:
    port, away, asked = free_port(), threading.Event(), list[float]()

    def target() -> list[tuple[str, int, bool]]:
        if away.is_set():
            asked.append(time.monotonic())
            raise ClusterError("the cluster does not answer")
        return [("mlflow-0", 5000, True)]

    forward = Forward("mlflow", port, target, _relay)
    try:
        forward.start()
        process = forward._process
        away.set()
        _eventually(lambda: len(asked) >= 2)
        assert _ask(port) == "mlflow-0:5000"
        assert forward._process is process
    finally:
        forward.stop()


def test_a_forward_stays_with_a_pod_that_is_not_ready_until_another_one_is() -> None:
    port, ready, asked = free_port(), {"mlflow-a": True}, list[bool]()

    def target() -> list[tuple[str, int, bool]]:
        asked.append(ready["mlflow-a"])
        return [(pod, 5000, is_ready) for pod, is_ready in ready.items()]

    forward = Forward("mlflow", port, target, _relay)
    try:
        forward.start()
        process = forward._process
        ready["mlflow-a"] = False
        _eventually(lambda: asked.count(False) >= 2)
        assert _ask(port) == "mlflow-a:5000"
        assert forward._process is process
        ready["mlflow-b"] = True
        _eventually(lambda: _ask(port) == "mlflow-b:5000")
    finally:
        forward.stop()


def test_a_port_that_is_taken_while_forwarding_is_named(fake: FakeCluster, overlay: Path) -> None:
    cluster = Cluster(overlay)
    cluster.up()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = fake.backends["mlflow-0"] = server.getsockname()[1]
        forward = Forward("mlflow", port, lambda: [("mlflow-0", 5000, True)], cluster._forward_command)
        try:
            with pytest.raises(PortTakenError, match=rf"port {port}, on which mlflow is.*MLPLATFORM_MLFLOW_PORT"):
                forward.start()
        finally:
            forward.stop()


def test_kubectl_carries_what_is_sent_and_a_lost_connection_is_made_anew(
    fake: FakeCluster, overlay: Path, echo: int
) -> None:
    said: list[str] = []
    cluster = Cluster(overlay, notify=said.append)
    cluster.up()
    fake.backends = dict.fromkeys(("mlflow-0", "minio-0", "redis-0", "feature-server-0"), echo)
    with cluster.forwarded({}) as settings, ThreadPoolExecutor(8) as clients:
        port = int(settings.tracking_uri.rsplit(":", 1)[1])
        sent = [os.urandom(200_000) for _ in range(20)]
        assert list(clients.map(partial(_send, port), sent)) == sent
        fake.drops["mlflow-0"] = 3
        assert _send(port, sent[0]) != sent[0]
        _eventually(lambda: _send(port, sent[0]) == sent[0])
    assert said[-1] == "mlflow: the forward to mlflow-0 dropped; leading to mlflow-0"


def test_what_kubectl_says_of_a_forward_that_never_opens_is_said(fake: FakeCluster, overlay: Path) -> None:
    cluster = Cluster(overlay)
    cluster.up()
    forward = Forward("mlflow", free_port(), lambda: [("mlflow-0", 5000, True)], cluster._forward_command)
    try:
        with pytest.raises(
            ClusterError, match=r"mlflow can't be forwarded within 2 s: error: .*; run 'make k8s-status'"
        ):
            forward.start(timeout_s=2)
    finally:
        forward.stop()


def test_a_service_without_a_ready_pod_is_named() -> None:
    forward = Forward("redis", free_port(), lambda: [], _relay)
    try:
        with pytest.raises(ClusterError, match="redis can't be forwarded within 1 s; run 'make k8s-status'"):
            forward.start(timeout_s=1)
    finally:
        forward.stop()


def test_a_port_that_the_user_set_and_that_is_taken_is_an_error(fake: FakeCluster, overlay: Path) -> None:
    cluster = Cluster(overlay)
    cluster.up()
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        pytest.raises(PortTakenError, match=r"MLPLATFORM_REDIS_PORT=\d+, on which redis is to be forwarded, is taken"),
        cluster.forwarded({"MLPLATFORM_REDIS_PORT": str(server.getsockname()[1])}),
    ):
        pass


def test_forwarding_before_up_says_what_to_run(fake: FakeCluster, overlay: Path) -> None:
    with pytest.raises(ClusterError, match="run 'make k8s-up'"), Cluster(overlay).forwarded({}):
        pass


def test_forwarding_gives_settings_with_the_clusters_credentials(
    fake: FakeCluster, overlay: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = Cluster(overlay)
    cluster.up()
    monkeypatch.setattr(cluster, "_forward_command", _relay)
    secrets = read_env(overlay / "secrets" / "client.env")
    with cluster.forwarded({}) as settings:
        assert settings.tracking_username == secrets["MLFLOW_TRACKING_USERNAME"]
        assert int(settings.to_env()["AWS_MAX_ATTEMPTS"]) > s3_attempts({})
        assert settings.redis.endswith(secrets["REDIS_CONNECTION_STRING"].split(",")[1])
        assert _ask(int(settings.tracking_uri.rsplit(":", 1)[1])) == "mlflow-0:5000"
        assert _ask(int(settings.s3_endpoint.rsplit(":", 1)[1])) == "minio-0:9000"
    with pytest.raises(OSError, match="refused"):
        _ask(int(settings.tracking_uri.rsplit(":", 1)[1]))
    assert not {"DASK_SCHEDULER_ADDRESS", "DASK_CONFIG"} & set(settings.to_env())


def test_forwarding_leads_to_dasks_scheduler_where_there_is_one(
    fake: FakeCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overlay = compose(tmp_path / "with dask", components=["dask"])
    cluster = Cluster(overlay)
    cluster.up()
    monkeypatch.setattr(cluster, "_forward_command", _relay)
    with cluster.forwarded({}) as settings:
        address, port = settings.dask_scheduler.rsplit(":", 1)
        assert address == "tls://127.0.0.1"
        assert re.fullmatch(r"dask-scheduler-\w+:8786", _ask(int(port)))
        file = Path(settings.to_env()["DASK_CONFIG"])
        assert file == (overlay / "secrets" / "dask.yaml").resolve()
        assert Settings.from_env(settings.to_env()) == settings
    file.unlink()
    with pytest.raises(ClusterError, match=r"dask\.yaml is missing; run 'make k8s-secrets'"), cluster.forwarded({}):
        pass


def test_the_commands_leave_it_to_what_reads_dasks_settings_to_import_dask() -> None:
    # It reads DASK_CONFIG when it is imported, and a forward sets that.
    code = "import mlplatform_ops.cli, mlplatform_ops.cluster.cluster, sys; sys.exit('dask' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_dasks_certificates_follow_from_one_value(tmp_path: Path) -> None:
    overlay = compose(tmp_path, components=["dask"])
    values, file = overlay / "secrets" / "values.env", overlay / "secrets" / "dask.yaml"
    before = file.read_text()
    tls = yaml.safe_load(before)["distributed"]["comm"]["tls"]
    assert tls["client"] == tls["scheduler"] == tls["worker"]
    file.unlink()
    write_secrets(overlay)
    assert file.read_text() == before
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    seed = read_env(values)["DASK_CERTIFICATE_SEED"]
    assert seed not in before
    values.write_text(values.read_text().replace(seed, seed[::-1]))
    write_secrets(overlay)
    again = yaml.safe_load(file.read_text())["distributed"]["comm"]["tls"]
    assert again["ca-file"] != tls["ca-file"]


def test_kubectl_is_called_with_the_context_by_name(
    fake: FakeCluster, overlay: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    real = subprocess.run

    def record(command: list[str], **options: object) -> object:
        seen.append([str(part) for part in command])
        return real(command, **options)  # type: ignore[call-overload]

    monkeypatch.setattr("mlplatform_ops.cluster.cluster.subprocess.run", record)
    Cluster(overlay).up()
    calls = [command for command in seen if not {"kustomize", "config"} & set(command)]
    assert calls
    assert all(command[1:3] == ["--context", "kind-test"] for command in calls)
