"""Real faults on a platform of its own: every process killed, every service stopped without dying, settings damaged."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from mlplatform import features
from mlplatform.connection import UNSUPERVISED, check_services, connect, s3_client
from mlplatform.errors import PlatformError, ServiceDownError
from mlplatform.settings import REGISTRY_BUCKET, STATE_VARIABLE
from mlplatform_ops.cli import main
from mlplatform_ops.embedded.platform import EmbeddedPlatform
from mlplatform_ops.embedded.services import SERVICES
from mlplatform_ops.embedded.supervisor import OWNER_VARIABLE, processes_of

CORE = [service.name for service in SERVICES if not service.on_demand]
# What the rules promise is 15 s on a machine that is not busy with other tests; this only bounds the wait.
BOUND_S = 150
# Promised are 10 s, and seen on a quiet machine; beside the other half of the tests it took up to 13.
NAMED_WITHIN_S = 30


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedPlatform]:
    platform = EmbeddedPlatform(tmp_path_factory.mktemp("faults") / "state", environ={}, default_ports=False)
    try:
        platform.up()
        yield platform
    finally:
        platform.clean()


def report(line: str) -> None:
    """Show what was seen; `-s` lets it through."""
    sys.stderr.write(f"{line.strip()}\n")


def supervisor(platform: EmbeddedPlatform) -> psutil.Process:
    return next(entry for entry in processes_of(platform.state) if "supervisor.supervisord" in entry.cmdline())


def states(platform: EmbeddedPlatform) -> dict[str, str]:
    return {status.name: status.state for status in platform.status()}


def wait_until_ready(platform: EmbeddedPlatform) -> None:
    deadline = time.monotonic() + BOUND_S
    while any(state != "ready" for name, state in states(platform).items() if name in CORE):
        assert time.monotonic() < deadline, states(platform)
        time.sleep(0.3)


def test_each_service_is_one_process(own: EmbeddedPlatform) -> None:
    assert len(list(processes_of(own.state))) == len(CORE) + 1


@pytest.fixture
def registered(own: EmbeddedPlatform, monkeypatch: pytest.MonkeyPatch) -> None:
    """Feast's UI ends where nothing is registered."""
    own.up()
    for name, value in own.settings.to_env().items():
        monkeypatch.setenv(name, value)
    features.apply()


@pytest.mark.parametrize("service", [service.name for service in SERVICES])
def test_a_service_whose_process_is_killed_comes_back_by_itself(
    own: EmbeddedPlatform, registered: None, service: str
) -> None:
    own.up(also=[service])
    wait_until_ready(own)
    before = {status.name: status.pid for status in own.status()}[service]
    psutil.Process(before).kill()
    began = time.monotonic()
    deadline = began + BOUND_S
    while True:
        status = next(entry for entry in own.status() if entry.name == service)
        if status.pid != before and status.state == "ready":
            break
        assert time.monotonic() < deadline, f"{service} stays {status.state}"
        time.sleep(0.2)
    report(f"{service}: back after {time.monotonic() - began:.1f} s")
    check_services(own.settings)
    if service not in CORE:
        own._supervisor.stop(service)


def test_a_service_that_is_killed_again_and_again_while_it_starts_comes_back_all_the_same(
    own: EmbeddedPlatform,
) -> None:
    wait_until_ready(own)
    killed: set[int] = set()
    deadline = time.monotonic() + BOUND_S
    while len(killed) < 5:
        pid = own._supervisor.entry("mlflow")["pid"]
        if pid and pid not in killed:
            psutil.Process(pid).kill()
            killed.add(pid)
        assert time.monotonic() < deadline, own._supervisor.entry("mlflow")["statename"]
        time.sleep(0.05)
    wait_until_ready(own)


def test_up_gives_up_on_a_service_that_ends_twice_and_stops_trying_what_nobody_needs_yet(
    own: EmbeddedPlatform,
) -> None:
    wait_until_ready(own)
    s3_client(own.settings).delete_object(Bucket=REGISTRY_BUCKET, Key="registry.db")
    with pytest.raises(ServiceDownError, match=r"feast-ui does not come up: error: there is no feature registry"):
        own.up(also=["feast-ui"])
    assert states(own)["feast-ui"] in {"stopped", "fatal"}


@pytest.mark.parametrize("service", CORE)
def test_a_service_that_hangs_is_named_by_whatever_needs_it(own: EmbeddedPlatform, service: str) -> None:
    wait_until_ready(own)
    process = psutil.Process({status.name: status.pid for status in own.status()}[service])
    word = {"object-store": "object store", "online-store": "online store", "mlflow": "MLflow server"}[service]
    process.suspend()
    try:
        began = time.monotonic()
        with pytest.raises(ServiceDownError, match=f"{word} .* does not answer"):
            check_services(own.settings)
        assert time.monotonic() - began < NAMED_WITHIN_S
    finally:
        process.resume()
    wait_until_ready(own)


# What a cell of a notebook calls when a service hangs after `connect()`, and what then appears in its error.
CALLS = {
    "mlflow": "import mlflow; mlflow.search_experiments()",
    "object-store": "from mlplatform.connection import s3_client; store = s3_client(); store.list_buckets()",
    "online-store": (
        "import os; from feast.infra.online_stores.redis import RedisOnlineStore, RedisOnlineStoreConfig as Config"
        "\nconfig = Config(connection_string=os.environ['REDIS_CONNECTION_STRING'])"
        "\nclient = RedisOnlineStore()._get_client(config); client.ping()"
    ),
}


