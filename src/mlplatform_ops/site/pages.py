"""What the site says: its pages are written from the executed notebooks and the repository's documents."""

from __future__ import annotations

import os
import platform
import re
import tomllib
from base64 import b64decode, b64encode
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import nbformat

from mlplatform.errors import NotebookError
from mlplatform.results import RESULTS_MIME, read_results

HERE = Path(__file__).parent
QUESTIONS: Mapping[str, str] = tomllib.loads((HERE / "questions.toml").read_text())
STORY = "docs/images/story.svg"
LONG_CELL = 14  # lines; longer code is folded
# Documents of the repository that are pages too, by the name of the page. What does not exist is left out.
DOCUMENTS = {
    "data/README.md": "data-sheet",
    "docs/glossary.md": "glossary",
    "docs/your-own-data.md": "your-own-data",
    "docs/growing.md": "growing",
    "docs/speed.md": "speed",
    "deploy/README.md": "on-a-cluster",
    "deploy/production.md": "in-production",
    "tests/README.md": "tests",
    "SECURITY.md": "security",
    "CHANGELOG.md": "changes",
    "docs/decisions/README.md": "decisions/index",
}
PACKAGES = ("mlflow", "feast", "scikit-learn", "xgboost", "pandas", "duckdb", "redis", "jupyterlab", "sphinx", "furo")
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
PICTURES = {".png": "png", ".svg": "svg+xml"}
RECORDS = re.compile(r"^(results\.)?record\(", re.MULTILINE)


@dataclass(frozen=True)
class Chapter:
    """A notebook and how its last run went.

    Attributes:
        name: File name without suffix.
        notebook: The executed copy, or the stored notebook when it was not run.
        ran: Whether it was run.
        title: First heading.
        started: When it started, UTC; None when it was not run.
        seconds: How long it took.
        failed: Whether one of its cells failed.
        results: What it recorded; empty if it recorded nothing.
    """

    name: str
    notebook: nbformat.NotebookNode
    ran: bool
    title: str
    started: datetime | None = None
    seconds: float = 0.0
    failed: bool = False
    results: Mapping[str, Any] = field(default_factory=dict)

    @property
    def question(self) -> str:
        """The question that it answers."""
        return QUESTIONS.get(self.name, "")

    @property
    def result(self) -> str:
        """One word or two on how it went."""
        if not self.ran:
            return "not run"
        return "failed" if self.failed else "ok"


def read_chapters(stored: Iterable[Path], executed: Path) -> list[Chapter]:
    """Read every notebook, as executed where there is such a copy.

    Args:
        stored: The notebooks of the repository, in the order of reading.
        executed: The folder of executed copies.
    """
    return [_read_chapter(path, executed / path.name) for path in stored]


def _read_chapter(stored: Path, executed: Path) -> Chapter:
    ran = executed.exists()
    notebook = nbformat.read(executed if ran else stored, as_version=4)  # type: ignore[no-untyped-call]
    title = str(notebook.cells[0].source).partition("\n")[0].removeprefix("# ")
    if not ran:
        return Chapter(stored.stem, notebook, ran, title)
    how = notebook.metadata.get("papermill", {})
    try:
        results = read_results(executed)
    except NotebookError:
        results = {}
    return Chapter(
        stored.stem,
        notebook,
        ran,
        title,
        started=datetime.fromisoformat(how["start_time"]) if how.get("start_time") else None,
        seconds=float(how.get("duration") or 0),
        failed=bool(how.get("exception")) or any(map(_has_failed, notebook.cells)),
        results=results,
    )


def write_pages(root: Path, chapters: Iterable[Chapter], source: Path) -> None:
    """Write the sources of all pages; a file that would not change is left alone, so that Sphinx reads it no more.

    Args:
        root: The clone.
        chapters: The notebooks.
        source: The folder for the sources.
    """
    chapters = list(chapters)
    documents = _documents(root)
    pages = {
        "index.md": _index(chapters, documents, root / STORY),
        "champion.md": _champion(chapters),
        "model-card.md": _model_card(chapters),
        "lineage.md": _lineage(chapters),
        "status.md": _status(chapters),
    }
    for path, page in documents.items():
        folder = Path(page).parent
        pages[f"{page}.md"] = _relink(root, Path(path), folder, documents)
    for chapter in chapters:
        pages[f"notebooks/{chapter.name}.ipynb"] = _notebook_page(chapter)
    present = {str(path.relative_to(source)): path for path in source.rglob("*.*") if path.suffix in {".md", ".ipynb"}}
    for name, text in pages.items():
        if name not in present or present[name].read_text() != text:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_text(text)
    for name in present.keys() - pages.keys():
        present[name].unlink()


