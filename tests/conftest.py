"""Fixtures for every test: a platform of the session's own, and the notebooks run on it once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import exercises
import hypothesis
import pytest
from xdist.scheduler import LoadScopeScheduling

from mlplatform.clients.hastening import hasten_feast
from mlplatform.engines.cluster import VARIABLE
from mlplatform.settings import STATE_VARIABLE, VARIABLES, Settings
from mlplatform_ops import ports
from mlplatform_ops import runner as notebooks
from mlplatform_ops.dask_cluster import dask_cluster
from mlplatform_ops.embedded.platform import EmbeddedPlatform

hasten_feast()
# By itself Hypothesis fails an example that takes 200 ms, and a busy machine takes that for any.
hypothesis.settings.register_profile("any machine", deadline=None)
hypothesis.settings.load_profile("any machine")
# Each process chooses ports of its own, so that none is taken by the other before a server listens on it.
_PROCESS = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 2
ports.FREE_PORTS = range(20_000 + 6_000 * _PROCESS, 26_000 + 6_000 * _PROCESS)
ROOT = Path(__file__).parent.parent
# Files whose tests may run apart, each of which takes its time.
SHARE_NOTHING = ("tests/browser/test_site_in_browser.py", "tests/unit/test_progress.py")


class _Halves(LoadScopeScheduling):
    """Divides the tests between the two processes of `make test`.

    All files whose tests need the executed notebooks go to one process, which executes them once. The other process
    takes one file after the other; each starts a platform when a test first asks for it. (`--dist loadgroup` would do,
    but xdist 3.8 cannot name its groups under pytest 9.)
    """

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.partition("::")[0]
        if path in SHARE_NOTHING:
            return nodeid
        return "notebooks" if "executed: " in (ROOT / path).read_text() else path


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    """Have xdist divide the tests as above."""
    return _Halves(config, log)


@pytest.fixture(scope="session")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedPlatform]:
    """A running platform on free ports, beside whatever else runs on this machine."""
    platform = EmbeddedPlatform(tmp_path_factory.mktemp("platform") / "state", environ={}, default_ports=False)
    try:
        platform.up()
        yield platform
    finally:
        platform.clean()


@pytest.fixture(scope="session")
def platform(embedded: EmbeddedPlatform) -> Iterator[Settings]:
    """The platform's settings, which are this process's environment too."""
    settings = embedded.settings
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(STATE_VARIABLE, str(embedded.state))
        for name, value in settings.to_env().items():
            patch.setenv(name, value)
        # Two busy cores are no fault of a service; the tests of faults have the product's own limits.
        patch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")
        yield settings


@pytest.fixture(scope="session")
def dask_workers(platform: Settings) -> Iterator[Any]:
    """A Dask cluster of two workers, which spill whatever they hold; `feature_store.yaml` is not told of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DASK_DISTRIBUTED__WORKER__MEMORY__TARGET", "0.000001")
        with dask_cluster(2) as cluster:
            patch.delenv(VARIABLE)
            yield cluster


@pytest.fixture
def on_dask(dask_workers: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The one setting that names the cluster, which the feature repository's own `feature_store.yaml` reads too."""
    monkeypatch.setenv(VARIABLE, dask_workers.scheduler_address)
    return dask_workers


@pytest.fixture(scope="session")
def executed(
    embedded: EmbeddedPlatform, platform: Settings, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Every notebook, run once in the order they need each other and with its exercises done: executed copies by name.

    So each notebook is run, with all its claims, on what the exercises of those before it have left.
    Copies of a chain that failed are kept in `build/failed-notebooks`.
    """
    output = tmp_path_factory.mktemp("notebooks")
    chain = exercises.done(notebooks.find_notebooks(ROOT / "notebooks"), output / "exercises")
    embedded.up(also={name for path in chain for name in notebooks.services(path)})
    executions = notebooks.run_all(chain, output)
    problems = [f"{entry.name}: {entry.error}" for entry in executions if entry.error]
    if problems:
        kept = ROOT / "build" / "failed-notebooks"
        shutil.copytree(output, kept, dirs_exist_ok=True)
        pytest.fail(f"{'; '.join(problems)} (executed copies: {kept})", pytrace=False)
    return {entry.name: entry.executed for entry in executions}


@pytest.fixture
def no_platform(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No platform in the environment and a state folder that does not exist yet."""
    for name in VARIABLES.values():
        monkeypatch.delenv(name, raising=False)
    state = tmp_path / "state"
    monkeypatch.setenv(STATE_VARIABLE, str(state))
    return state
