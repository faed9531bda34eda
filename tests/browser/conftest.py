"""A real browser: the system's Chromium, driven by Playwright; what it showed is kept in build/screenshots."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, sync_playwright
from web_pages import SHOTS

from mlplatform.settings import find_root, state_folder
from mlplatform_ops.embedded.platform import EmbeddedPlatform


@pytest.fixture(scope="session")
def platform() -> EmbeddedPlatform:
    """The clone's own platform, on which `make run` ran the notebooks; `make test-browser` does that first."""
    return EmbeddedPlatform(state_folder(find_root()))


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Chromium without a window; it is never downloaded."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if not found:
        pytest.fail("no Chromium on PATH; on Debian: apt-get install chromium", pytrace=False)
    SHOTS.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        # Its sandbox does not start for root.
        flags = ["--no-sandbox"] if os.getuid() == 0 else []
        chromium = playwright.chromium.launch(executable_path=found, args=flags)
        yield chromium
        chromium.close()
