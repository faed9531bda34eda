"""What JupyterLab reads as its configuration: `make lab` names this file to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def strip_outputs(model: dict[str, Any], path: str, contents_manager: Any, **_: object) -> None:
    """Save a notebook without what running it left, so that git sees the reader's own changes alone.

    Args:
        model: What is about to be saved; its notebook is changed in place, as Jupyter asks.
        path: Where to, from the root of the contents.
        contents_manager: Knows that root.
    """
    if model["type"] != "notebook":
        return
    notebook = model["content"]
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"] = []
            cell["execution_count"] = None
        for mark in ("execution", "trusted"):
            cell["metadata"].pop(mark, None)
    stored = Path(contents_manager.root_dir, path)
    if stored.exists():
        # JupyterLab writes its kernel's version into these.
        before = json.loads(stored.read_text())["metadata"]
        for name in ("kernelspec", "language_info"):
            if name in before:
                notebook["metadata"][name] = before[name]


if "get_config" in globals():  # only where Jupyter reads this
    c = get_config()  # type: ignore[name-defined]  # noqa: F821
    # By name, since Jupyter reads this file twice and would warn of a second function.
    c.ContentsManager.pre_save_hook = "mlplatform_ops.lab_config.strip_outputs"
    # Nothing is fetched from the internet unasked, and nobody is asked whether it may.
    c.LabApp.app_settings_dir = str(Path(__file__).with_name("lab_settings"))
    c.LabApp.news_url = None
    c.LabApp.check_for_updates_class = "jupyterlab.NeverCheckForUpdate"
    c.LabApp.extension_manager = "readonly"
    # In a container everybody is root; the token guards the server as it does for others.
    c.ServerApp.allow_root = True
    c.KernelManager.transport_encryption = "required"
    c.Application.log_level = "WARN"
    # The latter shows the former's tiles, and does not proxy.
    c.ServerApp.jpserver_extensions = {"jupyter_server_proxy": False, "mlplatform_ops.lab_tiles": True}
