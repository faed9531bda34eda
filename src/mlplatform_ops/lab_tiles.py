"""Tiles in JupyterLab's launcher that open the platform's pages.

jupyter-server-proxy shows the tiles. Each leads to a page of this Jupyter server, which starts what waits to be asked
for and sends the browser on to the service's own address. Nothing is proxied. Below Jupyter's address, a page may do
what its user may, running code included: whoever can write an artifact of MLflow, or listen on a port of this
machine, would be one script away from that. At its own address a service has its own origin and its own password,
MLflow sees the Host header that it expects, and the Feast UI finds its files, which it looks for at `/`.
"""

from __future__ import annotations

import asyncio
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jupyter_server.base.handlers import JupyterHandler
from jupyter_server.utils import url_path_join
from tornado.web import HTTPError, authenticated

from mlplatform.errors import PlatformError
from mlplatform.settings import state_folder

PATH = "platform"


@dataclass(frozen=True)
class Tile:
    """One tile.

    Attributes:
        name: In the page's address, and the name of the icon.
        title: What stands below the icon.
        service: What must run.
        page: What it opens there.
        variable: Where the environment says the service's address; without one, only the platform knows it.
    """

    name: str
    title: str
    service: str
    page: str
    variable: str = ""


TILES = (
    Tile("mlflow", "MLflow", "mlflow", "/#/experiments?workflowType=machine_learning", "MLFLOW_TRACKING_URI"),
    Tile("feast-ui", "Feast UI", "feast-ui", "/"),
    Tile("object-store", "Object store", "feast-ui", "/objects/"),
    Tile("feature-server", "Feature server", "feature-server", "/health", "FEATURE_SERVER_URL"),
)


def tiles(environ: Mapping[str, str]) -> list[Tile]:
    """Give the tiles of a Lab: in a workshop, those of what its user can reach.

    Args:
        environ: The environment of the Lab.
    """
    shared = bool(environ.get("BUCKET_PREFIX"))
    return [tile for tile in TILES if tile.variable or not shared]


def configure(c: Any, environ: Mapping[str, str]) -> None:
    """Tell Jupyter of the tiles.

    Args:
        c: Jupyter's configuration.
        environ: The environment of the Lab.
    """
    icons = Path(__file__).with_name("lab_icons")
    c.ServerApp.jpserver_extensions = {"jupyter_server_proxy": True, "mlplatform_ops.lab_tiles": True}
    c.ServerProxy.servers = {
        tile.name: {
            "launcher_entry": {
                "title": tile.title,
                "icon_path": str(icons / f"{tile.name}.svg"),
                "path_info": f"{PATH}/{tile.name}",
                "category": "Platform",
            },
        }
        for tile in tiles(environ)
    }
    # Closes /proxy/<port>, which would show a page of any port under Jupyter's address.
    c.ServerProxy.host_allowlist = []
    warnings.filterwarnings("ignore", r"\s*Server proxy [\w-]+ does not have a command", UserWarning)


class TilePage(JupyterHandler):
    """Sends somebody who is signed in to Jupyter on to a service, once it answers."""

    @authenticated
    async def get(self, name: str) -> None:
        """Answer one request."""
        tile = next((tile for tile in tiles(os.environ) if tile.name == name), None)
        if tile is None:
            raise HTTPError(404, "there is no such page; choose a tile of the launcher")
        try:
            self.redirect(await asyncio.to_thread(address, tile, os.environ) + tile.page)
        except PlatformError as error:
            raise HTTPError(503, str(error)) from None


def address(tile: Tile, environ: Mapping[str, str]) -> str:
    """Find out where a tile's service listens; start it if it does not run.

    Args:
        tile: The tile.
        environ: The environment of the Lab.

    Raises:
        PlatformError: It does not come up.
    """
    if environ.get("BUCKET_PREFIX"):
        return environ[tile.variable]  # the teacher's platform, which this Lab neither sees nor starts
    from mlplatform_ops.embedded.platform import EmbeddedPlatform

    platform = EmbeddedPlatform(state_folder())
    platform.up(also=[tile.service])
    return platform.url(tile.service)


def _jupyter_server_extension_points() -> list[dict[str, str]]:
    return [{"module": "mlplatform_ops.lab_tiles"}]


def _load_jupyter_server_extension(server: Any) -> None:
    page = url_path_join(server.web_app.settings["base_url"], PATH, r"([\w-]+)")
    server.web_app.add_handlers(".*$", [(page, TilePage)])
