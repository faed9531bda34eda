from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from traitlets.config import PyFileConfigLoader

from mlplatform_ops import lab_config, lab_tiles
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


class Server:
    """Takes what an extension adds to a Jupyter server."""

    def __init__(self) -> None:
        self.web_app = self
        self.settings = {"base_url": "/lab/"}
        self.handlers: dict[str, Any] = {}

    def add_handlers(self, _: str, handlers: list[Any]) -> None:
        self.handlers |= {path: options for path, _, options in handlers}


def test_each_tile_leads_to_a_page_of_this_server_and_nothing_is_proxied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BUCKET_PREFIX", raising=False)
    server = Server()
    lab_tiles._load_jupyter_server_extension(server)
    assert server.handlers.keys() == {
        "/lab/server-proxy/servers-info",
        "/lab/server-proxy/icon/(.*)",
        r"/lab/platform/([\w-]+)",
    }
    entries = [shown.launcher_entry for shown in server.handlers["/lab/server-proxy/servers-info"]["server_processes"]]
    assert [entry.title for entry in entries] == ["MLflow", "Feast UI", "Object store", "Feature server"]
    assert [entry.path_info for entry in entries] == [f"platform/{tile.name}" for tile in lab_tiles.TILES]
    assert all(Path(entry.icon_path).read_text().startswith("<svg ") for entry in entries)


def test_labs_load_the_tiles_and_not_the_proxy() -> None:
    source = Path(lab_config.__file__)
    config = PyFileConfigLoader(source.name, path=str(source.parent)).load_config()
    assert config.ServerApp.jpserver_extensions == {"jupyter_server_proxy": False, "mlplatform_ops.lab_tiles": True}


def test_in_a_workshop_the_tiles_are_what_the_user_can_reach() -> None:
    user = {
        "BUCKET_PREFIX": "user03-",
        "MLFLOW_TRACKING_URI": "http://127.0.0.1:1",
        "FEATURE_SERVER_URL": "http://127.0.0.1:2",
    }
    shown = {tile.name: lab_tiles.address(tile, user) for tile in lab_tiles.tiles(user)}
    assert shown == {"mlflow": "http://127.0.0.1:1", "feature-server": "http://127.0.0.1:2"}
