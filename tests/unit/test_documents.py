from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TRACKED = [
    ROOT / name
    for name in subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],  # noqa: S607
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
]
DOCUMENTS = [path for path in TRACKED if path.suffix == ".md"]


def identify(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("document", DOCUMENTS, ids=identify)
def test_every_link_inside_the_repository_leads_somewhere(document: Path) -> None:
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", document.read_text())
    assert [link for link in links if not (document.parent / link).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=identify)
def test_every_make_target_that_a_document_names_exists(document: Path) -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^|`|\()make (?:-s )?([a-z][a-z0-9-]+)", document.read_text(), re.MULTILINE))
    assert named - targets == set()


def test_the_index_lists_every_decision_in_order() -> None:
    folder = ROOT / "docs" / "decisions"
    records = sorted(path.name for path in folder.glob("0*.md"))
    listed = re.findall(r"\((0\d{3}-[^)]+)\)", (folder / "README.md").read_text())
    assert listed == records
    for name in records:
        title = (folder / name).read_text().splitlines()[0].split(". ", 1)[1]
        assert f"[{title}]({name})" in (folder / "README.md").read_text()


def test_the_readme_shows_every_notebook_and_every_folder() -> None:
    text = (ROOT / "README.md").read_text()
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        assert f"notebooks/{notebook.name}" in text
    folders = {path.relative_to(ROOT).parts[0] for path in TRACKED if path.parent != ROOT}
    assert [name for name in sorted(folders) if not name.startswith(".") and f"\n{name}/" not in text] == []


def test_no_address_of_a_package_registry_is_kept() -> None:
    for path in TRACKED:
        if path.suffix in {".lock", ".txt", ".toml"}:
            assert "://" not in path.read_text(), path


def test_notebooks_are_stored_without_outputs() -> None:
    for path in TRACKED:
        if path.suffix == ".ipynb":
            text = path.read_text()
            assert '"output_type"' not in text, path
            assert re.search(r'"execution_count": \d', text) is None, path
