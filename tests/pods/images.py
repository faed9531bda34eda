"""What stands in for the images: Debian with this machine's Python, Debian's servers, and the notebooks' own image.

The environment of this repository holds, in its wheels, SeaweedFS, MLflow and Feast; Redis, Postgres and HAProxy are
Debian's. The notebooks' image is built from its Dockerfile with buildah, on a stand-in for its base, which cannot be
pulled everywhere: Debian's Python takes the place of the official image's, the same release of Debian, the same minor
version of Python. Nothing of this machine but its certificates reaches the build, and those only while it lasts.
"""

# ruff: noqa: S607, T201 (it is part of a command of a developer's or CI's machine, whose PATH it trusts)

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pods import Image, PodError, run

REPOSITORY = Path(__file__).resolve().parents[2]
# What Python and the wheels load of the system, as the notebooks' image has it, and MLflow's driver for Postgres.
LIBRARIES = (
    "ca-certificates,libbz2-1.0,libexpat1,libffi8,libgomp1,liblzma5,libncursesw6,libreadline8,libsqlite3-0,libssl3,"
    "libuuid1,zlib1g,python3-psycopg2"
)
# The release of Debian whose Redis, Postgres and HAProxy are nearest to the images'.
SERVERS_RELEASE = "trixie"
SERVERS = "haproxy,postgresql,redis"
DOCKERFILE = "deploy/components/notebooks/Dockerfile"
CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
BASE = "localhost/python:stand-in"
NAME = "localhost/mlplatform:stand-in"
BASE_PACKAGES = "ca-certificates,python3.11,python3.11-venv"


def make_roots(folder: Path) -> None:
    """Make a Debian root for what runs from this machine's environment, and one for the other servers."""
    with ThreadPoolExecutor() as pool:
        made = (pool.submit(_make_python, folder / "python"), pool.submit(_make_servers, folder / "servers"))
    for root in made:
        root.result()


def _make_python(root: Path) -> None:
    """Make a root of this machine's release, into which its environment can be mounted."""
    about = dict(line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line)
    _debootstrap(about["VERSION_CODENAME"].strip('"'), LIBRARIES, root)
    for target in (*python_folders(), REPOSITORY / "src"):
        (root / str(target)[1:]).mkdir(parents=True, exist_ok=True)
        for parent in target.parents:
            (root / str(parent)[1:]).chmod(0o755)
    for name in ("notebooks", "feature_repo", "data", "build"):
        (root / "app" / name).mkdir(parents=True)
    drivers = root / "opt" / "drivers"
    drivers.mkdir()
    shutil.copytree(root / "usr/lib/python3/dist-packages/psycopg2", drivers / "psycopg2")


def _make_servers(root: Path) -> None:
    """Make a root with Redis, Postgres and HAProxy, as their images have them."""
    _debootstrap(SERVERS_RELEASE, SERVERS, root)
    binaries = root / "usr" / "local" / "bin"
    with (root / "etc" / "passwd").open("a") as users:
        users.write("postgres-of-the-image:x:999:999::/var/lib/postgresql:/bin/sh\n")
    postgres = next((root / "usr" / "lib" / "postgresql").iterdir()) / "bin"
    for binary in postgres.iterdir():
        (binaries / binary.name).symlink_to("/" + str(binary.relative_to(root)))
    entrypoint = binaries / "postgres-entrypoint"
    shutil.copy(Path(__file__).parent / "postgres-entrypoint", entrypoint)
    entrypoint.chmod(0o755)
    # Debian's own settings, which the images don't have.
    for settings in ("redis", "haproxy"):
        shutil.rmtree(root / "etc" / settings)


def _debootstrap(release: str, packages: str, root: Path) -> None:
    root.parent.mkdir(parents=True, exist_ok=True)
    run("mmdebstrap", "--quiet", "--variant=minbase", f"--include={packages}", release, root)


def python_folders() -> list[Path]:
    """The environment, and the Python that it was made from."""
    folders = [Path(sys.prefix), Path(sys.base_prefix)]
    return [folder for folder in folders if not str(folder).startswith("/usr")]


def stand_ins(roots: Path) -> dict[str, Image]:
    """Say what stands in for each image, by its short name, on roots that `make_roots` made."""
    path = "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    env = {"PATH": f"{Path(sys.prefix) / 'bin'}:{path}", "PYTHONDONTWRITEBYTECODE": "1"}
    shared = {str(folder): folder for folder in (*python_folders(), REPOSITORY / "src")}
    sequence = {f"/app/{name}": REPOSITORY / name for name in ("notebooks", "feature_repo", "data")}
    server = Image(roots / "servers", env={"PATH": path})
    return {
        "mlflow": Image(roots / "python", env=env | {"PYTHONPATH": "/opt/drivers"}, binds=shared),
        "seaweedfs": Image(roots / "python", env=env, binds=shared),
        "mlplatform": Image(roots / "python", env=env, binds=shared | sequence),
        "redis": server,
        "haproxy": server,
        "postgres": replace(server, entrypoint=("postgres-entrypoint", "postgres")),
    }


def built_image(folder: Path) -> Image:
    """Build the notebooks' image, and check what it says of itself."""
    try:
        built = build(REPOSITORY, folder)
    except subprocess.CalledProcessError as error:
        log = folder / "build.log"
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-12:] if log.exists() else [])
        raise PodError(f"the Dockerfile does not build: {error}\n{tail}") from None
    if built.config["User"] != "10001:10001":
        raise PodError(f"the image runs as {built.config['User']}")
    stray = [str(path) for path in (built.root / "app").rglob("*") if not path.stat().st_mode & 0o004]
    stray += [name for name in (".git", "tests", "secrets", ".venv") for _ in (built.root / "app").rglob(name)]
    if stray:
        raise PodError(f"the image holds what it must not, or what its user can't read: {stray[:5]}")
    print(
        f"  the image {built.id[:12]}: built in {built.took_s:.0f} s, {built.size_bytes / 1e9:.2f} GB, "
        f"user {built.config['User']}",
        flush=True,
    )
    return Image(built.root, env=built.env)


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
