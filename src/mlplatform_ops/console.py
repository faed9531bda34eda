"""What commands say, ask and print."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

Notify = Callable[[str], None]


def wide_console() -> Console:
    """Make a console that does not wrap URLs, even where the terminal or the log is narrow."""
    from rich.console import Console

    console = Console(soft_wrap=True)
    console.width = max(console.width, 120)
    return console


def say(line: str) -> None:
    """Print a line to standard error, at once; a terminal that was closed shows nothing."""
    with suppress(OSError):
        # In one piece: two notebooks may speak at the same time.
        print(f"{line}\n", end="", file=sys.stderr, flush=True)


def confirm(question: str) -> bool:
    """Ask a yes-or-no question; where nobody can answer, the answer is no."""
    if not sys.stdin.isatty():
        return False
    return input(f"{question} [y/N] ").strip().lower() in {"y", "yes"}
