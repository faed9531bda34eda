from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from traitlets.config import Config

from mlplatform_ops import lab_tiles
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


def test_each_tile_leads_to_a_page_of_this_server_and_nothing_is_proxied() -> None:
    c = Config()
    lab_tiles.configure(c, {})
    entries = {name: server["launcher_entry"] for name, server in c.ServerProxy.servers.items()}
    assert [entry["title"] for entry in entries.values()] == ["MLflow", "Feast UI", "Object store", "Feature server"]
    for name, entry in entries.items():
        assert entry["path_info"] == f"platform/{name}"
        assert Path(entry["icon_path"]).read_text().startswith("<svg ")
        # With a command or a port, jupyter-server-proxy would show the service under Jupyter's address.
        assert c.ServerProxy.servers[name].keys() == {"launcher_entry"}
    assert c.ServerProxy.host_allowlist == []


def test_in_a_workshop_the_tiles_are_what_the_user_can_reach() -> None:
    user = {
        "BUCKET_PREFIX": "user03-",
        "MLFLOW_TRACKING_URI": "http://127.0.0.1:1",
        "FEATURE_SERVER_URL": "http://127.0.0.1:2",
    }
    shown = {tile.name: lab_tiles.address(tile, user) for tile in lab_tiles.tiles(user)}
    assert shown == {"mlflow": "http://127.0.0.1:1", "feature-server": "http://127.0.0.1:2"}
