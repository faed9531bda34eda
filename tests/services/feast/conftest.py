"""The three stores that are asked the same: ours on the object store, ours on local files, stock DuckDB."""

from __future__ import annotations

from pathlib import Path

import pytest
from shop import Shop

from mlplatform.settings import Settings


@pytest.fixture(params=["ours on S3", "ours on local files", "stock DuckDB"])
def shop(request: pytest.FixtureRequest, platform: Settings, tmp_path: Path) -> Shop:
    return Shop(request.param, tmp_path, platform)


@pytest.fixture(params=["ours on S3", "ours on local files"])
def our_shop(request: pytest.FixtureRequest, platform: Settings, tmp_path: Path) -> Shop:
    return Shop(request.param, tmp_path, platform)
