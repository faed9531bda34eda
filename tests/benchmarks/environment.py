"""List the packages that `make run` installs, those that take most room on the disk, and which packages need them."""

from __future__ import annotations

import re
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from importlib.metadata import distribution, distributions

from figures import Figure, keep
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mlplatform.settings import find_root

SHOWN = 15


def main() -> None:
    """Print a Markdown table and keep it."""
    keep("environment", measure())


def measure() -> Iterator[Figure]:
    """Add up the files of each package of the lock; compiled modules come on top."""
    lock = (find_root() / "requirements.lock").read_text()
    here = {canonicalize_name(found.name) for found in distributions()}  # not what other systems or Pythons need
    locked = here & set(re.findall(r"^([a-z0-9.-]+)==", lock, re.MULTILINE))
    sizes = {name: sum(file.size or 0 for file in distribution(name).files or ()) / 1e6 for name in locked}
    needed_by = requirements(locked)
    what = "what `make run` installs, on the disk"
    yield Figure(what, f"all {len(sizes)} packages", sum(sizes.values()), "MB")
    for name, size in sorted(sizes.items(), key=lambda entry: -entry[1])[:SHOWN]:
        yield Figure(what, name, size, "MB", beside=f"needed by {', '.join(sorted(needed_by[name]))}")


def requirements(locked: set[str]) -> dict[str, set[str]]:
    """Find which packages of the lock, and which groups of ours, ask for each one; extras count as asked for."""
    project = tomllib.loads((find_root() / "pyproject.toml").read_text())
    groups = {"this project": project["project"]["dependencies"]}
    groups |= {f"our group {name}": lines for name, lines in project["dependency-groups"].items()}
    needed_by: dict[str, set[str]] = defaultdict(set)
    asked = [(name, line) for name, lines in groups.items() for line in lines if isinstance(line, str)]
    asked += [(name, line) for name in locked for line in distribution(name).requires or ()]
    for name, line in asked:
        package = canonicalize_name(Requirement(line).name)
        if package in locked and "extra ==" not in line:
            needed_by[package].add(name)
    return needed_by


if __name__ == "__main__":
    main()
