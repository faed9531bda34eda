"""Feast's UI, and the object store's pages beside it, to look at and nothing else.

`feast ui` also offers to create, edit and delete what is registered, and takes pushed values, from anyone who reaches
its port. `python -m mlplatform_ops.feast_servers.feature_ui --port 8889`, in the feature repository, shows the same
pages and refuses every request that is not a reading one, so that definitions change in `feature_repo` only.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from starlette.routing import Route
from starlette.types import ASGIApp

from mlplatform.connection import s3_client
from mlplatform.errors import PlatformError
from mlplatform_ops.feast_servers.gate import AllowList
from mlplatform_ops.feast_servers.objects import object_routes

# The button "Refresh" makes the UI read the registry again.
REFRESH = "/api/v1/registry/refresh"
REFUSAL = "this UI only shows; change feature_repo/features.py and run 'make features'"


def create_app(repo: Path | None = None) -> AllowList:
    """Make the UI for a feature repository.

    Args:
        repo: The folder of `feature_store.yaml`, by default that of the clone around the working directory.

    Raises:
        RegistryError: There is no registry yet.
        ServiceDownError: The object store does not answer.
    """
    from feast.ui_server import get_app

    from mlplatform.features import open_store

    store = open_store(repo)
    user, password = (os.environ.get(f"MLFLOW_TRACKING_{name}", "") for name in ("USERNAME", "PASSWORD"))
    return look_only(get_app(store, store.project), object_routes(s3_client, user=user, password=password))


def look_only(app: ASGIApp, objects: Sequence[Route] = ()) -> AllowList:
    """Let requests through to the UI that only look.

    Args:
        app: Feast's application.
        objects: The object store's pages, which ask who somebody is.
    """
    routes = [*objects, Route("/{path:path}", app, methods=["GET"]), Route(REFRESH, app, methods=["POST"])]
    # A page of another site that points its name at this machine must not read along.
    return AllowList(routes, refusal=REFUSAL, hosts=["127.0.0.1", "localhost"])


def main(arguments: list[str] | None = None) -> None:
    """Serve until told to stop."""
    import uvicorn

    parser = argparse.ArgumentParser(description="Show what the feature store registers and the object store holds.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8889, help="port to listen on (default: %(default)s)")
    parser.add_argument("--repo", type=Path, default=Path(), help="the feature repository (default: this folder)")
    options = parser.parse_args(arguments)
    try:
        app = create_app(options.repo)
    except PlatformError as error:
        sys.exit(f"error: {error}")
    uvicorn.run(app, host=options.host, port=options.port, access_log=False, log_level="warning")


if __name__ == "__main__":
    main()
