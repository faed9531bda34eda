"""Run the notebooks and keep what was executed in the object store, whether they passed or not."""

# ruff: noqa: T201 (its output is the container's log)

import mimetypes
import subprocess
import sys
import time
from pathlib import Path

import boto3

BUCKET = "executed-notebooks"
OUTPUT = Path("build/notebooks")


def main() -> int:
    """Run, upload, and return the run's exit status."""
    prefix = time.strftime("%Y-%m-%dT%H-%M-%SZ", time.gmtime())
    command = [sys.executable, "-m", "mlplatform", "run", "--platform", "env", "--output", str(OUTPUT), *sys.argv[1:]]
    status = subprocess.run(command, check=False).returncode
    client = boto3.client("s3")
    files = [path for path in sorted(OUTPUT.rglob("*")) if path.is_file()]
    for path in files:
        kind = mimetypes.guess_type(path.name)[0] or "application/octet-stream"
        key = f"{prefix}/{path.relative_to(OUTPUT)}"
        client.upload_file(str(path), BUCKET, key, ExtraArgs={"ContentType": kind})
    print(f"kept {len(files)} files in s3://{BUCKET}/{prefix}/", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
