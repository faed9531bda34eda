"""Digests come from registries, and from nowhere else."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import yaml

from mlplatform.errors import ClusterError
from mlplatform_ops.cluster.image_digests import kustomization_block, resolve
from mlplatform_ops.ports import free_port

DIGEST = f"sha256:{'ab' * 32}"


class _Registry(BaseHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        if self.headers.get("Authorization") != "Bearer t":
            self.send_response(401)
            realm = f"http://{self.headers['Host']}/token"
            self.send_header(
                "WWW-Authenticate", f'Bearer realm="{realm}",service="s",scope="repository:library/redis:pull"'
            )
        elif self.path == "/v2/library/redis/manifests/8.2.3":
            self.send_response(200)
            self.send_header("Docker-Content-Digest", DIGEST)
        elif self.path.endswith("/nonsense"):
            self.send_response(200)
        else:
            self.send_response(404)
        self.end_headers()

    def do_GET(self) -> None:
        assert "scope=repository%3Alibrary%2Fredis%3Apull" in self.path
        body = json.dumps({"token": "t"}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def registry() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Registry)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_tag_becomes_the_digest_that_its_registry_names(registry: str) -> None:
    image = f"{registry}/library/redis:8.2.3"
    found = resolve([image, "mlplatform:0.1.0"], scheme="http")
    assert found == {image: DIGEST}
    block = yaml.safe_load(kustomization_block(found))
    assert block == {"images": [{"name": f"{registry}/library/redis", "digest": DIGEST}]}


def test_an_unknown_tag_is_named(registry: str) -> None:
    with pytest.raises(ClusterError, match=r"answers 404 for .*redis:9; check its name and tag"):
        resolve([f"{registry}/library/redis:9"], scheme="http")


def test_an_answer_without_a_digest_is_an_error(registry: str) -> None:
    with pytest.raises(ClusterError, match="gives no digest"):
        resolve([f"{registry}/library/redis:nonsense"], scheme="http")


def test_a_registry_out_of_reach_gives_no_digest() -> None:
    with pytest.raises(ClusterError, match="can't be reached, so no digest is known"):
        resolve([f"127.0.0.1:{free_port()}/library/redis:8.2.3"], scheme="http")


def test_an_image_that_is_pinned_already_is_named() -> None:
    with pytest.raises(ClusterError, match=r"example\.com/one@sha256:aa: pinned already; take the block .* out"):
        resolve(["example.com/two:1", "example.com/one@sha256:aa"])
