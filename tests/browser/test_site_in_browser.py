from __future__ import annotations

from pathlib import Path

import pytest
from playwright.sync_api import Browser
from web_pages import PATIENCE_MS, SHOTS, shown_problems

from mlplatform.settings import find_root


@pytest.fixture
def site() -> Path:
    """The pages that `make run` made."""
    return find_root() / "build" / "site"


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_every_page_can_be_read_and_axe_finds_nothing(browser: Browser, site: Path, width: int, scheme: str) -> None:
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    context.set_default_timeout(PATIENCE_MS)
    page, asked, problems = context.new_page(), [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: problems.append(f"{page.url}: {error}"))
    for path in sorted(site.rglob("*.html")):
        name = str(path.relative_to(site).with_suffix(""))
        page.goto(path.as_uri())
        page.screenshot(path=SHOTS / "site" / f"{name.replace('/', '-')}-{width}-{scheme}.png")
        text = page.inner_text("article") if page.query_selector("article") else ""
        if len(text.split()) < 20 and name not in {"search", "genindex"}:
            problems.append(f"{name}: hardly a word")
        # What axe looks at depends on the width and on the scheme, and not on the two together: each is looked at once.
        problems += shown_problems(page, name, width, axe=(width == 390) == (scheme == "dark"))
    context.close()
    assert problems == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []


def test_search_finds_a_word_without_a_server(browser: Browser, site: Path) -> None:
    context = browser.new_context()
    context.set_default_timeout(PATIENCE_MS)
    page = context.new_page()
    page.goto((site / "index.html").as_uri())
    page.fill(".sidebar-search", "calibration")
    page.keyboard.press("Enter")
    page.wait_for_selector("ul.search li a")
    assert "Evaluate the models" in page.inner_text("ul.search")
    context.close()
