"""The helpers that carry the notebooks.

Importing this package, or any module of it, starts nothing and reads no environment.
"""

from mlplatform import later
from mlplatform.connection import connect

__all__ = ["connect"]

__getattr__ = later.stand_ins(__name__, "features", "lineage", "mlflow_pages", "registry", "tracking")
