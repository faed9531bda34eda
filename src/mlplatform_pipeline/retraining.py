"""The retraining pipeline: a new window of labelled rows, a model, and the gate's decision.

It uses the code of notebooks 2 to 4. It moves no alias: a version that passes the gate is released by commands, first
in the shadow.
"""

from collections import namedtuple
from typing import NamedTuple

from kfp import dsl

from mlplatform_pipeline.cluster import on_cluster, step, with_dask

NAME = "income-retraining"


@step
def read_window(data_uri: str, alias: str, model: str) -> NamedTuple(
    "Window", [("data_digest", str), ("model_version", str)]
):
    """Find the digest of the labelled rows and the version that serves."""
    from collections import namedtuple

    from mlplatform_pipeline import steps

    steps.ready()
    found = steps.data_digest(data_uri), steps.serving_version(alias, model)
    return namedtuple("Window", ["data_digest", "model_version"])(*found)


@step
def train(data_uri: str, data_digest: str, alias: str, model_version: str, seed: int, model: str, engine: str) -> str:
    """Fit the champion's estimator on the window; MLflow's run."""
    from mlplatform_pipeline import steps

    steps.ready()
    return steps.train(data_uri, alias, seed, model, engine)


@step
def decide(run_id: str, model: str) -> str:
    """Register the model and ask the gate."""
    from mlplatform_pipeline import steps

    steps.ready()
    return steps.decide(run_id, model)


@dsl.pipeline(name=NAME, description="Train again on a window of labelled rows, and ask the gate.")
def retraining(
    data_uri: str, alias: str = "champion", seed: int = 42, model: str = "income-above-50k", engine: str = "local"
) -> NamedTuple("Retrained", [("run_id", str), ("decision", str)]):
    """Train again on a window of labelled rows, and ask the gate.

    Args:
        data_uri: The eight columns and the target.
        alias: Whose estimator is used.
        seed: Of the split.
        model: The registered model.
        engine: Who fits: local is the step itself, dask the cluster that DASK_SCHEDULER_ADDRESS names there.

    Returns:
        MLflow's run, and the decision with its reason.
    """
    window = on_cluster(read_window(data_uri=data_uri, alias=alias, model=model))
    window.set_caching_options(False)
    trained = with_dask(
        on_cluster(
            train(
                data_uri=data_uri,
                data_digest=window.outputs["data_digest"],
                alias=alias,
                model_version=window.outputs["model_version"],
                seed=seed,
                model=model,
                engine=engine,
            )
        )
    )
    decided = on_cluster(decide(run_id=trained.output, model=model))
    decided.set_caching_options(False)
    return namedtuple("Retrained", ["run_id", "decision"])(trained.output, decided.output)
