"""What the platform consists of, and that nothing secret is stored with it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def make(*words: str) -> subprocess.CompletedProcess[str]:
    # The environment under test is there: make must not sync it again because an edited file is newer.
    made = [f"--old-file=.venv/{name}" for name in ("uv", ".ready", ".dev", ".audit")]
    command = ["/usr/bin/env", "make", "-s", *made, *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def names(lock: str) -> set[str]:
    """The packages of a lock that are installed on every machine."""
    return set(re.findall(r"^([a-z0-9-]+)==[^;]*$", (ROOT / lock).read_text(), flags=re.MULTILINE))


def test_the_bills_of_materials_list_every_package_with_its_version() -> None:
    outcome = make("sbom")
    assert outcome.returncode == 0, outcome.stderr
    for kind, lock in (
        ("environment", "requirements.lock"),
        ("image", "deploy/components/notebooks/requirements.lock"),
    ):
        bill = json.loads((ROOT / "build" / f"{kind}.cdx.json").read_text())
        assert bill["bomFormat"] == "CycloneDX"
        assert bill["metadata"]["component"]["name"] == "mlplatform"
        listed = {re.sub(r"[._]", "-", entry["name"]).lower(): entry["version"] for entry in bill["components"]}
        assert names(lock) - listed.keys() == set()
        assert all(listed.values())
        assert str(ROOT) not in json.dumps(bill)


@pytest.mark.parametrize(
    "line",
    [
        'password = "uY7-Zk1q_Pw84xTnBv0sLm"',  # pragma: allowlist secret
        "aws_key = 'AKIAIOSFODNN7REALKEY'",  # pragma: allowlist secret
        "-----BEGIN RSA PRIVATE KEY-----",  # pragma: allowlist secret
        'url = "redis://user:kq8Vn2x_Pz71@127.0.0.1:6379"',  # pragma: allowlist secret
    ],
)
def test_a_secret_in_a_file_is_found(line: str, tmp_path: Path) -> None:
    path = tmp_path / "settings.py"
    path.write_text(f"{line}\n")
    outcome = make("secrets", f"FILES={path}")
    assert outcome.returncode != 0
    assert f"{path}:1" in outcome.stdout


def test_an_ordinary_file_holds_no_secret(tmp_path: Path) -> None:
    assert make("secrets", "FILES=src/mlplatform/settings.py").returncode == 0


def test_two_builds_of_the_wheel_are_the_same_byte_for_byte(tmp_path: Path) -> None:
    digests = []
    for number, umask in enumerate((0o022, 0o077)):
        subprocess.run(
            [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path / str(number))],
            cwd=ROOT,
            env={"PATH": os.environ["PATH"], "TZ": ("UTC", "Asia/Tokyo")[number]},
            umask=umask,
            capture_output=True,
            check=True,
        )
        (wheel,) = (tmp_path / str(number)).glob("*.whl")
        digests.append(hashlib.sha256(wheel.read_bytes()).hexdigest())
    assert digests[0] == digests[1]