def _documents(root: Path) -> dict[str, str]:
    decisions = {
        f"docs/decisions/{path.name}": f"decisions/{path.stem}"
        for path in sorted((root / "docs" / "decisions").glob("[0-9]*.md"))
    }
    return {path: page for path, page in (DOCUMENTS | decisions).items() if (root / path).exists()}


def _relink(root: Path, document: Path, page_folder: Path, documents: Mapping[str, str]) -> str:
    """Point a document's links at pages of the site and show its pictures; what is neither is named."""

    def replace(found: re.Match[str]) -> str:
        picture, words, target = found.groups()
        address, hash_sign, anchor = target.partition("#")
        if not address or ":" in address:
            return found.group()
        path = os.path.normpath(document.parent / address)
        if picture and (root / path).exists():
            return _image((root / path).read_bytes(), f"image/{PICTURES[Path(path).suffix]}", words)
        if picture or path not in documents:
            return f"{words} (`{path}`)"
        page = os.path.relpath(f"{documents[path]}.md", page_folder)
        return f"[{words}]({page}{hash_sign}{anchor})"

    # Mermaid needs a script from elsewhere; its text can be read as it stands.
    return LINK.sub(replace, (root / document).read_text()).replace("```mermaid", "```text")


def _image(data: bytes, kind: str, alt: str) -> str:
    return f'<img alt="{escape(alt)}" src="data:{kind};base64,{b64encode(data).decode()}">'


def _notebook_page(chapter: Chapter) -> str:
    """Make a page of a notebook: what guards the prose is left off, long code is folded, figures have a text."""
    notebook = nbformat.from_dict(chapter.notebook)  # type: ignore[no-untyped-call]
    cells = [cell for cell in notebook.cells if not _is_guard(cell)]
    kept = {key: notebook.metadata[key] for key in ("kernelspec", "language_info") if key in notebook.metadata}
    told = "what the cell before shows"
    shown = []
    for cell in cells:
        cell = nbformat.from_dict({**cell, "metadata": {"tags": list(cell.metadata.get("tags", ()))}})  # type: ignore[no-untyped-call]
        if cell.cell_type == "markdown":
            headings = re.findall(r"^#+ (.+)$", cell.source, re.MULTILINE)
            told = headings[-1] if headings else told
        else:
            _mend_code(cell, told)
        shown.append(cell)
    title, _, rest = shown[0].source.partition("\n")
    shown[0].source = f"{title}\n\n{_opening(chapter)}\n{rest}"
    page = nbformat.v4.new_notebook(cells=shown, metadata=kept)  # type: ignore[no-untyped-call]
    return str(nbformat.writes(page))  # type: ignore[no-untyped-call]


def _mend_code(cell: nbformat.NotebookNode, told: str) -> None:
    if cell.source.count("\n") >= LONG_CELL:
        cell.metadata.tags.append("hide-input")
    for output in cell.get("outputs", []):
        html = output.get("data", {}).get("text/html")
        figure = _figure(output, f"Figure: {told}")
        if figure:
            output["data"] = {"text/html": figure}
            continue
        if html and "sk-top-container" in html:
            # scikit-learn's drawing of a pipeline cannot be used without a mouse; its text says the same.
            del output["data"]["text/html"]
        elif html:
            # An empty corner is no heading, and browsers draw the border from the style sheet.
            output["data"]["text/html"] = html.replace("<th></th>", "<td></td>").replace(' border="1"', "")


def _figure(output: nbformat.NotebookNode, otherwise: str) -> str:
    """Give a figure as HTML with a text of its own, which MyST-NB has for a whole cell only; empty if there is none."""
    for kind in ("image/png", "image/svg+xml"):
        found = output.get("data", {}).get(kind)
        if found:
            data = b64decode(found) if kind == "image/png" else found.encode()
            return _image(data, kind, output.metadata.get(kind, {}).get("alt") or otherwise)
    return ""


def _is_guard(cell: nbformat.NotebookNode) -> bool:
    """Whether a cell only checks or records what the text says, and succeeded."""
    if cell.cell_type != "code" or _has_failed(cell):
        return False
    recorded = any(RESULTS_MIME in output.get("data", {}) for output in cell.get("outputs", ()))
    return recorded or "claim" in cell.metadata.get("tags", ()) or bool(RECORDS.search(cell.source))


def _has_failed(cell: nbformat.NotebookNode) -> bool:
    return any(output["output_type"] == "error" for output in cell.get("outputs", ()))


