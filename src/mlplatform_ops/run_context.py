"""Tag each MLflow run with the `make run` that made it; MLflow finds this class by its entry point."""

from __future__ import annotations

import os

from mlflow.tracking.context.abstract_context import RunContextProvider

from mlplatform_ops.mlflow_rest import RUN_TAG, RUN_VARIABLE


class MakeRunContext(RunContextProvider):
    """Gives the tag while `make run` executes notebooks; outside of it, a run is nobody's but the user's."""

    def in_context(self) -> bool:
        """Say whether this process belongs to a `make run`."""
        return bool(os.environ.get(RUN_VARIABLE))

    def tags(self) -> dict[str, str]:
        """Give the tag: `host/pid/second of start/digits`."""
        return {RUN_TAG: os.environ[RUN_VARIABLE]}
