"""Feast's feature server with every endpoint closed but those that read.

Feast opens its write endpoints (/push, /materialize, ...) to anyone who reaches the port. Closing is done by a list of
what is open, so that an endpoint added by a later release stays shut; reading asks for a token. The server's own
credentials for the stores can only read, too.

The server is ready before there are features: it answers 503 until the first `feast apply` has written a registry.
While it loads them, or can't reach or read the store, it is not ready, so that a rollout waits.
"""

# ruff: noqa: T201 (its output is the container's log)

import hmac
import json
import os
import threading
import time
from pathlib import Path

OPEN = {("GET", "/health"), ("POST", "/get-online-features")}
REFRESH_S = 10
UNAUTHORISED = "a request must carry FEATURE_SERVER_TOKEN as its bearer token"
FOLDER = Path(__file__).parent


class ReadOnly:
    """An ASGI application that passes on what is open and answers for the rest itself."""

    def __init__(self, tokens):
        self.feast = None
        self.ready = False
        self.expected = [f"Bearer {token}".encode() for token in tokens]

    def load(self):
        """Wait for the registry, then keep it fresh, since Feast's own timer starts with a lifespan we don't run."""
        while True:
            try:
                if self.feast is None:
                    store = open_store()
                    from feast.feature_server import get_app

                    store.refresh_registry()
                    self.feast = get_app(store)
                    self.ready = True
                    print("serving", flush=True)
                else:
                    store.refresh_registry()
            except Exception as error:
                self.ready = self.ready or is_missing(error)
                print(f"no registry: {type(error).__name__}: {error}", flush=True)
            time.sleep(REFRESH_S if self.ready else 1)

    async def __call__(self, scope, receive, send):
        """Answer one request."""
        if scope["type"] == "lifespan":
            while True:
                message = await receive()
                await send({"type": message["type"] + ".complete"})
                if message["type"] == "lifespan.shutdown":
                    return
        if scope["type"] != "http" or (scope["method"], scope["path"]) not in OPEN:
            await answer(send, 403, "this feature server only reads: " + ", ".join(path for _, path in sorted(OPEN)))
        elif scope["path"] == "/health":
            detail = "serving" if self.feast else "waiting for a registry; run 'make features PLATFORM=k8s'"
            await answer(send, 200 if self.ready else 503, detail)
        elif not any(hmac.compare_digest(given(scope), expected) for expected in self.expected):
            await answer(send, 401, UNAUTHORISED)
        elif self.feast is None:
            await answer(send, 503, "no features are registered yet; run 'make features PLATFORM=k8s'")
        else:
            await self.feast(scope, receive, send)


def given(scope):
    """Return what a request carries as its authorization."""
    return dict(scope["headers"]).get(b"authorization", b"")


async def answer(send, status, detail):
    """Send a small JSON document."""
    body = json.dumps({"detail": detail}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def open_store():
    """Open the feature store, once its registry exists: Feast would write an empty one."""
    import boto3
    import yaml
    from feast import FeatureStore

    path = yaml.safe_load((FOLDER / "feature_store.yaml").read_text())["registry"]["path"]
    bucket, key = path.removeprefix("s3://").split("/", 1)
    boto3.client("s3").head_object(Bucket=bucket, Key=key)
    return FeatureStore(fs_yaml_file=FOLDER / "feature_store.yaml")


def is_missing(error):
    """Say whether an error is the object store's answer that there is no registry, or no bucket for it, yet."""
    return getattr(error, "response", {}).get("Error", {}).get("Code") in ("404", "NoSuchBucket", "NoSuchKey")


if __name__ == "__main__":
    import uvicorn

    # Two tokens while one is being replaced.
    app = ReadOnly([value for name, value in os.environ.items() if name.startswith("FEATURE_SERVER_TOKEN")])
    threading.Thread(target=app.load, daemon=True).start()
    uvicorn.run(app, host="0.0.0.0", port=int(os.environ.get("PORT", "6566")), access_log=False)  # noqa: S104
