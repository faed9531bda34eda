"""The cluster's API by the official client: find the context, connect, and put its errors into one line."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from mlplatform.errors import ClusterError
from mlplatform_ops.cluster.kubectl import kubectl_path

# Seconds to connect, and seconds for an answer. Without them a network that drops packets blocks a request for a
# quarter of an hour.
REQUEST_TIMEOUT_S = (5, 30)
_PRODUCTION = re.compile(r"(?<![a-z])(prod|prd|production|live)(?![a-z])", re.IGNORECASE)


@dataclass(frozen=True)
class Context:
    """A context of the kubeconfig: its name, its cluster's and its user's names, and the cluster's address."""

    name: str
    cluster: str
    user: str
    server: str


def find_context(name: str | None) -> Context:
    """Find a context of the kubeconfig, as kubectl reads it.

    Args:
        name: Its name; the current one by default.

    Raises:
        ClusterError: There is no kubeconfig, it can't be read, or there is no such context in it.
    """
    command = [kubectl_path(), "config", "view", "--output=json"]
    outcome = subprocess.run(command, capture_output=True, text=True, check=False)
    if outcome.returncode:
        raise ClusterError(f"the kubeconfig can't be read: {' '.join(outcome.stderr.split())}; set KUBECONFIG")
    config = json.loads(outcome.stdout)
    contexts = {entry["name"]: entry["context"] for entry in config.get("contexts") or ()}
    if not contexts:
        raise ClusterError("no kubeconfig to find a cluster in; set KUBECONFIG, or make a cluster: kind create cluster")
    wanted = name or config.get("current-context")
    if wanted not in contexts:
        missing = f"no context {wanted!r} in the kubeconfig" if wanted else "the kubeconfig has no current context"
        raise ClusterError(f"{missing}; name one with CONTEXT=: {', '.join(contexts)}")
    cluster, user = (str(contexts[wanted].get(key, "")) for key in ("cluster", "user"))
    servers = {entry["name"]: entry["cluster"].get("server", "") for entry in config.get("clusters") or ()}
    return Context(str(wanted), cluster, user, str(servers.get(cluster, "")))


def looks_like_production(*names: str) -> bool:
    """Say whether a name of a context, cluster or server looks like production."""
    return any(_PRODUCTION.search(name) for name in names)


@contextmanager
def api_errors(context: str) -> Iterator[None]:
    """Turn errors of the official client into a `ClusterError` with one line."""
    from kubernetes.client.exceptions import ApiException
    from urllib3.exceptions import HTTPError

    try:
        yield
    except ApiException as error:
        said = _message(error)
        if error.status in {401, 403}:
            raise ClusterError(f"the cluster of context {context} refuses: {said}; check the context's user") from error
        kind = AwayError if error.status == 429 or error.status >= 500 else ClusterError
        raise kind(f"the cluster of context {context} answers {error.status}: {said}") from error
    except (HTTPError, OSError) as error:
        raise AwayError(
            f"the cluster of context {context} does not answer; start it, or name another with --context"
        ) from error


class AwayError(ClusterError):
    """The cluster does not answer now, but may in a moment."""


def _message(error: Any) -> str:
    """Find the server's own message, which says what was refused."""
    try:
        return str(json.loads(error.body)["message"])
    except (ValueError, KeyError, TypeError):
        return str(error.reason)


def connect_to(context: Context) -> Any:
    """Connect to a cluster and make sure that it answers."""
    import kubernetes.config

    config: Any = kubernetes.config
    try:
        api = config.new_client_from_config(context=context.name)
    except config.ConfigException as error:
        raise ClusterError(f"the context {context.name!r} can't be used: {error}") from error
    api.configuration.retries = 1
    api.rest_client = type(api.rest_client)(api.configuration)
    request = api.rest_client.request

    def bounded(*arguments: Any, _request_timeout: Any = None, **options: Any) -> Any:
        return request(*arguments, _request_timeout=_request_timeout or REQUEST_TIMEOUT_S, **options)

    api.rest_client.request = bounded
    with api_errors(f"{context.name} ({context.server})"):
        api_of(api, "VersionApi").get_code()
    return api


def api_of(client: Any, kind: str) -> Any:
    """Give one of the client's APIs, such as `CoreV1Api`."""
    # Untyped on purpose: the client declares every field of every answer optional.
    import kubernetes.client

    return getattr(kubernetes.client, kind)(client)
