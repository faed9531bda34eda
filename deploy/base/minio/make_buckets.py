"""Make the buckets that are not there yet, as soon as the object store answers.

Waiting here takes seconds; a Job that crashes until the store is up waits for minutes between its attempts.
"""

# ruff: noqa: T201 (its output is the container's log)

import os
import sys
import time

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

# The one answer that waiting doesn't change: a key that is unknown may be a new one, which the store has yet to read.
REFUSED = {"AccessDenied"}


def main() -> int:
    """Wait for the store, then make each missing bucket; return the exit status."""
    wanted = os.environ["BUCKETS"].split()
    deadline = time.monotonic() + float(os.environ["WAIT_SECONDS"])
    client = boto3.client("s3", config=Config(connect_timeout=2, read_timeout=10, retries={"total_max_attempts": 1}))
    while True:
        try:
            present = {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}
            for bucket in sorted(set(wanted) - present):
                client.create_bucket(Bucket=bucket)
                print(f"made {bucket}", flush=True)
            print(f"{len(wanted)} buckets are there", flush=True)
            return 0
        except (BotoCoreError, ClientError) as error:
            code = error.response["Error"]["Code"] if isinstance(error, ClientError) else ""
            if code in REFUSED or time.monotonic() > deadline:
                print(f"giving up: {error}", file=sys.stderr)
                return 1
            print(f"waiting: {error}", flush=True)
            time.sleep(1)


if __name__ == "__main__":
    sys.exit(main())
