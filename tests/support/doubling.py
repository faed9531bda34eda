"""The smallest pipelines. Kubeflow reads annotations that are not text, so they have a file of their own."""

from kfp import dsl


@dsl.component(base_image="python", install_kfp_package=False)
def double(number: int) -> int:
    """Give twice a number."""
    return 2 * number


@dsl.pipeline(name="doubling")
def doubling(number: int) -> int:
    """Give twice a number."""
    return double(number=number).output


@dsl.component(base_image="python", install_kfp_package=False)
def wait(seconds: float) -> None:
    """Wait."""
    import time

    time.sleep(seconds)


@dsl.pipeline(name="overlapping")
def overlapping() -> None:
    """Run two steps at once, of which the first one ends first."""
    with dsl.ParallelFor([0.0, 3.0]) as seconds:
        wait(seconds=seconds)
