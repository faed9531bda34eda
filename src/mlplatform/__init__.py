"""The helpers that carry the notebooks.

Importing this package, or any module of it, starts nothing and reads no environment.
"""

from __future__ import annotations

import sys
from importlib.util import LazyLoader, find_spec, module_from_spec
from types import ModuleType

from mlplatform.connection import connect

__all__ = ["connect"]

# These need MLflow or Feast, which read some of their settings, and call home, while they are being imported. So
# `from mlplatform import tracking` waits with that import until `tracking` is first used, which is after `connect`.
_HEAVY = (
    "drift_watch",
    "evaluation",
    "features",
    "lineage",
    "registry",
    "releases",
    "run_context",
    "serving",
    "tracking",
)


def __getattr__(name: str) -> ModuleType:
    full_name = f"{__name__}.{name}"
    spec = find_spec(full_name) if name in _HEAVY else None
    if spec is None or spec.loader is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    spec.loader = LazyLoader(spec.loader)
    module = sys.modules[full_name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    globals()[name] = module
    return module
