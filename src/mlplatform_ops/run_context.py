"""Tag each MLflow run with what made it: code, environment, `make run`; MLflow finds this class by its entry point."""

from __future__ import annotations

import os

from mlflow.tracking.context.abstract_context import RunContextProvider

from mlplatform_ops import provenance
from mlplatform_ops.mlflow_rest import RUN_TAG, RUN_VARIABLE


class MakeRunContext(RunContextProvider):
    """Gives the tags by which a run is trained again, and while `make run` executes notebooks, whose run it is."""

    def in_context(self) -> bool:
        """Every run is tagged."""
        return True

    def tags(self) -> dict[str, str]:
        """Give the tags; that of a `make run` is `host/pid/second of start/digits`."""
        mine = {RUN_TAG: os.environ[RUN_VARIABLE]} if os.environ.get(RUN_VARIABLE) else {}
        return {**provenance.tags(), **mine}
