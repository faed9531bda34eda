"""Check built pages without a browser: every link leads somewhere, and nothing is loaded from elsewhere."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

SHOTS = Path(__file__).parents[2] / "build" / "screenshots"
PATIENCE_MS = 120_000  # a page that comes late is no failure

# What a browser fetches by itself, by tag and attribute; a link's `href` only for the kinds that are fetched.
LOADS = {
    ("audio", "src"), ("embed", "src"), ("iframe", "src"), ("img", "src"), ("img", "srcset"), ("image", "href"),
    ("input", "src"), ("object", "data"), ("script", "src"), ("source", "src"), ("source", "srcset"), ("track", "src"),
    ("use", "href"), ("video", "poster"), ("video", "src"),
}  # fmt: skip
NOT_FETCHED = {"author", "canonical", "copyright", "help", "index", "license", "next", "prev", "search"}
IN_STYLE = re.compile(r"""(?:url\(\s*['"]?|@import\s+['"])([^'")\s]+)""")


@dataclass
class Page:
    """What one page holds.

    Attributes:
        ids: What an anchor can name.
        links: Where a reader can go.
        loads: What a browser fetches to show it.
        words: How many words a reader sees.
    """

    ids: set[str] = field(default_factory=set)
    links: list[str] = field(default_factory=list)
    loads: list[str] = field(default_factory=list)
    words: int = 0


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.page = Page()
        self._tag = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._tag = tag
        given = {name.removeprefix("xlink:"): value or "" for name, value in attrs}
        self.page.ids |= {given[name] for name in ("id", "name") if name in given}
        if tag in {"a", "area"} and "href" in given:
            self.page.links.append(given["href"])
        if tag == "link" and not set(given.get("rel", "").split()) & NOT_FETCHED:
            self.page.loads.append(given["href"])
        elif tag == "link":
            self.page.links.append(given["href"])
        self.page.loads += [value for name, value in given.items() if (tag, name) in LOADS]
        self.page.loads += IN_STYLE.findall(given.get("style", ""))

    def handle_data(self, data: str) -> None:
        if self._tag == "style":
            self.page.loads += IN_STYLE.findall(data)
        elif self._tag != "script":
            self.page.words += len(data.split())


@cache
def read_page(path: Path) -> Page:
    """Read one page."""
    reader = _Reader()
    reader.feed(path.read_text())
    return reader.page


def shown_problems(page: Any, name: str, width: int, *, axe: bool = True) -> list[str]:
    """List what is wrong with a page that a browser shows: wider than the screen, or something that axe finds.

    Args:
        page: Playwright's page.
        name: What to call it.
        width: The screen's, in pixels.
    """
    from axe_playwright_python.sync_playwright import Axe  # only where there is a browser

    wide = page.evaluate("document.documentElement.scrollWidth") > width
    problems = [f"{name}: wider than the screen"] if wide else []
    for found in Axe().run(page).response["violations"] if axe else ():
        where = ", ".join(str(node["target"]) for node in found["nodes"][:3])
        problems.append(f"{name}: {found['id']}: {found['help']} at {where}")
    return problems


def dead_links(site: Path) -> list[str]:
    """List links and loads within a site that lead nowhere, each as `page -> target`."""
    dead = []
    for path in sorted(site.rglob("*.html")):
        page = read_page(path)
        for target in page.links + page.loads:
            parts = urlsplit(target)
            # The next start may choose another port, so a page must not lead to this machine's platform.
            if parts.hostname in {"127.0.0.1", "localhost"}:
                dead.append(f"{path.relative_to(site)} -> {target}")
            if parts.scheme or parts.netloc or target == "#":
                continue
            led = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchor = unquote(parts.fragment)
            # Sphinx's search page makes its own anchors.
            known = not anchor or led.suffix != ".html" or (led.exists() and anchor in read_page(led).ids)
            if not led.is_file() or not known:
                dead.append(f"{path.relative_to(site)} -> {target}")
    return dead


def loads_from_elsewhere(site: Path) -> list[str]:
    """List what pages and style sheets load from another place than the site, each as `file -> address`."""
    found = []
    for path in sorted([*site.rglob("*.html"), *site.rglob("*.css")]):
        loads = read_page(path).loads if path.suffix == ".html" else IN_STYLE.findall(path.read_text())
        outside = [load for load in loads if urlsplit(load).scheme not in {"", "data"} or load.startswith("//")]
        found += [f"{path.relative_to(site)} -> {load}" for load in outside]
    return found
