"""The smallest pipeline: one step. Kubeflow reads annotations that are not text, so it has a file of its own."""

from kfp import dsl


@dsl.component(base_image="python", install_kfp_package=False)
def double(number: int) -> int:
    """Give twice a number."""
    return 2 * number


@dsl.pipeline(name="doubling")
def doubling(number: int) -> int:
    """Give twice a number."""
    return double(number=number).output
