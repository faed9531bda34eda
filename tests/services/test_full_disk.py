"""A file system that is really full: under a run's output folder, and under every server's data."""

from __future__ import annotations

import contextlib
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
REDIS = (
    "import os, redis; from mlplatform.settings import find_settings as f;"
    "r = redis.Redis.from_url(f(os.environ).redis_url);"
)
# What cells of notebooks do, and what they say when the disk is full.
WRITES = {
    "object store": "from mlplatform import objectstore as o; o.write_bytes(b'x' * 5_000_000, 's3://mlflow-datasets/full')",
    "online store": f"{REDIS} [r.set(f'full{{n}}', 'x' * 100_000) for n in range(9)]",
    "MLflow": "import mlflow, uuid; mlflow.create_experiment(str(uuid.uuid4()))",
    "features": "from mlplatform import features as f; f.materialise(f.open_store())",
}
READS = {
    "object store": "from mlplatform import objectstore as o; print(o.read_bytes('s3://mlflow-datasets/kept'))",
    "online store": f"{REDIS} print(r.get('kept'))",
    "MLflow": "import mlflow; print(mlflow.get_experiment_by_name('kept').name)",
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

    def call(code: str) -> str:
        began = time.monotonic()
        said = python(f"from mlplatform import connect; connect(); {code}")
        sys.stderr.write(f"{time.monotonic() - began:.1f} s: {(said.strip().splitlines() or ['done'])[-1]}\n")
        return said

    with contextlib.ExitStack() as stack:
        python = stack.enter_context(disk.interpreter(**{STATE_VARIABLE: str(state)}))
        stack.callback(command, "down")
        deadline = time.monotonic() + BOUND_S
        while (outcome := command("up")).returncode:
            assert time.monotonic() < deadline, outcome.stdout
        kept = disk.run("cat", f"{state}/settings.json").stdout
        call("from mlplatform import objectstore as o; o.write_bytes(b'stays', 's3://mlflow-datasets/kept')")
        call("import mlflow; mlflow.create_experiment('kept')")
        # Features are registered, and none of them is online.
        call(f"from mlplatform import features as f; f.build(); {REDIS} r.flushall(); r.set('kept', 'stays')")
        for words in (("up",), ("features",)):
            disk.fill()
            outcome = command(*words)
            assert (outcome.returncode, "Traceback" in outcome.stdout) == (1, False)
            assert f"no space left in {state}" in outcome.stdout
        for what in ("object store", "features"):
            disk.fill()  # a server that tidies up frees a little
            assert "ServiceDownError: the object store fails on s3://" in (said := call(WRITES[what]))
            assert "no space left, if its disk is full" in said
        disk.fill()
        assert "no space left where the MLflow server keeps its database" in call(WRITES["MLflow"])
        assert "No space left" in call(WRITES["online store"])
        # Now the online store refuses every write, and a PING too; `connect` and whatever only reads go on.
        assert [call(code).strip() for code in READS.values()] == ["b'stays'", "b'stays'", "kept"]
        disk.free()
        # By themselves, though the object store looks for space only now and then: nothing is started or ended.
        freed = time.monotonic()
        for what, code in WRITES.items():
            while "Error" in (said := call(code)):
                assert time.monotonic() - freed < BOUND_S, said[-1500:]
            sys.stderr.write(f"{what} writes within {time.monotonic() - freed:.1f} s\n")
        assert disk.run("cat", f"{state}/settings.json").stdout == kept
