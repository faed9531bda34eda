"""A file system that is really full: under a run's output folder, and under every server's data."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from shop import describe_table
from small_disk import Disk, small_disk

from mlplatform.settings import STATE_VARIABLE

BOUND_S = 300
# What cells of notebooks do; each prints how long its call took and what it said.
WRITES = {
    "object store": "from mlplatform import objectstore as o; o.write_bytes(b'x' * 200_000, 's3://mlflow-datasets/full')",
    "online store": "import os, redis; from mlplatform.settings import find_settings as f;"
    "r = redis.Redis.from_url(f(os.environ).redis_url); [r.set(f'full{n}', 'x' * 100_000) for n in range(9)]",
    "MLflow": "import mlflow, uuid; mlflow.create_experiment(str(uuid.uuid4()))",
}


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with small_disk(tmp_path / "small", size="200m") as made:
        yield made


def test_a_full_disk_under_the_servers_is_named_and_freed_all_goes_on(disk: Disk, tmp_path: Path) -> None:
    state, clone = disk.folder / "state", tmp_path / "clone"
    describe_table(clone)

    def command(*words: str) -> subprocess.CompletedProcess[str]:
        program = f"import os; os.chdir({str(clone)!r}); from mlplatform_ops.cli import main; raise SystemExit(main())"
        return disk.run(sys.executable, "-c", program, *words, **{STATE_VARIABLE: str(state)})

    def write(what: str) -> str:
        call = f"from mlplatform import connect; connect(); {WRITES[what]}"
        return disk.run(sys.executable, "-c", call, **{STATE_VARIABLE: str(state)}).stdout

    try:
        deadline = time.monotonic() + BOUND_S
        while (outcome := command("up")).returncode:
            assert time.monotonic() < deadline, outcome.stdout
        kept = disk.run("cat", f"{state}/settings.json").stdout
        disk.fill()
        for words in (("up",), ("features",)):
            outcome = command(*words)
            assert (outcome.returncode, "Traceback" in outcome.stdout) == (1, False)
            assert f"no space left in {state}" in outcome.stdout
        assert "ServiceDownError" in write("object store")
        assert "no space left where the MLflow server keeps its database" in write("MLflow")
        assert "No space left" in write("online store")
        disk.free()
        # By themselves, though the object store looks for space only now and then: nothing is started or ended.
        freed = time.monotonic()
        for what in WRITES:
            while "Error" in (said := write(what)):
                assert time.monotonic() - freed < BOUND_S, said[-1500:]
            sys.stderr.write(f"{what} writes within {time.monotonic() - freed:.1f} s\n")
        assert disk.run("cat", f"{state}/settings.json").stdout == kept
    finally:
        command("down")
