"""The site as `make run` builds it, from the notebooks that the tests have executed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from web_pages import dead_links, loads_from_elsewhere, read_page

from mlplatform.results import read_results
from mlplatform_ops.site.build import build

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def site(executed: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All pages, built without a warning."""
    folder = tmp_path_factory.mktemp("built") / "site"
    assert build(ROOT, next(iter(executed.values())).parent, folder) == []
    return folder


def test_every_notebook_has_a_page_with_its_results_and_the_first_page_leads_there(
    site: Path, executed: dict[str, Path]
) -> None:
    first = read_page(site / "index.html").links
    for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")):
        assert f"notebooks/{path.stem}.html" in first
        text = (site / "notebooks" / f"{path.stem}.html").read_text()
        assert ("Not run yet." in text) == (path.stem not in executed)
        assert ('class="cell_output' in text) == (path.stem in executed)


def test_no_link_is_dead_and_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    assert len(list(site.rglob("*.html"))) > 20
    assert dead_links(site) == []
    assert loads_from_elsewhere(site) == []


def test_what_guards_the_prose_is_off_the_pages(site: Path, executed: dict[str, Path]) -> None:
    for name in executed:
        text = re.sub(r"<[^>]+>", "", (site / "notebooks" / f"{name}.html").read_text())
        assert "record(" not in text, name
    assert "not the table that th" not in (site / "notebooks" / "01_explore_data.html").read_text()


def test_card_lineage_and_status_show_what_the_notebooks_recorded(site: Path, executed: dict[str, Path]) -> None:
    registered = read_results(executed["04_register_model"])
    champion = (site / "champion.html").read_text()
    assert registered["champion_run"] in champion
    assert f"{registered['scores']['roc_auc_score_test']:.4f}" in champion
    lineage = re.sub(r"<[^>]+>", "", (site / "lineage.html").read_text())
    for step in read_results(executed["07_predict_income"])["lineage"]:
        assert step["where"] in lineage
    assert "It must decide nothing about anybody" in (site / "model-card.html").read_text()
    status = (site / "status.html").read_text()
    assert status.count(">ok<") == len(executed)


def test_no_picture_is_without_a_text_and_every_page_has_one(site: Path) -> None:
    for path in site.rglob("*.html"):
        if path.name not in {"search.html", "genindex.html"}:
            assert read_page(path).words > 100, path
        for tag in re.findall(r"<img [^>]*>", path.read_text()):
            assert re.search(r'alt="(?!\.\./_images|_images)[^"]+"', tag), f"{path.name}: {tag}"


def test_where_nothing_was_run_the_site_says_so_without_a_dead_link(tmp_path: Path) -> None:
    folder = tmp_path / "site"
    assert build(ROOT, tmp_path / "nothing", folder) == []
    assert dead_links(folder) == []
    assert "10 of 10 were not run" in (folder / "index.html").read_text()
