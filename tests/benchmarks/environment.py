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
GROUPS = ("build", "embedded", "ops")  # what `make lock` puts into requirements.lock


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
    """Find which packages of the lock, with the extras asked of them, and which of our groups ask for each one."""
    project = tomllib.loads((find_root() / "pyproject.toml").read_text())
    lines = {"this project": project["project"]["dependencies"]}
    lines |= {f"our group {name}": project["dependency-groups"][name] for name in GROUPS}
    waiting = [(name, "", Requirement(line)) for name, some in lines.items() for line in some]
    needed_by: dict[str, set[str]] = defaultdict(set)
    seen: set[tuple[str, str]] = set()
    while waiting:
        name, extra, wanted = waiting.pop()
        package = canonicalize_name(wanted.name)
        if package not in locked or (wanted.marker and not wanted.marker.evaluate({"extra": extra})):
            continue
        needed_by[package].add(name)
        for key in {(package, asked) for asked in ("", *wanted.extras)} - seen:
            seen.add(key)
            waiting += [(*key, Requirement(line)) for line in distribution(package).requires or ()]
    return needed_by


if __name__ == "__main__":
    main()
