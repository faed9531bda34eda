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

from mlplatform.settings import BUCKETS, Settings
from mlplatform_ops import attack
from mlplatform_ops.embedded.platform import EmbeddedPlatform
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


@pytest.fixture(scope="module")
def answer(guarded: Any, embedded: EmbeddedPlatform) -> dict[str, Any]:
    """What a stranger found out. As root, as in CI, it is another user; else this one, without credentials."""
    with tempfile.TemporaryDirectory(prefix="stranger-") as name:
        Path(name).chmod(0o755)
        weed = Path(shutil.copy(WEED, name))
        weed.chmod(0o755)
        built = [path for path in (ROOT / "build",) if path.exists()]
        question = {
            "listeners": [asdict(entry) for entry in embedded.listeners()],
            "authority": (embedded.state / "certificates" / "ca.crt").read_text(),
            "weed": str(weed),
            "files": [str(path) for path in (embedded.state, *embedded.state.rglob("*"), *built)],
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
    assert services >= {"object-store", "online-store", "mlflow", "supervisor"}
    assert len(answer["listeners"]) >= 15
    assert len(answer["attempts"]) >= 100
    assert guarded.get()["Body"].read() == b"guarded"
    bucket = guarded.Bucket()
    assert [entry.key for entry in bucket.objects.filter(Prefix="planted")] == []


def test_a_stranger_reads_no_file_of_the_platform(answer: dict[str, Any]) -> None:
    assert len(answer["files"]) >= 20
    if os.getuid() == 0:
        assert answer["uid"] != 0
        assert answer["readable"] == []
    for name in answer["files"]:
        path = Path(name)
        # SeaweedFS opens some of its files to readers; the folders around them are closed.
        if path.is_dir() or (path.is_file() and path.parent.name in {"state", "logs"}):
            assert path.stat().st_mode & 0o077 == 0, f"{path} is not its owner's alone"


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
