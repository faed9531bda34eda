"""Become another user, then try doors and files: `python stranger.py < question > answer`, both in JSON."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

# Imported while it may still be read: afterwards, this process can't even list the environment's packages.
os.environ["GRPC_VERBOSITY"] = "NONE"
import encodings.idna  # noqa: F401
import multiprocessing.util  # noqa: F401

import cryptography.hazmat.primitives.asymmetric.ec
import cryptography.hazmat.primitives.hashes
import cryptography.hazmat.primitives.serialization
import cryptography.x509.oid  # noqa: F401
import grpc  # noqa: F401

from mlplatform_ops.attack import attack
from mlplatform_ops.ports import Listener

NOBODY = 65534


def main() -> None:
    question = json.load(sys.stdin)
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    os.chdir("/")
    readable = []
    for name in question["files"]:
        try:
            list(Path(name).iterdir()) if Path(name).is_dir() else Path(name).read_bytes()
            readable.append(name)
        except OSError:
            continue
    listeners = [Listener(**entry) for entry in question["listeners"]]
    attempts = attack(listeners, question["authority"], Path(question["weed"]))
    json.dump({"uid": os.getuid(), "readable": readable, "attempts": [asdict(entry) for entry in attempts]}, sys.stdout)


if __name__ == "__main__":
    main()
