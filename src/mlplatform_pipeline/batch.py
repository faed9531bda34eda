"""The batch pipeline: five coarse steps, each a few lines around `steps`.

Kubeflow takes the source of each function and runs it in a container of its own, so that a function imports what it
needs itself. Its cache looks at arguments and not at data: every step but the first is told digests and the model's
version, and the first, which finds these out, is never taken from the cache.
"""

# Kubeflow reads the annotations of these functions; they must be no strings.
from typing import NamedTuple

from kfp import dsl

from mlplatform_pipeline.cluster import on_cluster, step, with_dask
from mlplatform_pipeline.steps import BATCH


@step
def read_people(people_uri: str, alias: str) -> NamedTuple(
    "Batch", [("people", int), ("features_digest", str), ("model_version", str)]
):
    """Check who is to be scored and when; find the model's version and the features' digest."""
    from collections import namedtuple

    from mlplatform_pipeline import steps

    steps.ready()
    found = steps.read_people(people_uri, alias)
    names = ["people", "features_digest", "model_version"]
    return namedtuple("Batch", names)(found.people, found.features_digest, found.model_version)


@step
def fetch_features(people_uri: str, features_digest: str) -> str:
    """Get what Feast knew of each person at their moment."""
    from mlplatform_pipeline import steps

    steps.ready()
    return steps.fetch_features(people_uri)


@step
def score(features_uri: str, alias: str, model_version: str, part: int, parts: list[int], engine: str) -> str:
    """Let the champion score one part."""
    from mlplatform_pipeline import steps

    steps.ready()
    return steps.score(features_uri, alias, model_version, part, len(parts), engine)


@step
def collect(
    people_uri: str, features_uri: str, features_digest: str, model_version: str, scored: list[str]
) -> NamedTuple("Predictions", [("predictions_uri", str), ("lineage_uri", str)]):
    """Join the parts and keep where they come from."""
    from collections import namedtuple

    from mlplatform_pipeline import steps

    steps.ready()
    uri = steps.collect(people_uri, features_uri, features_digest, model_version, scored)
    return namedtuple("Predictions", ["predictions_uri", "lineage_uri"])(uri, steps.lineage_uri(uri))


@step
def summarise(
    predictions_uri: str,
    alias: str,
    most_unknown: float,
    lowest_mean: float,
    highest_mean: float,
    figures: dsl.Output[dsl.Metrics],
) -> str:
    """Record the batch in MLflow; stop if it crosses a threshold."""
    from mlplatform_pipeline import steps

    steps.ready()
    thresholds = steps.Thresholds(most_unknown, lowest_mean, highest_mean)
    run_id, found = steps.summarise(predictions_uri, alias, thresholds)
    for name, value in found.items():
        figures.log_metric(name, value)
    return run_id


# A pipeline of its own: KFP 2.17's local runner gives every input of a loop that comes from another step the loop's
# own number, and inputs of the pipeline around the loop are safe from it.
@dsl.pipeline(name="score-parts")
def score_parts(features_uri: str, alias: str, model_version: str, parts: list[int], engine: str) -> list[str]:
    """Score each part side by side with the others."""
    with dsl.ParallelFor(parts) as part:
        scored = with_dask(
            on_cluster(
                score(
                    features_uri=features_uri,
                    alias=alias,
                    model_version=model_version,
                    part=part,
                    parts=parts,
                    engine=engine,
                )
            )
        )
    return dsl.Collected(scored.output)


@dsl.pipeline(name=BATCH, description="Score people with the champion and the features of their moment.")
def batch(
    people_uri: str,
    alias: str = "champion",
    parts: list[int] = [0, 1],  # noqa: B006 (Kubeflow copies it into the compiled pipeline)
    most_unknown: float = 0.01,
    lowest_mean: float = 0.15,
    highest_mean: float = 0.35,
    engine: str = "local",
) -> str:
    """Score people with the champion and the features of their moment.

    Args:
        people_uri: Who and when: what `steps.write_people` returned.
        alias: Which model.
        parts: The numbers 0, 1, ... of the parts that are scored side by side.
        most_unknown: Share of people without features from which the batch is stopped.
        lowest_mean: Mean probability below which it is stopped.
        highest_mean: Mean probability above which it is stopped.
        engine: Who scores: local is each step itself, dask the cluster that DASK_SCHEDULER_ADDRESS names there.

    Returns:
        MLflow's run of the batch.
    """
    asked = on_cluster(read_people(people_uri=people_uri, alias=alias))
    asked.set_caching_options(False)
    version, digest = asked.outputs["model_version"], asked.outputs["features_digest"]
    fetched = on_cluster(fetch_features(people_uri=people_uri, features_digest=digest))
    scored = score_parts(features_uri=fetched.output, alias=alias, model_version=version, parts=parts, engine=engine)
    collected = on_cluster(
        collect(
            people_uri=people_uri,
            features_uri=fetched.output,
            features_digest=digest,
            model_version=version,
            scored=scored.output,
        )
    )
    summary = on_cluster(
        summarise(
            predictions_uri=collected.outputs["predictions_uri"],
            alias=alias,
            most_unknown=most_unknown,
            lowest_mean=lowest_mean,
            highest_mean=highest_mean,
        )
    )
    summary.set_caching_options(False)
    return summary.outputs["Output"]
