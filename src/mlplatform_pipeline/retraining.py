"""The retraining pipeline: a new window of labelled rows, a model, and the registry's decision.

It uses the code of notebooks 2 and 4. A model that is not better by the registry's rule is registered and not promoted.
"""

from kfp import dsl

from mlplatform_pipeline.cluster import on_cluster, step

NAME = "income-retraining"


@step
def read_window(data_uri: str) -> str:
    """Give the digest of the labelled rows."""
    from mlplatform_pipeline import steps

    steps.ready()
    return steps.data_digest(data_uri)


@step
def train(data_uri: str, data_digest: str, alias: str, seed: int) -> str:
    """Fit the champion's estimator on the window; MLflow's run."""
    from mlplatform_pipeline import steps

    steps.ready()
    return steps.train(data_uri, alias, seed)


@step
def decide(run_id: str) -> str:
    """Register the model; the registry's rule decides whether it becomes the champion."""
    from mlplatform_pipeline import steps

    steps.ready()
    return steps.decide(run_id).reason


@dsl.pipeline(name=NAME, description="Train again on a window of labelled rows, and let the registry decide.")
def retraining(data_uri: str, alias: str = "champion", seed: int = 42) -> str:
    """Train again on a window of labelled rows, and let the registry decide.

    Args:
        data_uri: The eight columns and the target.
        alias: Whose estimator is used.
        seed: Of the split.

    Returns:
        The decision, with its reason.
    """
    window = on_cluster(read_window(data_uri=data_uri))
    window.set_caching_options(False)
    trained = on_cluster(train(data_uri=data_uri, data_digest=window.output, alias=alias, seed=seed))
    decided = on_cluster(decide(run_id=trained.output))
    decided.set_caching_options(False)
    return decided.output
