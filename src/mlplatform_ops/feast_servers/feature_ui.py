"""Feast's UI, to look at and nothing else.

`feast ui` also offers to create, edit and delete what is registered, and takes pushed values, from anyone who reaches
its port. `python -m mlplatform_ops.feast_servers.feature_ui --port 8889`, in the feature repository, shows
the same pages and refuses whatever is no reading, so that definitions change in `feature_repo` only.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mlplatform.errors import PlatformError
from mlplatform_ops.feast_servers.feature_server import App, Receive, Scope, Send, answer

READS = frozenset({"GET", "HEAD"})
# The button "Refresh": the UI reads the registry again.
REFRESH = ("POST", "/api/v1/registry/refresh")


class LookOnly:
    """Passes on requests that look and refuses the rest, as an ASGI application.

    Args:
        app: The application behind it.
    """

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or pass on the server's start and end."""
        looks = scope["type"] == "http" and (scope["method"] in READS or (scope["method"], scope["path"]) == REFRESH)
        if scope["type"] == "lifespan" or looks:
            await self._app(scope, receive, send)
        else:
            detail = "this UI only shows; change feature_repo/features.py and run 'make features'"
            await answer(scope, send, 403, detail)


def create_app(repo: Path | None = None) -> LookOnly:
    """Make the UI for a feature repository.

    Args:
        repo: The folder of `feature_store.yaml`, by default that of the clone around the working directory.

    Raises:
        RegistryError: There is no registry yet.
        ServiceDownError: The object store does not answer.
    """
    from feast.ui_server import get_app
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from mlplatform.features import open_store

    store = open_store(repo)
    # A page of another site that points its name at this machine must not read along.
    shown = TrustedHostMiddleware(get_app(store, store.project), allowed_hosts=["127.0.0.1", "localhost"])
    return LookOnly(shown)


def main(arguments: list[str] | None = None) -> None:
    """Serve until told to stop."""
    import uvicorn

    parser = argparse.ArgumentParser(description="Show what is registered in the feature store.")
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
