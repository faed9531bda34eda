from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mlplatform_ops.lab_config import strip_outputs


def test_a_notebook_is_saved_without_what_running_it_left(tmp_path: Path) -> None:
    stored: dict[str, Any] = {
        "cells": [{"cell_type": "code", "source": "1", "outputs": [], "execution_count": None, "metadata": {}}],
        "metadata": {"kernelspec": {"name": "python3"}, "language_info": {"name": "python"}},
    }
    (tmp_path / "a.ipynb").write_text(json.dumps(stored))
    ran = json.loads(json.dumps(stored))
    ran["cells"][0] |= {"outputs": [{"output_type": "stream"}], "execution_count": 3, "metadata": {"trusted": True}}
    ran["metadata"]["language_info"] = {"name": "python", "version": "3.11.7"}
    strip_outputs({"type": "notebook", "content": ran}, "/a.ipynb"[1:], SimpleNamespace(root_dir=str(tmp_path)))
    assert ran == stored


def test_other_files_are_saved_as_they_are() -> None:
    model = {"type": "file", "content": "text"}
    strip_outputs(model, "a.txt", SimpleNamespace(root_dir="/"))
    assert model == {"type": "file", "content": "text"}