@pytest.mark.parametrize("service", CORE)
def test_a_call_of_a_library_gives_up_on_a_service_that_hangs(own: EmbeddedPlatform, service: str) -> None:
    wait_until_ready(own)
    process = psutil.Process({status.name: status.pid for status in own.status()}[service])
    call = CALLS[service].replace("; ", "\n").replace(";", "\n")
    *imports, last = call.splitlines()
    code = "\n".join(
        [
            "from mlplatform import connect",
            "connect()",
            *imports,
            last,
            "import os, signal, time",
            f"os.kill({process.pid}, signal.SIGSTOP)",
            "began = time.monotonic()",
            f"try: {last}",
            "except Exception as error: print(f'{time.monotonic() - began:.1f}', type(error).__name__)",
        ]
    )
    try:
        outcome = subprocess.run(
            [sys.executable, "-c", code],
            env={"MLPLATFORM_STATE": str(own.state), "PATH": "/usr/bin:/bin"},
            capture_output=True, text=True, timeout=BOUND_S, check=False,
        )  # fmt: skip
    finally:
        process.send_signal(signal.SIGCONT)
    assert outcome.stdout, outcome.stderr[-2000:]
    report(f"{service}: gave up after {outcome.stdout}")
    assert float(outcome.stdout.split()[0]) < NAMED_WITHIN_S
    wait_until_ready(own)


def test_status_says_which_service_does_not_answer(own: EmbeddedPlatform) -> None:
    wait_until_ready(own)
    pids = {status.name: status.pid for status in own.status()}
    deadline = time.monotonic() + BOUND_S
    while own._supervisor.entry("mlflow")["statename"] != "RUNNING":
        assert time.monotonic() < deadline
        time.sleep(0.5)
    stopped = [psutil.Process(pids[name]) for name in CORE]
    for process in stopped:
        process.suspend()
    try:
        began = time.monotonic()
        assert {states(own)[name] for name in CORE} == {"does not answer"}
        assert time.monotonic() - began < NAMED_WITHIN_S
    finally:
        for process in stopped:
            process.resume()
    wait_until_ready(own)


def test_a_supervisor_that_hangs_is_named_and_down_ends_what_it_started(
    own: EmbeddedPlatform, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # Starts of other tests' platforms are not waited for.
    monkeypatch.setattr("mlplatform_ops.embedded.platform.private_folder", lambda: tmp_path)
    hung = supervisor(own)
    hung.suspend()
    for command in (own.status, own.up):
        began = time.monotonic()
        with pytest.raises(PlatformError, match=rf"supervisor \(pid {hung.pid}\) does not answer .* run 'make down'"):
            command()
        assert time.monotonic() - began < NAMED_WITHIN_S
    said: list[str] = []
    assert own.down(notify=said.append) is True
    assert any("does not answer" in line for line in said)
    assert list(processes_of(own.state)) == []
    own.up()
    check_services(own.settings)


def test_services_that_run_on_without_a_killed_supervisor_are_said_to_and_up_starts_all_again(
    own: EmbeddedPlatform, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wait_until_ready(own)
    pids = {status.name: status.pid for status in own.status()}
    killed = supervisor(own)
    killed.kill()
    killed.wait(10)
    # SeaweedFS says in its log that a bucket goes, and would end if the supervisor had been to take that line.
    client = s3_client(own.settings)
    client.create_bucket(Bucket="short-lived")
    client.delete_bucket(Bucket="short-lived")
    began = time.monotonic()
    left = {status.name: status for status in own.status()}
    assert {name: left[name].pid for name in CORE} == {name: pids[name] for name in CORE}
    assert {left[name].state for name in CORE} == {"not supervised"}
    assert {left[name].state for name in left if name not in CORE} == {"stopped"}
    monkeypatch.setenv(STATE_VARIABLE, str(own.state))
    assert main(["status"]) == 0
    assert UNSUPERVISED in capsys.readouterr().err
    # A cell goes on, and is told.
    with pytest.warns(RuntimeWarning, match=r"the supervisor has ended .* run 'make up'"):
        connect({STATE_VARIABLE: str(own.state)})
    report(f"named by both within {time.monotonic() - began:.1f} s")
    said: list[str] = []
    own.up(notify=said.append)
    report(f"all is supervised again after {time.monotonic() - began:.1f} s")
    assert "the supervisor had ended; what it left running is ended too and starts again" in said
    wait_until_ready(own)
    assert not {status.pid for status in own.status()} & set(pids.values()) - {0}
    connect({STATE_VARIABLE: str(own.state)})


@pytest.mark.parametrize("damage", ["", '{"environment": ', '{"environment": {"AWS_ENDPOINT_URL": 5}}', "\0\0"])
def test_damaged_settings_change_nothing_for_a_running_platform(own: EmbeddedPlatform, damage: str) -> None:
    before, pids = own.settings, {status.pid for status in own.status()}
    (own.state / "settings.json").write_text(damage)
    assert own.settings == before
    own.up()
    assert {status.pid for status in own.status()} == pids


def test_without_any_settings_the_secrets_come_from_what_the_servers_read(own: EmbeddedPlatform) -> None:
    before = own.settings
    for name in ("settings.json", "settings.json.copy"):
        (own.state / name).write_text("{")
    with pytest.raises(
        PlatformError, match=r"damaged .* run 'make up', which makes them again and keeps the data"
    ) as error:
        own.status()
    assert "clean" not in str(error.value)
    said: list[str] = []
    own.up(notify=said.append)
    assert any("made again, with MLFLOW_TRACKING_PASSWORD" in line for line in said)
    assert own.settings.tracking_password == before.tracking_password
    assert own.settings.secret_key == before.secret_key
    check_services(own.settings)
    assert all(process.environ()[OWNER_VARIABLE] == str(own.state) for process in processes_of(own.state))
