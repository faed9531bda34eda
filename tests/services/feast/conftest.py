"""The stores that are asked the same: ours on the object store, on a Dask cluster, on local files; stock DuckDB."""

from __future__ import annotations

from pathlib import Path

import pytest
from shop import Shop

from mlplatform.settings import Settings

OURS = ["ours on S3", "ours on Dask", "ours on local files"]


@pytest.fixture(params=[*OURS, "stock DuckDB"])
def shop(request: pytest.FixtureRequest, platform: Settings, tmp_path: Path) -> Shop:
    return _shop(request, platform, tmp_path)


@pytest.fixture(params=OURS)
def our_shop(request: pytest.FixtureRequest, platform: Settings, tmp_path: Path) -> Shop:
    return _shop(request, platform, tmp_path)


def _shop(request: pytest.FixtureRequest, platform: Settings, folder: Path) -> Shop:
    dask = request.getfixturevalue("dask_workers") if request.param == "ours on Dask" else None
    return Shop(request.param, folder, platform, scheduler=dask.scheduler_address if dask else "")
