"""Buckets of an object store that users share: each user's carry a prefix, and code names them as if each were alone.

Only what talks to the store itself asks here. `BUCKET_PREFIX` is empty where the store is one user's.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

VARIABLE = "BUCKET_PREFIX"


def stored_at(uri: str, environ: Mapping[str, str] = os.environ) -> str:
    """Give the address under which the store keeps what code calls `s3://bucket/key`; other addresses stay."""
    return re.sub("^s3://", f"s3://{environ.get(VARIABLE, '')}", uri)


def name_buckets() -> None:
    """Let every S3 client that this process makes, MLflow's too, put the prefix before a bucket's name."""
    import botocore.handlers

    handler = ("before-parameter-build.s3", _add_prefix)
    if handler not in botocore.handlers.BUILTIN_HANDLERS:
        botocore.handlers.BUILTIN_HANDLERS.append(handler)


def _add_prefix(params: dict[str, Any], **_: object) -> None:
    if "Bucket" in params:
        params["Bucket"] = os.environ.get(VARIABLE, "") + params["Bucket"]
