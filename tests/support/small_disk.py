"""A real file system of a few megabytes, made without root: only the processes of one namespace see it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

BOUND_S = 300
INTERPRETER = """
import contextlib, io, json, sys, traceback
for line in sys.stdin:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            exec(json.loads(line), {})
        except Exception:
            traceback.print_exc()
    print(json.dumps(said.getvalue()), flush=True)
"""


@dataclass(frozen=True)
class Disk:
    """The file system: who holds its namespace, and the folder on which it is mounted there."""

    holder: int
    folder: Path

    def enter(self, folder: Path) -> list[str]:
        """What a command begins with that is to see it and to run in a folder."""
        options = ["--user", "--mount", "--preserve-credentials"]
        return ["/usr/bin/env", "nsenter", f"--target={self.holder}", *options, f"--wd={folder}"]

    def run(self, *command: str, **environ: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self.enter(Path.cwd()), *command],
            env={name: os.environ.get(name, "") for name in ("PATH", "HOME", "PYTHONPATH")} | environ,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=BOUND_S, check=False,
        )  # fmt: skip

    @contextmanager
    def interpreter(self, **environ: str) -> Iterator[Callable[[str], str]]:
        """Start one Python there, which runs what it is given and gives what that printed, its traceback too.

        It imports MLflow and Feast once, and not for each question.
        """
        with subprocess.Popen(
            [*self.enter(Path.cwd()), sys.executable, "-c", INTERPRETER],
            env={name: os.environ.get(name, "") for name in ("PATH", "HOME")} | environ,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        ) as process:  # fmt: skip
            assert process.stdin
            assert process.stdout

            def run(code: str) -> str:
                print(json.dumps(code), file=process.stdin, flush=True)
                return str(json.loads(process.stdout.readline()))

            try:
                yield run
            finally:
                process.stdin.close()

    def read(self, name: str) -> str:
        return self.run("cat", f"{self.folder}/{name}").stdout

    def fill(self) -> None:
        # Appending: what fills it already is not freed for a moment.
        words = ("if=/dev/zero", f"of={self.folder}/fill", "bs=4k", "oflag=append", "conv=notrunc")
        assert "No space left" in self.run("dd", *words).stdout

    def free(self) -> None:
        assert self.run("rm", f"{self.folder}/fill").returncode == 0


@contextmanager
def small_disk(folder: Path, *, size: str) -> Iterator[Disk]:
    folder.mkdir()
    mount = f'mount -t tmpfs -o size={size} tmpfs "$1" && echo made && exec sleep 3600'
    with subprocess.Popen(
        ["/usr/bin/env", "unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mount, "sh", folder],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as holder:  # fmt: skip
        try:
            assert holder.stdout
            said = holder.stdout.readline().strip()
            assert said == "made", f"a small file system needs user namespaces: {said}"
            yield Disk(holder.pid, folder)
        finally:
            holder.kill()
