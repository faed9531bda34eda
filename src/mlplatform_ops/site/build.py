"""Build the site: write its sources, and let Sphinx make pages of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from mlplatform.errors import PlatformError
from mlplatform_ops.runner import find_notebooks
from mlplatform_ops.site import pages

# What Furo and Sphinx leave for who hears a page: names for its parts, a level for headings, no heading without words.
MENDED = {
    '<aside class="sidebar-drawer">': '<aside class="sidebar-drawer" aria-label="All pages">',
    '<aside class="toc-drawer">': '<aside class="toc-drawer" aria-label="On this page">',
    'class="caption" role="heading">': 'class="caption" role="heading" aria-level="2">',
    '<th class="head"><p></p></th>': "<td></td>",
    '<div id="search-results"></div>': '<h1>Search</h1><div id="search-results"></div>',
}


class SiteError(PlatformError, RuntimeError):
    """The site cannot be built."""


def build(root: Path, executed: Path, site: Path) -> list[str]:
    """Build all pages from the repository and the executed notebooks; what did not change is not built again.

    Args:
        root: The clone.
        executed: The folder of executed notebooks. One that is not there was not run, and its page says so.
        site: The folder for the pages; its sources lie beside it.

    Returns:
        Sphinx's warnings.

    Raises:
        SiteError: Sphinx failed, or the disk is full.
    """
    from filelock import FileLock

    work = site.with_name(f".{site.name}")
    try:
        work.mkdir(parents=True, exist_ok=True)
        with FileLock(work / "lock"):
            chapters = pages.read_chapters(find_notebooks(root / "notebooks", groups=True), executed)
            pages.write_pages(root, chapters, work / "source")
            built = work / "built"
            if (site / "index.html").exists() and _is_newer(built, work / "source"):
                return []
            folders = (str(work / "source"), str(site))
            options = ["-q", "-b", "html", "-c", str(pages.HERE), "-d", str(work / "doctrees")]
            command = [sys.executable, "-m", "sphinx", *options, *folders]
            outcome = subprocess.run(command, capture_output=True, text=True, check=False)
            _mend(site)
            if not outcome.returncode:
                built.touch()
    except OSError as error:
        raise SiteError(f"cannot write the site to {site}: {error.strerror or error}") from error
    said = outcome.stderr.strip().splitlines()
    if outcome.returncode:
        raise SiteError(f"the site cannot be built: {said[-1] if said else 'Sphinx failed'}")
    return said


def _is_newer(built: Path, source: Path) -> bool:
    """Whether nothing has changed since pages were built whole."""
    parts = [*source.rglob("*.*"), *pages.HERE.rglob("*.*")]
    return built.exists() and built.stat().st_mtime > max(path.stat().st_mtime for path in parts)


def _mend(site: Path) -> None:
    for page in site.rglob("*.html"):
        before = text = page.read_text()
        for given, better in MENDED.items():
            text = text if better in text else text.replace(given, better)
        if text != before:
            page.write_text(text)
