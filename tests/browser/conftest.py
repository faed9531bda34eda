"""A real browser: the system's Chromium, driven by Playwright; what it showed is kept in build/screenshots."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright
from web_pages import PATIENCE_MS, SHOTS

from mlplatform.settings import Settings


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


@pytest.fixture
def context(browser: Browser, platform: Settings) -> Iterator[BrowserContext]:
    """A window of its own, which answers MLflow's question for user and password."""
    login = {"username": platform.tracking_username, "password": platform.tracking_password}
    opened = browser.new_context(viewport={"width": 1440, "height": 900}, http_credentials=login)
    opened.set_default_timeout(PATIENCE_MS)
    yield opened
    opened.close()


@pytest.fixture
def page(context: BrowserContext) -> Page:
    """An empty tab."""
    return context.new_page()
