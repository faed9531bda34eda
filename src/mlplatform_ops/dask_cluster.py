"""A Dask cluster of this machine, for as long as a command runs."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlplatform.engines.cluster import VARIABLE
from mlplatform_ops.embedded.services import make_certificates
from mlplatform_ops.ports import HOST
from mlplatform_ops.runner import require_group

# What a worker does first; Dask takes text with blanks in it for code.
_PRELOAD = """
from mlplatform.clients.hastening import hasten_feast
hasten_feast()
from mlplatform.feast_plugins.distributed import dask_setup
"""


@contextmanager
def dask_cluster(workers: int = 2) -> Iterator[Any]:
    """Start a scheduler and workers, and name them in this process's environment.

    They listen on this machine only and talk to nobody who has no certificate of theirs: whoever reaches a scheduler
    runs code on it. There is no dashboard. Workers inherit the environment, where they find the platform.

    Args:
        workers: How many processes, of one thread each, among which the machine's memory is divided.

    Raises:
        NotebookError: Dask is not installed.
    """
    require_group("scale", what="a Dask cluster")
    import dask
    from distributed import LocalCluster, Security

    with tempfile.TemporaryDirectory(prefix="dask-") as folder:
        make_certificates(Path(folder))
        pair = {"CERT": f"{folder}/weed.crt", "KEY": f"{folder}/weed.key"}
        roles = {f"{role}__{name}": path for role in ("CLIENT", "SCHEDULER", "WORKER") for name, path in pair.items()}
        prefix = "DASK_DISTRIBUTED__COMM__"
        named = {f"{prefix}TLS__{name}": path for name, path in (roles | {"CA_FILE": f"{folder}/ca.crt"}).items()}
        named |= {f"{prefix}REQUIRE_ENCRYPTION": "true"}
        # Dask's web servers can't be left out, so they listen here only and have no page.
        named |= {f"DASK_DISTRIBUTED__{role}__HTTP__ROUTES": "[]" for role in ("SCHEDULER", "WORKER")}
        # A worker that died is started again; on a busy machine that takes longer than the 15 s after which Dask
        # takes it off the list.
        named |= {"DASK_DISTRIBUTED__DEPLOY__LOST_WORKER_TIMEOUT": "600s"}
        # What does not fit into memory goes here; the certificates' folder is nobody else's.
        named |= {"DASK_TEMPORARY_DIRECTORY": folder}
        # DuckDB reads what came over the network through Arrow, which remarks on every buffer that is not aligned.
        named |= {"ACERO_ALIGNMENT_HANDLING": "ignore"}
        before = dict(os.environ)
        os.environ.update(named)
        dask.config.refresh()
        try:
            with LocalCluster(
                n_workers=workers,
                threads_per_worker=1,
                host=HOST,
                protocol="tls://",
                security=Security(require_encryption=True),
                dashboard_address=f"{HOST}:0",
                worker_dashboard_address=f"{HOST}:0",
                preload=[_PRELOAD],
                silence_logs=logging.ERROR,
            ) as cluster:
                os.environ[VARIABLE] = cluster.scheduler_address
                yield cluster
        finally:
            for name in (*named, VARIABLE):
                os.environ.pop(name, None)
                if name in before:
                    os.environ[name] = before[name]
            dask.config.refresh()
