"""Modules that are imported when they are first used, and not when they are named."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any


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


def stand_ins(package: str, *names: str) -> Callable[[str], ModuleType]:
    """Make a package's `__getattr__`, so that `from package import name` waits with the import of these modules.

    They need MLflow or Feast, which read some of their settings, and call home, while they are being imported. That
    must come after `connect`, and the cell with the imports stands before it.

    Args:
        package: The package's name.
        names: Its modules that wait.
    """

    def find(name: str) -> ModuleType:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return _Later(f"{package}.{name}")

    return find
