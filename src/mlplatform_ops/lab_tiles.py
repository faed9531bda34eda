"""Tiles in JupyterLab's launcher that open the platform's pages.

jupyter-server-proxy shows the tiles. Each leads to a page of this Jupyter server, which starts what waits to be asked
for and sends the browser on to the service's own address. Nothing is proxied. Below Jupyter's address, a page may do
what its user may, running code included: whoever can write an artifact of MLflow, or listen on a port of this
machine, would be one script away from that. At its own address a service has its own origin and its own password,
MLflow sees the Host header that it expects, and the Feast UI finds its files, which it looks for at `/`.

So this is loaded in place of jupyter-server-proxy's own server extension. Its list of allowed hosts does not cover
`/proxy/<port>`, which would show a page of any port.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests
from jupyter_server.base.handlers import JupyterHandler
from jupyter_server.utils import url_path_join
from jupyter_server_proxy.api import IconHandler, ServersInfoHandler
from jupyter_server_proxy.config import ServerProcess
from tornado.web import HTTPError, authenticated

from mlplatform import table
from mlplatform.errors import PlatformError, service_down
from mlplatform.settings import ANSWER_TIMEOUT_S, state_folder

PATH = "platform"
_ICONS = Path(__file__).with_name("lab_icons")


@dataclass(frozen=True)
class Tile:
    """One tile.

    Attributes:
        name: In the page's address, and the name of the icon.
        title: What stands below the icon.
        service: What must run.
        page: What it opens there; without one, this server says what the service says of itself.
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
    # Browsers refuse Feast's usual port, 6566, which they keep for scanners.
    Tile("feature-server", "Feature server", "feature-server", "", "FEATURE_SERVER_URL"),
)
ASKED = """
It answers programs that send its token. Notebook 6 shows how; in a terminal of this Lab:

curl -s -X POST "$FEATURE_SERVER_URL/get-online-features" \\
  -H "Content-Type: application/json" -H "Authorization: Bearer $FEATURE_SERVER_TOKEN" \\
  -d '{"feature_service": "%s", "entities": {"%s": ["an id"]}}'
"""


def tiles(environ: Mapping[str, str]) -> list[Tile]:
    """Give the tiles of a Lab: in a workshop, those of what its user can reach.

    Args:
        environ: The environment of the Lab.
    """
    shared = bool(environ.get("BUCKET_PREFIX"))
    return [tile for tile in TILES if tile.variable or not shared]


class TilePage(JupyterHandler):
    """Sends somebody who is signed in to Jupyter on to a service, once it answers."""

    @authenticated
    async def get(self, name: str) -> None:
        """Answer one request."""
        tile = next((tile for tile in tiles(os.environ) if tile.name == name), None)
        if tile is None:
            raise HTTPError(404, "there is no such page; choose a tile of the launcher")
        try:
            url = await asyncio.to_thread(address, tile, os.environ)
            if tile.page:
                self.redirect(url + tile.page)
                return
            self.set_header("Content-Type", "text/plain; charset=utf-8")
            described = table.current()
            self.write(await asyncio.to_thread(health, tile, url) + ASKED % (described.service, described.entity.key))
        except PlatformError as error:
            raise HTTPError(503, str(error)) from None


def health(tile: Tile, url: str) -> str:
    """Ask a service how it is.

    Raises:
        ServiceDownError: It does not answer.
    """
    try:
        said = requests.get(f"{url}/health", timeout=ANSWER_TIMEOUT_S)
    except requests.RequestException as error:
        raise service_down(tile.title.lower(), url) from error
    return f"The {tile.title.lower()} at {url} says: {said.text}\n"


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
    icons = {tile.name: str(_ICONS / f"{tile.name}.svg") for tile in tiles(os.environ)}
    # In the launcher's first row: of a category of its own, JupyterLab 4.6 would show no icons.
    shown = [
        ServerProcess(
            name=tile.name,
            launcher_entry={"title": tile.title, "icon_path": icons[tile.name], "path_info": f"{PATH}/{tile.name}"},
        )
        for tile in tiles(os.environ)
    ]
    handlers: list[tuple[str, type[JupyterHandler], dict[str, Any]]] = [
        ("server-proxy/servers-info", ServersInfoHandler, {"server_processes": shown}),
        ("server-proxy/icon/(.*)", IconHandler, {"icons": icons}),
        (rf"{PATH}/([\w-]+)", TilePage, {}),
    ]
    base = server.web_app.settings["base_url"]
    server.web_app.add_handlers(".*$", [(url_path_join(base, path), *rest) for path, *rest in handlers])
