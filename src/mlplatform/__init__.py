"""The helpers that carry the notebooks.

Importing this package, or any module of it, starts nothing and reads no environment.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

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
    "serving",
    "tracking",
)


class _Later(ModuleType):
    """Stands for a module until an attribute of it is asked for.

    Python 3.11's `importlib.util.LazyLoader` fails when two threads ask first at the same time; an import does not.
    """

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module(self.__name__), name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(import_module(self.__name__), name, value)

    def __delattr__(self, name: str) -> None:
        delattr(import_module(self.__name__), name)

    def __dir__(self) -> list[str]:
        return dir(import_module(self.__name__))


def __getattr__(name: str) -> ModuleType:
    if name not in _HEAVY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _Later(f"{__name__}.{name}")
