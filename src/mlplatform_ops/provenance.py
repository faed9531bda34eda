"""What a training run depends on beside its data: the package's files and the packages that fit a model."""

from __future__ import annotations

import hashlib
import json
import platform
from functools import cache
from importlib import metadata
from pathlib import Path

import mlplatform

CODE_TAG = "code_digest"
ENVIRONMENT_TAG = "environment"
# Groups of packages are added and taken away around them; these decide what a fit gives.
PACKAGES = (
    "joblib",
    "mlflow",
    "numpy",
    "pandas",
    "pyarrow",
    "scikit-learn",
    "scipy",
    "skops",
    "threadpoolctl",
    "xgboost",
)


@cache
def code() -> dict[str, str]:
    """Give the sha256 of each file of the package `mlplatform`, by its path."""
    folder = Path(mlplatform.__path__[0])
    files = sorted(path for path in folder.rglob("*") if path.suffix in {".py", ".toml", ".md"})
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@cache
def environment() -> dict[str, str]:
    """Give the versions of Python and of the packages that decide what a fit gives, and the kind of machine."""
    versions = {package: metadata.version(package) for package in PACKAGES}
    return {"python": platform.python_version(), "machine": platform.machine(), **versions}


def digest(value: object) -> str:
    """Give the sha256 of a value's JSON text, with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def tags() -> dict[str, str]:
    """Give the tags that each MLflow run gets when it starts."""
    return {CODE_TAG: digest(code()), ENVIRONMENT_TAG: json.dumps(environment(), sort_keys=True)}
