"""The loop's own endpoint: that it ends with the loop."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
import requests

from mlplatform_ops.loop import loop


def test_a_signal_while_the_endpoint_starts_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start, started = subprocess.Popen, list[subprocess.Popen[bytes]]()

    def sleeping(*_: object, **__: object) -> Any:
        started.append(start(["sleep", "600"]))
        return started[-1]

    def asked(*_: object, **__: object) -> None:
        raise requests.ReadTimeout if answers.pop() else SystemExit(143)

    answers = [False, True]
    monkeypatch.setattr(loop, "find_root", lambda: tmp_path)
    monkeypatch.setattr(loop.subprocess, "Popen", sleeping)
    monkeypatch.setattr(loop.requests, "get", asked)
    with pytest.raises(SystemExit), loop._Endpoint("m", "s3://b/log"):
        pytest.fail("it was never ready")
    assert not answers
    assert started[0].poll() is not None
