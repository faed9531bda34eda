"""Run the notebooks and keep what was executed in the object store, whether they passed or not."""

# ruff: noqa: T201 (its output is the container's log)

import mimetypes
import subprocess
import sys
import time
from pathlib import Path

import boto3

from mlplatform.connection import connect
from mlplatform.errors import ServiceDownError

BUCKET = "executed-notebooks"
BUILD = Path("build")
OUTPUT = BUILD / "notebooks"
WAIT_S = 900


def wait() -> None:
    """Wait for the platform, which may have been applied together with this Job."""
    deadline = time.monotonic() + WAIT_S
    while True:
        try:
            connect()
            return
        except ServiceDownError as error:
            if time.monotonic() > deadline:
                raise
            print(f"waiting: {error}", flush=True)
            time.sleep(3)


def main() -> int:
    """Run, upload, and return the run's exit status."""
    wait()
    prefix = time.strftime("%Y-%m-%dT%H-%M-%SZ", time.gmtime())
    command = [sys.executable, "-m", "mlplatform_ops", "run", "--platform", "env", "--output", str(OUTPUT)]
    status = subprocess.run([*command, *sys.argv[1:]], check=False).returncode
    client = boto3.client("s3")
    files = [path for folder in (OUTPUT, BUILD / "site") for path in sorted(folder.rglob("*")) if path.is_file()]
    for path in files:
        kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
        key = f"{prefix}/{path.relative_to(BUILD)}"
        client.upload_file(str(path), BUCKET, key, ExtraArgs={"ContentType": kind})
    print(f"kept {len(files)} files in s3://{BUCKET}/{prefix}/", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
