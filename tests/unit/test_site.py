from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from web_pages import dead_links, loads_from_elsewhere

from mlplatform.results import RESULTS_MIME
from mlplatform_ops.site import pages

ROOT = Path(__file__).parents[2]


def _output(kind: str, **fields: object) -> nbformat.NotebookNode:
    return nbformat.v4.new_output(kind, **fields)


def _page(tmp_path: Path, cells: list[nbformat.NotebookNode]) -> str:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# 1. Double\n\nText."), *cells])
    for folder in ("stored", "executed"):
        (tmp_path / folder).mkdir(exist_ok=True)
        nbformat.write(notebook, tmp_path / folder / "01_double.ipynb")
    chapters = pages.read_chapters([tmp_path / "stored" / "01_double.ipynb"], tmp_path / "executed")
    pages.write_pages(tmp_path, chapters, tmp_path / "source")
    return (tmp_path / "source" / "notebooks" / "01_double.ipynb").read_text()


@pytest.mark.parametrize("fails", [False, True])
def test_a_claim_is_off_the_page_unless_it_fails(tmp_path: Path, *, fails: bool) -> None:
    claim = nbformat.v4.new_code_cell("assert size == 1, 'size moved'", metadata={"tags": ["claim"]})
    if fails:
        claim.outputs = [_output("error", ename="AssertionError", evalue="size moved", traceback=[])]
    assert ("size moved" in _page(tmp_path, [claim])) == fails


def test_what_a_notebook_records_is_off_its_page(tmp_path: Path) -> None:
    recorded = _output("display_data", data={RESULTS_MIME: {"doubled": 2}, "text/plain": "doubled: 2"})
    page = _page(tmp_path, [nbformat.v4.new_code_cell("results.record(doubled=2)", outputs=[recorded])])
    assert "doubled" not in page


def test_long_code_is_folded_and_short_code_is_not(tmp_path: Path) -> None:
    for lines, folded in ((pages.LONG_CELL, False), (pages.LONG_CELL + 1, True)):
        page = _page(tmp_path, [nbformat.v4.new_code_cell("\n".join(["x = 1"] * lines))])
        assert ("hide-input" in page) == folded


def test_every_notebook_has_its_question() -> None:
    assert set(pages.QUESTIONS) == {path.stem for path in (ROOT / "notebooks").glob("[0-9]*.ipynb")}


def test_a_page_that_did_not_change_is_not_written_again_and_one_that_ended_is_removed(tmp_path: Path) -> None:
    _page(tmp_path, [])
    index, old = tmp_path / "source" / "index.md", tmp_path / "source" / "notebooks" / "00_old.ipynb"
    old.write_text("{}")
    before = index.stat().st_mtime_ns
    _page(tmp_path, [])
    assert index.stat().st_mtime_ns == before
    assert not old.exists()


def test_links_lead_to_pages_of_the_site_or_name_the_file(tmp_path: Path) -> None:
    (tmp_path / "docs" / "decisions").mkdir(parents=True)
    (tmp_path / "deploy").mkdir()
    (tmp_path / "deploy" / "README.md").write_text(
        "[why](../docs/decisions/0001-why.md#cost) [code](../src/x.py) [web](https://a.b)"
    )
    (tmp_path / "docs" / "decisions" / "0001-why.md").write_text("# Why\n\n## Cost\n")
    _page(tmp_path, [])
    text = (tmp_path / "source" / "on-a-cluster.md").read_text()
    assert text == "[why](decisions/0001-why.md#cost) code (`src/x.py`) [web](https://a.b)"


def test_the_link_check_finds_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "good.html").write_text('<h1 id="top">x</h1><a href="bad.html">y</a><a href="https://a.b">z</a>')
    (tmp_path / "bad.html").write_text(
        '<a href="good.html#top">a</a><a href="good.html#no">b</a><a href="no.html">c</a>'
        '<script src="https://a.b/x.js"></script><p style="background: url(//a.b/c.png)">d</p>'
    )
    (tmp_path / "style.css").write_text("@import 'https://a.b/font.css';")
    assert dead_links(tmp_path) == ["bad.html -> good.html#no", "bad.html -> no.html"]
    assert loads_from_elsewhere(tmp_path) == [
        "bad.html -> https://a.b/x.js",
        "bad.html -> //a.b/c.png",
        "style.css -> https://a.b/font.css",
    ]


def test_a_documents_picture_is_on_its_page_and_a_picture_that_is_not_there_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "docs" / "images"
    folder.mkdir(parents=True)
    (folder / "growth.svg").write_text("<svg/>")
    text = '# Speed\n\n![Rows & "seconds"](images/growth.svg) ![Bytes](lost.svg)\n'
    (tmp_path / "docs" / "speed.md").write_text(text)
    pages.write_pages(tmp_path, [], tmp_path / "source")
    page = (tmp_path / "source" / "speed.md").read_text()
    assert '<img alt="Rows &amp; &quot;seconds&quot;" src="data:image/svg+xml;base64,PHN2Zy8+">' in page
    assert "Bytes (`docs/lost.svg`)" in page
