"""Who computes: this process, or the Dask cluster that DASK_SCHEDULER_ADDRESS names."""

from typing import Literal

EngineName = Literal["local", "dask"]
