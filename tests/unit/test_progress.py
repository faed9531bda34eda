"""What `make run` shows while it works: on a real terminal of 60 columns, and where there is none."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from mlplatform_ops.progress import last_seconds, total_seconds

COLUMNS = 60
# Two notebooks side by side, a service that speaks meanwhile, and the end that is asked for.
RUN = """
import sys, time
from pathlib import Path
from mlplatform_ops.console import say
from mlplatform_ops.progress import shown

folder = Path(sys.argv[1])
try:
    with shown(sorted(folder.glob("*.ipynb")), folder / "executed") as progress:
        progress("01_explore_data", 0)
        progress("02_train_models", 0)
        for done in (1, 2, 3):
            progress("02_train_models", done)
            time.sleep(0.3)
            say(f"mlflow answers at http://127.0.0.1:5000/a/path/that/is/wider/than/the/terminal ({done})")
        if sys.argv[2] == "stop":
            raise KeyboardInterrupt
        progress("02_train_models", None)
        say("02_train_models done after 1.2 s")
        progress("01_explore_data", 4)
        progress("01_explore_data", None)
        say("01_explore_data done after 1.2 s")
except KeyboardInterrupt:
    say("stopped")
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two notebooks of four code cells; the first has run before, for 95 seconds."""
    cells = [{"cell_type": kind, "source": "", "metadata": {}} for kind in ["code"] * 4 + ["markdown"]]
    for name in ("01_explore_data", "02_train_models"):
        (tmp_path / f"{name}.ipynb").write_text(json.dumps({"cells": cells, "metadata": {}}))
    (tmp_path / "executed").mkdir()
    (tmp_path / "executed" / "01_explore_data.ipynb").write_text('{"metadata": {"papermill": {"duration": 95.2}}}')
    return tmp_path


def on_a_terminal(folder: Path, end: str = "end", *, hang_up: bool = False, **environ: str) -> str:
    """Run it on a pseudo-terminal, which may be closed at the first bar, and give every byte that it wrote."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
    plain = {name: value for name, value in os.environ.items() if name not in {"NO_COLOR", "COLUMNS", "LINES"}}
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, str(folder), end],
        env={**plain, "TERM": "xterm-256color", **environ},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    written = b""
    while not (hang_up and b"cells" in written):
        try:
            piece = os.read(ours, 65536)
        except OSError:  # Linux's way to say that nobody writes any more
            break
        if not piece:
            break
        written += piece
    os.close(ours)
    assert process.wait() == 0, written.decode()
    return written.decode()


def drawn(written: str) -> list[str]:
    """Give the lines without colours and moves of the cursor."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written).replace("\r", "\n").split("\n")


def test_a_terminal_shows_a_bar_for_each_that_runs_and_one_for_all(folder: Path) -> None:
    written = on_a_terminal(folder)
    lines = drawn(written)
    assert any(re.fullmatch(r"02_train_models +[━╸╺ ]+ 2/4 cells 0:0\d *", line) for line in lines), lines
    assert any(re.fullmatch(r"01_explore_data +[━╸╺ ]+ 0/4 cells 0:0\d of 1:35 *", line) for line in lines), lines
    assert any(re.fullmatch(r"all +[━╸╺ ]+ 3/8 cells 0:0\d *", line) for line in lines), lines
    bars = [line for line in lines if " cells " in line]
    assert max(map(len, bars)) <= COLUMNS
    # What is said stands above the bars, each line once and in one piece: a terminal itself wraps an address well.
    address = "http://127.0.0.1:5000/a/path/that/is/wider/than/the/terminal"
    assert [line.rstrip() for line in lines if line.strip() and " cells " not in line] == [
        *(f"mlflow answers at {address} ({done})" for done in (1, 2, 3)),
        "02_train_models done after 1.2 s",
        "01_explore_data done after 1.2 s",
    ]
    assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l"), "the cursor stays hidden"


def test_a_run_that_is_stopped_gives_the_terminal_back(folder: Path) -> None:
    written = on_a_terminal(folder, "stop")
    assert written.rindex("\x1b[?25h") > written.rindex("\x1b[?25l"), "the cursor stays hidden"
    assert [line for line in drawn(written) if line.strip()][-1] == "stopped"


def test_a_terminal_that_is_closed_ends_nothing(folder: Path) -> None:
    assert "cells" in on_a_terminal(folder, hang_up=True)


def test_no_color_is_kept(folder: Path) -> None:
    colours = re.compile(r"\x1b\[[0-9;]*3[0-9][0-9;]*m")
    assert colours.search(on_a_terminal(folder))
    written = on_a_terminal(folder, NO_COLOR="1")
    assert not colours.search(written)
    assert " 2/4 cells " in written


def test_a_terminal_that_cannot_move_its_cursor_shows_plain_lines(folder: Path) -> None:
    written = on_a_terminal(folder, TERM="dumb")
    assert "\x1b" not in written
    assert "01_explore_data starts (1:35 the last time)" in written


def test_where_there_is_no_terminal_lines_are_plain(folder: Path) -> None:
    command = [sys.executable, "-c", RUN, str(folder), "end"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stderr.splitlines()
    assert lines[:2] == ["01_explore_data starts (1:35 the last time)", "02_train_models starts"]
    assert lines[-1] == "01_explore_data done after 1.2 s"
    assert len(lines) == 7
    assert not any("\x1b" in line for line in lines)


def test_the_expected_total_lets_two_run_at_a_time_each_after_those_that_it_needs() -> None:
    needed = {"a": set[str](), "b": set[str](), "c": {"a"}, "d": {"b", "c"}}
    assert total_seconds(needed, {"a": 10, "b": 40, "c": 20, "d": 5}) == 45
    assert total_seconds(needed, {"a": 10, "b": 5, "c": 20, "d": 5}) == 35
    assert total_seconds({"a": set(), "b": set(), "c": set()}, {"a": 10, "b": 10, "c": 10}) == 20
    assert total_seconds(needed, {"a": 10, "b": 40, "c": 20, "d": 0}) == 0
    assert total_seconds({}, {}) == 0


@pytest.mark.parametrize("text", [None, "", "{}", '{"metadata": {"papermill": {"duration": null}}}', "[1]"])
def test_a_notebook_that_never_ran_to_its_end_has_no_expected_time(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "a.ipynb").write_text(text)
    assert last_seconds(tmp_path / "a.ipynb") == 0
