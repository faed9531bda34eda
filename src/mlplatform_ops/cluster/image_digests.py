"""Ask registries which digests the images' tags stand for, so that an overlay can pin what it was tried with."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from mlplatform.errors import ClusterError

if TYPE_CHECKING:
    import requests

# A multi-platform index first: its digest is good for every kind of node.
_MANIFESTS = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
_HOSTS = {"docker.io": "registry-1.docker.io"}
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


def resolve(images: Iterable[str], *, scheme: str = "https", timeout_s: float = 10.0) -> dict[str, str]:
    """Find the digest of each image's tag.

    Args:
        images: Names with registry and tag, such as `docker.io/library/redis:8.2.7-bookworm`. Names without a
            registry are passed over: they are built here.
        scheme: How registries are asked.
        timeout_s: How long one answer may take, in seconds.

    Returns:
        Digests by image.

    Raises:
        ClusterError: A registry does not answer, does not know an image, or answers nonsense, or an image is named by
            its digest already. No digest is guessed.
    """
    images = list(images)
    if pinned := [image for image in images if "@" in image]:
        raise ClusterError(
            f"{', '.join(pinned)}: pinned already; take the block under images: out of the overlay first"
        )
    return {image: _digest(image, scheme, timeout_s) for image in sorted(images) if "/" in image}


def kustomization_block(digests: Mapping[str, str]) -> str:
    """Write digests as the `images:` block of a kustomization; the tag stays beside each as a remark."""
    lines = ["images:"]
    for image, digest in sorted(digests.items()):
        name, tag = image.rsplit(":", 1)
        lines += [f"  - name: {name}", f"    digest: {digest}  # {tag}"]
    return "\n".join(lines) + "\n"


def _digest(image: str, scheme: str, timeout_s: float) -> str:
    import requests

    registry, _, rest = image.partition("/")
    name, _, tag = rest.rpartition(":")
    url = f"{scheme}://{_HOSTS.get(registry, registry)}/v2/{name}/manifests/{tag}"
    headers = {"Accept": ", ".join(_MANIFESTS)}
    try:
        answer = requests.head(url, headers=headers, timeout=timeout_s)
        if answer.status_code == 401:
            headers["Authorization"] = f"Bearer {_token(answer, timeout_s)}"
            answer = requests.head(url, headers=headers, timeout=timeout_s)
    except requests.RequestException as error:
        raise ClusterError(
            f"the registry {registry} can't be reached, so no digest is known; run this where it can"
        ) from error
    if answer.status_code != 200:
        raise ClusterError(f"the registry {registry} answers {answer.status_code} for {image}; check its name and tag")
    digest = answer.headers.get("Docker-Content-Digest", "")
    if not _DIGEST.fullmatch(digest):
        raise ClusterError(f"the registry {registry} gives no digest for {image}")
    return digest


def _token(answer: requests.Response, timeout_s: float) -> str:
    """Get an anonymous token from where the registry says."""
    import requests

    challenge = dict(re.findall(r'(\w+)="([^"]*)"', answer.headers.get("WWW-Authenticate", "")))
    if "realm" not in challenge:
        raise ClusterError(f"{answer.url} asks for a login that is not understood")
    query = {key: value for key, value in challenge.items() if key in {"service", "scope"}}
    document = requests.get(challenge["realm"], params=query, timeout=timeout_s).json()
    return str(document.get("token") or document["access_token"])
