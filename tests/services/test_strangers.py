"""Another user of this machine, without credentials, gets nothing from a running platform."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import boto3
import pytest

from mlplatform import features
from mlplatform.settings import BUCKETS, Settings
from mlplatform_ops import attack
from mlplatform_ops.cli import main
from mlplatform_ops.embedded.platform import EmbeddedPlatform
from mlplatform_ops.embedded.services import SERVICES
from mlplatform_ops.ports import Listener

ROOT = Path(__file__).parents[2]
WEED = Path(sys.executable).with_name("weed")


@pytest.fixture(scope="module")
def guarded(platform: Settings) -> Iterator[Any]:
    """An object that nobody else may see."""
    session = boto3.session.Session(platform.access_key, platform.secret_key, region_name=platform.region)
    stored = session.resource("s3", endpoint_url=platform.s3_endpoint).Object(BUCKETS[0], "guarded.txt")
    stored.put(Body=b"guarded")
    yield stored
    stored.delete()


ON_DEMAND = [service.name for service in SERVICES if service.on_demand]


@pytest.fixture(scope="module")
def everything(guarded: Any, embedded: EmbeddedPlatform) -> Iterator[EmbeddedPlatform]:
    """The platform with every server that there is."""
    features.apply()
    embedded.up(also=ON_DEMAND)
    yield embedded
    for name in ON_DEMAND:
        embedded._supervisor.stop(name)


@pytest.fixture(scope="module")
def answer(everything: EmbeddedPlatform) -> dict[str, Any]:
    """What a stranger found out. As root, as in CI, it is another user; else this one, without credentials."""
    with tempfile.TemporaryDirectory(prefix="stranger-") as name:
        Path(name).chmod(0o755)
        weed = Path(shutil.copy(WEED, name))
        weed.chmod(0o755)
        built = [path for path in (ROOT / "build",) if path.exists()]
        question = {
            "listeners": [asdict(entry) for entry in everything.listeners()],
            "authority": (everything.state / "certificates" / "ca.crt").read_text(),
            "weed": str(weed),
            "files": [str(path) for path in (everything.state, *everything.state.rglob("*"), *built)],
        }
        child = subprocess.run(
            [sys.executable, Path(__file__).parents[1] / "support" / "stranger.py"],
            input=json.dumps(question),
            capture_output=True,
            text=True,
            check=False,
        )
    assert child.returncode == 0, child.stderr[-2000:]
    return {**json.loads(child.stdout), "listeners": question["listeners"], "files": question["files"]}


def test_a_stranger_lists_reads_writes_and_mints_nothing_on_any_socket(answer: dict[str, Any], guarded: Any) -> None:
    assert [entry for entry in answer["attempts"] if not entry["held"]] == []
    services = {entry["service"] for entry in answer["attempts"]}
    assert services == {service.name for service in SERVICES} | {"supervisor"}
    assert len(answer["listeners"]) >= 15
    assert len(answer["attempts"]) >= 100
    assert guarded.get()["Body"].read() == b"guarded"
    bucket = guarded.Bucket()
    assert [entry.key for entry in bucket.objects.filter(Prefix="planted")] == []


@pytest.mark.skipif(os.getuid() != 0, reason="only root becomes another user; the permissions are tested beside this")
def test_a_stranger_reads_no_file_of_the_platform(answer: dict[str, Any]) -> None:
    assert answer["uid"] != 0
    assert answer["readable"] == []


def test_files_and_folders_of_the_platform_are_open_to_their_owner_alone(answer: dict[str, Any]) -> None:
    assert len(answer["files"]) >= 20
    for name in answer["files"]:
        path = Path(name)
        # SeaweedFS opens some of its files to readers; the folders around them are closed.
        if path.is_dir() or (path.is_file() and path.parent.name in {"state", "logs"}):
            assert path.stat().st_mode & 0o077 == 0, f"{path} is not its owner's alone"


def test_make_attack_says_what_it_did_not_try(
    everything: EmbeddedPlatform,
    answer: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    everything._supervisor.stop("feast-ui")
    monkeypatch.setenv("COLUMNS", "300")
    assert main(["attack"]) == 0
    said = capsys.readouterr()
    rows = [[cell.strip() for cell in line.split("│")] for line in said.out.splitlines()]
    by_service = {name: [row for row in rows if name in row] for name in (*ON_DEMAND, "mlflow")}
    assert [row for row in by_service["feast-ui"][0] if row] == ["feast-ui", "nothing", "not running", "not tried"]
    assert len(by_service["feast-ui"]) == 1
    assert all(len(by_service[name]) > 5 for name in ("feature-server", "model-endpoint", "mlflow"))
    assert "what does not run was not tried; 'make serve'" in said.err


def test_a_socket_that_other_machines_reach_is_no_held_door() -> None:
    addresses = {"127.0.0.1:1": True, "::1:1": True, "0.0.0.0:1": False, ":::1": False}
    found = {address: next(attack._address(Listener("mlflow", address))).held for address in addresses}
    assert found == addresses


def test_whoever_has_the_certificate_gets_in_by_the_same_attempts(embedded: EmbeddedPlatform, guarded: Any) -> None:
    """Shows that the attempts above fail for want of a certificate, and not because they are made wrongly."""
    state = embedded.state
    environment = json.loads((state / "settings.json").read_text())["environment"]
    for part in ("MASTER", "FILER", "VOLUME"):
        listener = Listener("object-store", f"127.0.0.1:{environment[f'MLPLATFORM_WEED_{part}_GRPC_PORT']}")
        certificates = state / "certificates"
        attempts = {
            attempt.door.split(", ")[1].split(":")[0]: attempt.held
            for attempt in attack._grpc(listener, certificates, (certificates / "ca.crt").read_bytes())
        }
        assert attempts == {"in clear": True, "TLS": True, "a foreign certificate": False}
    master = f"127.0.0.1:{environment['MLPLATFORM_WEED_MASTER_PORT']}.{environment['MLPLATFORM_WEED_MASTER_GRPC_PORT']}"
    outcome = subprocess.run(
        [WEED, "shell", f"-master={master}"],
        input="fs.ls /buckets\n", cwd=state, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    assert BUCKETS[0] in outcome.stdout
