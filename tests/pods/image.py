"""Build the notebooks' image from its Dockerfile with buildah, on a stand-in for the base image.

The base cannot be pulled everywhere, so Debian's Python takes the place of the official image's: the same release of
Debian, the same minor version of Python. Nothing of this machine but its certificates reaches the build, and those only
while it lasts.
"""

# ruff: noqa: S607 (it trusts the PATH)

from __future__ import annotations

import json
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DOCKERFILE = "deploy/components/notebooks/Dockerfile"
CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
BASE = "localhost/python:stand-in"
NAME = "localhost/mlplatform:stand-in"
BASE_PACKAGES = "ca-certificates,python3.11,python3.11-venv"


@dataclass(frozen=True)
class Built:
    """An image: its files, and what its configuration says."""

    id: str
    root: Path
    config: dict[str, Any]
    size_bytes: float
    took_s: float

    @property
    def env(self) -> dict[str, str]:
        return dict(entry.split("=", 1) for entry in self.config["Env"])


def build(context: Path, folder: Path) -> Built:
    """Build the image of the repository at `context`, keeping everything in `folder`.

    Raises:
        subprocess.CalledProcessError: A step failed; what it wrote is in `build.log` in the folder.
    """
    (folder / "tmp").mkdir(parents=True)
    store = ("--root", folder / "store", "--runroot", folder / "run", "--storage-driver", "overlay")

    def buildah(*arguments: str | Path) -> str:
        with (folder / "build.log").open("a") as log:
            return subprocess.run(
                ["buildah", *store, *arguments], check=True, text=True, stdout=subprocess.PIPE, stderr=log,
                env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": str(folder), "TMPDIR": str(folder / "tmp")},
            ).stdout.strip()  # fmt: skip

    _make_base(folder)
    (folder / "Base").write_text("FROM scratch\nADD base.tar /\n")
    buildah("build", "--isolation=chroot", f"--tag={BASE}", f"--file={folder / 'Base'}", folder)
    (folder / "base.tar").unlink()
    # The machine's certificates, for one behind a proxy that ends TLS; uv has a list of its own unless told.
    (folder / "uv.toml").write_text("native-tls = true\n")
    begun = time.monotonic()
    buildah(
        "build", "--isolation=chroot", "--pull=never", "--layers=false", "--timestamp=0", f"--tag={NAME}",
        f"--build-arg=PYTHON={BASE}", f"--file={context / DOCKERFILE}",
        f"--volume={CERTIFICATES}:{CERTIFICATES}:ro", f"--volume={folder / 'uv.toml'}:/etc/uv/uv.toml:ro", context,
    )  # fmt: skip
    took_s = time.monotonic() - begun
    described = json.loads(buildah("inspect", "--type=image", NAME))
    root = Path(buildah("mount", buildah("from", "--pull=never", NAME)))
    listed = json.loads(buildah("images", "--json", NAME))
    return Built(described["FromImageID"], root, described["OCIv1"]["config"], _size(listed), took_s)


def _make_base(folder: Path) -> None:
    root = folder / "base"
    command = ["mmdebstrap", "--quiet", "--variant=minbase", f"--include={BASE_PACKAGES}", "bookworm", root]
    subprocess.run(command, check=True, capture_output=True)
    (root / "usr" / "bin" / "python").symlink_to("python3.11")
    skipped = [f"--exclude=./{part}/*" for part in ("dev", "var/cache/apt/archives", "var/lib/apt/lists")]
    subprocess.run(["tar", "-C", root, *skipped, "-cf", folder / "base.tar", "."], check=True)
    subprocess.run(["rm", "-rf", root], check=True)


def _size(listed: list[dict[str, Any]]) -> float:
    number, unit = listed[0]["size"].split()
    return float(number) * {"MB": 1e6, "GB": 1e9}[unit]
