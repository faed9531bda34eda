"""A group of packages that cannot be had: one line says so, nothing is left of it, and later it can be added."""

from __future__ import annotations

import hashlib
import http.server
import io
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from mlplatform_ops.ports import free_port

ROOT = Path(__file__).parents[2]
GROUPS = {"pipeline": "pipelines", "serve-model": "serving", "drift": "drift", "loop": "pipelines"}
HUSH = ("hush-1", "hush-2", "hush-3")


def wheel(name: str) -> bytes:
    """Make a wheel of one empty module."""
    about = f"{name}-1.0.dist-info"
    files = {
        f"{name}.py": "",
        f"{about}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{about}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{about}/RECORD"] = "".join(f"{path},,\n" for path in [*files, f"{about}/RECORD"])
    body = io.BytesIO()
    with zipfile.ZipFile(body, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
    return body.getvalue()


@contextmanager
def index(port: int, pages: Mapping[str, bytes], *, otherwise: int = 404) -> Iterator[None]:
    """Serve a package index, or answer everything with an error."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            body = pages.get(path, b"")
            self.send_response(200 if body else otherwise)
            self.send_header("Content-Type", "text/html" if path.endswith("/") else "application/zip")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def pages() -> dict[str, bytes]:
    """What an index of one small package per group answers."""
    answers = {}
    for name in set(GROUPS.values()):
        body = answers[f"/{HUSH[1]}/{name}-1.0-py3-none-any.whl"] = wheel(name)
        link = f'<a href="/{HUSH[1]}/{name}-1.0-py3-none-any.whl#sha256={hashlib.sha256(body).hexdigest()}">'
        answers[f"/{HUSH[1]}/simple/{name}/"] = f"{link}{name}-1.0-py3-none-any.whl</a>".encode()
    return answers


@pytest.fixture
def clone(tmp_path: Path, pages: dict[str, bytes]) -> Path:
    """The Makefile beside an environment without packages, and a lock of one small package for each group."""
    folder = tmp_path / "clone"
    folder.mkdir()
    (folder / "Makefile").symlink_to(ROOT / "Makefile")
    for name in set(GROUPS.values()):
        digest = hashlib.sha256(pages[f"/{HUSH[1]}/{name}-1.0-py3-none-any.whl"]).hexdigest()
        (folder / f"requirements-{name}.lock").write_text(f"{name}==1.0 --hash=sha256:{digest}\n")
    uv = Path(sys.executable).with_name("uv")
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, folder / ".venv"], check=True)
    (folder / ".venv" / "bin" / "uv").symlink_to(uv)
    return folder


def make(clone: Path, port: int, *targets: str) -> subprocess.CompletedProcess[str]:
    """Run make with an index of this test's own, whose address holds a password, and nothing kept from earlier."""
    address = f"127.0.0.1:{port}/{HUSH[1]}/simple?token={HUSH[2]}"
    environ = {
        "PATH": os.environ["PATH"],
        "HOME": str(clone.parent),
        "UV_CACHE_DIR": str(clone.parent / "cache"),
        "UV_DEFAULT_INDEX": f"http://reader:{HUSH[0]}@{address}",
        "UV_HTTP_RETRIES": "0",
        "UV_NO_CONFIG": "1",
    }
    # The environment itself is taken as made.
    command = ["/usr/bin/env", "make", "-o", ".venv/bin/uv", "-o", ".venv/.ready", *targets]
    return subprocess.run(command, cwd=clone, env=environ, capture_output=True, text=True, check=False)


def complaint(outcome: subprocess.CompletedProcess[str], group: str) -> str:
    """Give the one line that make prints beside what it does and its own last word."""
    first, line, last = outcome.stderr.splitlines()
    assert (outcome.returncode, outcome.stdout, first) == (2, "", f"Adding the packages of {group}")
    assert last.startswith("make: *** ")
    return line


@pytest.mark.parametrize("target", GROUPS)
def test_packages_that_no_index_gives_are_named_in_one_line_and_added_when_one_does(
    target: str, clone: Path, port: int, pages: dict[str, bytes]
) -> None:
    group = GROUPS[target]
    stamp, log = clone / ".venv" / f".{group}", clone / ".venv" / "install.log"
    away = complaint(make(clone, port, target), group)
    with index(port, {}, otherwise=401):
        refused = complaint(make(clone, port, target), group)
    for line, reason in ((away, "Connection refused"), (refused, f"http://127.0.0.1:{port}) could not be queried")):
        assert line.startswith(f"error: the packages of {group} cannot be installed (")
        assert reason in line
        assert line.endswith("); check the package index, see .venv/install.log, and run this again")
        assert not any(word in line + log.read_text() for word in HUSH)
    assert not stamp.exists()
    assert not [*clone.glob(f".venv/lib*/python*/site-packages/{group}*")]
    with index(port, pages):
        again = make(clone, port, f".venv/.{group}")
    assert (again.returncode, again.stderr) == (0, f"Adding the packages of {group}\n")
    assert stamp.exists()
    subprocess.run([clone / ".venv" / "bin" / "python", "-c", f"import {group}"], check=True)
    # It is there now, and nobody is asked for it.
    assert make(clone, port, f".venv/.{group}").returncode == 0
