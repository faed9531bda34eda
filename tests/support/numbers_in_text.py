"""The numbers that a text states: where they stand, and whether a result says the same."""

from __future__ import annotations

import json
import re
from pathlib import Path

# What is no claim: code, addresses, numbering, and the names of notebooks, sections, exercises and decisions.
_NO_CLAIM = re.compile(
    r"```.*?```|`[^`\n]*(?:\n[^`\n]+)?`|\]\([^)]*\)|<[^>]+>"
    r"|^\s*(?:#+ )?\d+\. |^### Exercise \d+:|^\*\*Time:\*\* \d+ minutes"
    r"|\b(?:[Nn]otebooks?|[Ss]ections?|[Ee]xercises?|[Dd]ecisions?|In) \d+(?:(?:,| and| to| or) \d+)*",
    re.DOTALL | re.MULTILINE,
)
_NUMBER = re.compile(r"(?<![\w.,/-])-?\d[\d,]*(?:\.\d+)?(?!\w)(?: ?%)?")


def read_text(path: Path) -> str:
    """Give a document's text: of a notebook its text cells, of another file all but its tables."""
    if path.suffix != ".ipynb":
        return "".join(line for line in path.read_text().splitlines(keepends=True) if not line.startswith("|"))
    cells = json.loads(path.read_text())["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def find(text: str) -> list[str]:
    """List the numbers of a text, each once, in the order in which they first occur."""
    found = _NUMBER.findall(_NO_CLAIM.sub(" ", text))
    return list(dict.fromkeys(number.rstrip(",").replace(" %", "%") for number in found))


def says(number: str, value: float) -> bool:
    """Say whether a number in a text is this value, to the digits that the text gives."""
    digits = number.rstrip("%").replace(",", "")
    percent = 100 if number.endswith("%") else 1
    unit = 10.0 ** -len(digits.partition(".")[2])
    return abs(float(digits) - percent * value) <= unit / 2 + 1e-9
