"""What a step needs on a cluster and not on a laptop: image, credentials, addresses, resources, retries.

Credentials come from a Secret as environment variables. As parameters they would be kept in each run's history.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kfp import dsl, kubernetes

from mlplatform.engines.cluster import VARIABLE
from mlplatform_pipeline.variables import ADDRESS_VARIABLES, SECRET_VARIABLES

IMAGE = "mlplatform:0.1.0"  # built from this repository, see deploy/README.md
CREDENTIALS = "platform-client"
ADDRESSES = "pipeline-addresses"
DASK = "dask-client"  # the scheduler's address, and certificates for it
LABEL = "app.kubernetes.io/component", "pipeline-step"


def step(function: Callable[..., Any]) -> Any:
    """Make a step of a function, which runs in this repository's image."""
    return dsl.component(base_image=IMAGE, install_kfp_package=False)(function)


def on_cluster(task: Any) -> Any:
    """Give a task what it needs on a cluster; a local run leaves all of it aside.

    Args:
        task: What calling a step inside a pipeline returned.
    """
    kubernetes.use_secret_as_env(task, CREDENTIALS, {name: name for name in SECRET_VARIABLES})
    kubernetes.use_config_map_as_env(task, ADDRESSES, {name: name for name in ADDRESS_VARIABLES})
    kubernetes.add_pod_label(task, *LABEL)
    kubernetes.set_image_pull_policy(task, "IfNotPresent")
    task.set_cpu_request("500m").set_memory_request("1Gi").set_memory_limit("2Gi")
    return task.set_retry(num_retries=2, backoff_duration="10s", backoff_factor=2)


def with_dask(task: Any) -> Any:
    """Give a task that takes an engine what it needs to use Dask; where that is not there, it starts without.

    Args:
        task: What `on_cluster` returned.
    """
    kubernetes.use_secret_as_env(task, DASK, {VARIABLE: VARIABLE}, optional=True)
    return kubernetes.use_secret_as_volume(task, DASK, "/etc/dask", optional=True)