def _opening(chapter: Chapter) -> str:
    file = f"`notebooks/{chapter.name}.ipynb`"
    if not chapter.ran:
        return (
            f"> **{chapter.question}**\n>\n> **Not run yet.** This page shows {file} without results; `make run-all` "
            "runs every notebook.\n"
        )
    when = f"{chapter.started:%d %B %Y, %H:%M} UTC" if chapter.started else "an unknown time"
    failed = " **One of its cells failed.**" if chapter.failed else ""
    return f"> **{chapter.question}**\n>\n> {file}, run on {when} in {chapter.seconds:.0f} s.{failed}\n"


def _index(chapters: list[Chapter], documents: Mapping[str, str], story: Path) -> str:
    rows = [
        f"| [{chapter.title}](notebooks/{chapter.name}.ipynb) | {chapter.question} | {_how(chapter)} |"
        for chapter in chapters
    ]
    missing = [chapter for chapter in chapters if not chapter.ran]
    lines = [
        "# A reference ML platform",
        "",
        "Ten notebooks take the census-income data from a first look to a served prediction that is watched. Each is a "
        "page here, as it ran, with its results. Start with the first one.",
        "",
        *((f'<div class="picture">\n{story.read_text().strip()}\n</div>', "") if story.exists() else ()),
        "## The notebooks",
        "",
        "| notebook | the question it answers | seconds | result |",
        "|---|---|---:|---|",
        *rows,
        "",
    ]
    if missing:
        lines += [f"{len(missing)} of {len(chapters)} were not run; `make run-all` runs every notebook.", ""]
    lines += ["## The champion", "", _champion_line(chapters), ""]
    groups = {
        "Notebooks": [f"notebooks/{chapter.name}" for chapter in chapters],
        "The model": ["champion", "model-card", "lineage", *_known(documents, "data-sheet")],
        "The platform": [
            "status",
            *_known(documents, "on-a-cluster", "in-production", "growing", "speed", "tests", "security", "changes"),
        ],
        "To look up": [*_known(documents, "glossary", "your-own-data")],
        "Decisions": [page for page in documents.values() if page.startswith("decisions/")],
    }
    for caption, names in groups.items():
        if names:
            lines += ["```{toctree}", ":hidden:", f":caption: {caption}", "", *names, "```", ""]
    return "\n".join(lines)


def _known(documents: Mapping[str, str], *pages: str) -> list[str]:
    return [page for page in pages if page in documents.values()]


def _how(chapter: Chapter) -> str:
    return f"{f'{chapter.seconds:.1f}' if chapter.ran else ''} | {chapter.result}"


def _results(chapters: Iterable[Chapter], name: str) -> Mapping[str, Any]:
    return next((chapter.results for chapter in chapters if chapter.name == name), {})


NO_CHAMPION = "No model was registered in this run: `make run` runs the notebook that does."


def _champion_line(chapters: list[Chapter]) -> str:
    found = _results(chapters, "04_register_model")
    if "champion" not in found:
        return NO_CHAMPION
    score = found["scores"]["roc_auc_score_test"]
    return (
        f"Version {found['champion']} of `income-above-50k` ({found['champion_name']}): area under the ROC curve "
        f"{score:.4f} on the rows held back. [Its card](champion.md), [what it may be used for](model-card.md), "
        "[where its answers come from](lineage.md)."
    )


def _champion(chapters: list[Chapter]) -> str:
    from mlplatform.history import FEATURES

    found = _results(chapters, "04_register_model")
    if "champion" not in found:
        return f"# The champion\n\n{NO_CHAMPION}\n"
    data = [row for row in _results(chapters, "07_predict_income").get("lineage", ()) if row["step"].endswith(" data")]
    lines = [
        "# The champion",
        "",
        "The version that answers, as notebook 4 left it. MLflow's page of the model shows what happened since.",
        "",
        "| | |",
        "|---|---|",
        f"| registered model | `income-above-50k`, version {found['champion']} |",
        f"| made by | MLflow run `{found['champion_run']}`, {found['champion_name']} |",
        *(f"| {_words(name)} | {value:.4f} |" for name, value in sorted(found["scores"].items())),
        f"| why it leads | {found['runner_up']['name']}: {found['runner_up']['reason']} |",
        f"| features | {', '.join(f'`{feature}`' for feature in FEATURES)} |",
        *(f"| {row['step']} | {row['name']}<br>`{row['where']}` |" for row in data),
        "",
        "[The model card](model-card.md) says what it may be used for, [the lineage](lineage.md) where it comes from.",
    ]
    return "\n".join(lines) + "\n"


def _words(score: str) -> str:
    return {
        "roc_auc_score_test": "area under the ROC curve, rows held back",
        "roc_auc_score_train": "area under the ROC curve, rows it learned from",
        "test_accuracy": "accuracy, rows held back",
        "training_accuracy": "accuracy, rows it learned from",
    }.get(score, score)


