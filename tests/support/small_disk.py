"""A real file system of a few megabytes, made without root: only the processes of one namespace see it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

BOUND_S = 300


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

    def read(self, name: str) -> str:
        return self.run("cat", f"{self.folder}/{name}").stdout

    def fill(self) -> None:
        assert "No space left" in self.run("dd", "if=/dev/zero", f"of={self.folder}/fill", "bs=4k").stdout

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
