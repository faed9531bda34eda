"""What a notebook found: its last cell records it, and tests read it from the executed copy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mlplatform.errors import NotebookError

RESULTS_MIME = "application/vnd.mlplatform.results+json"


def record(**results: object) -> None:
    """Show results in the cell's output, as text for people and as JSON for `read_results`.

    Args:
        results: Values by name; each must be expressible as JSON.

    Raises:
        TypeError: A value is not expressible as JSON.
    """
    from IPython.display import display

    text = "\n".join(f"{name}: {json.dumps(value)}" for name, value in results.items())
    display({RESULTS_MIME: results, "text/plain": text}, raw=True)  # type: ignore[no-untyped-call]


def read_results(executed: Path) -> dict[str, Any]:
    """Read what an executed notebook recorded.

    Raises:
        NotebookError: It recorded nothing.
    """
    results: dict[str, Any] = {}
    for cell in json.loads(executed.read_text())["cells"]:
        for output in cell.get("outputs", ()):
            results |= output.get("data", {}).get(RESULTS_MIME, {})
    if not results:
        raise NotebookError(f"{executed.name} recorded no results; end it with a call of mlplatform.results.record")
    return results