def _model_card(chapters: list[Chapter]) -> str:
    for chapter in chapters:
        for cell in chapter.notebook.cells:
            for output in cell.get("outputs", ()):
                text = str(output.get("data", {}).get("text/markdown", ""))
                if text.startswith("# Model card"):
                    return text
    return "# Model card\n\nNo model was evaluated in this run: `make run` runs the notebook that writes the card.\n"


def _lineage(chapters: list[Chapter]) -> str:
    rows = _results(chapters, "07_predict_income").get("lineage", ())
    if not rows:
        return "# Lineage\n\nNothing was predicted in this run: `make run` runs the notebook that does.\n"
    lines = [
        "# Lineage",
        "",
        "Where the last batch of predictions comes from, step by step, as MLflow and Feast recorded it.",
        "",
        '<div class="picture">',
        _lineage_picture(rows),
        "</div>",
        "",
        "| step | name | where |",
        "|---|---|---|",
        *(f"| {row['step']} | {row['name']} | `{row['where']}` |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def _lineage_picture(rows: Iterable[Mapping[str, str]]) -> str:
    """Draw the steps: data sets at the top, then one step under the other."""
    rows = list(rows)
    data = [row for row in rows if row["step"].endswith(" data")]
    after = [row for row in rows if row not in data]
    width, height, gap = 620, 58, 30
    parts = []

    def box(x: float, y: float, wide: float, row: Mapping[str, str]) -> None:
        name = row["name"] if len(row["name"]) < 60 else row["name"][:57] + "..."
        words = name.partition(", digest ")[0] if row in data else name
        parts.append(
            f'<rect x="{x:.0f}" y="{y}" width="{wide:.0f}" height="{height}" rx="8" class="box"/>'
            f'<text x="{x + wide / 2:.0f}" y="{y + 24}" class="step">{escape(row["step"])}</text>'
            f'<text x="{x + wide / 2:.0f}" y="{y + 45}" class="name">{escape(words)}</text>'
        )

    def arrow(x: float, y: float) -> None:
        parts.append(
            f'<path d="M{x:.0f} {y} v{gap - 8}" class="line"/>'
            f'<path d="M{x - 5:.0f} {y + gap - 9} h10 l-5 8 z" class="tip"/>'
        )

    y = 4
    wide = (width - 20 * (len(data) - 1)) / max(len(data), 1)
    for number, row in enumerate(data):
        box(number * (wide + 20), y, wide, row)
        arrow(number * (wide + 20) + wide / 2, y + height)
    y += height + gap
    for number, row in enumerate(after):
        box(0, y, width, row)
        if number + 1 < len(after):
            arrow(width / 2, y + height)
        y += height + gap
    title = "From the data sets to the predictions: " + ", ".join(row["step"] for row in rows)
    style = (
        ".box{fill:var(--color-background-secondary);stroke:var(--color-brand-primary)}"
        ".step{font:600 15px sans-serif;text-anchor:middle;fill:var(--color-foreground-primary)}"
        ".name{font:14px sans-serif;text-anchor:middle;fill:var(--color-foreground-secondary)}"
        ".line{stroke:var(--color-foreground-secondary);fill:none}.tip{fill:var(--color-foreground-secondary)}"
    )
    return (
        f'<svg viewBox="-2 0 {width + 4} {y - gap + 4}" role="img" aria-label="{escape(title)}"><style>{style}</style>'
        f"{''.join(parts)}</svg>"
    )


def _status(chapters: list[Chapter]) -> str:
    ran = [chapter for chapter in chapters if chapter.started]
    lines = ["# Status", "", "What was run, when, with which versions, and how long it took.", ""]
    if ran:
        failed = sum(chapter.failed for chapter in ran)
        total = sum(chapter.seconds for chapter in ran)
        lines += [
            f"{len(ran)} of {len(chapters)} notebooks were run, {failed} failed. Together they took {total:.0f} s; two "
            "run at a time, and one that has not changed is not run again.",
            "",
        ]
    lines += [
        "| notebook | started (UTC) | seconds | result |",
        "|---|---|---:|---|",
        *(
            f"| [{chapter.name}](notebooks/{chapter.name}.ipynb) | "
            f"{f'{chapter.started:%Y-%m-%d %H:%M:%S}' if chapter.started else ''} | {_how(chapter)} |"
            for chapter in chapters
        ),
        "",
        "## Versions",
        "",
        "| what | version |",
        "|---|---|",
        f"| Python | {platform.python_version()} |",
        f"| system | {platform.system()}, {platform.machine()}, {os.cpu_count()} cores |",
        *(f"| {name} | {_version(name)} |" for name in PACKAGES),
        "",
        "`make run` runs no tests; `make test` does.",
    ]
    return "\n".join(lines) + "\n"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
