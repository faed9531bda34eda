"""Compile the pipelines to the YAML that a cluster runs, and submit one with the official client."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import kfp
from kfp import compiler

from mlplatform.errors import CredentialsError, MissingObjectError, ServiceDownError
from mlplatform_pipeline.batch import batch
from mlplatform_pipeline.retraining import retraining

PIPELINES = {"batch": batch, "retraining": retraining}
EXPERIMENT = "mlplatform"
TIMEOUT_S = 10


def compile_all(folder: Path) -> list[Path]:
    """Write the YAML of every pipeline.

    Args:
        folder: Where to; `deploy/components/pipeline/compiled` is what the cluster gets.

    Returns:
        The files written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{name}.yaml" for name in PIPELINES]
    for path, pipeline in zip(files, PIPELINES.values(), strict=True):
        compiler.Compiler().compile(pipeline, str(path))
    return files


def connect(host: str, *, namespace: str = "kubeflow", token: str | None = None) -> kfp.Client:
    """Reach Kubeflow's API server.

    Args:
        host: Its address, `http://...`; a forward to the service `ml-pipeline` will do.
        namespace: Where it runs.
        token: For a server that asks for one.

    Raises:
        ServiceDownError: It does not answer.
        CredentialsError: It refuses the token.
    """
    import requests

    # The client itself tries an address that is down for minutes, and then fails with a trace.
    try:
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        answer = requests.get(f"{host}/apis/v2beta1/healthz", timeout=TIMEOUT_S, headers=headers)
    except requests.RequestException as error:
        raise ServiceDownError(
            f"Kubeflow Pipelines at {host} does not answer; forward it "
            "('kubectl port-forward -n kubeflow svc/ml-pipeline 8888') and set KFP_HOST=http://127.0.0.1:8888"
        ) from error
    if answer.status_code in {401, 403}:
        raise CredentialsError(f"Kubeflow Pipelines at {host} refuses the token; set KFP_TOKEN")
    if not answer.ok:
        raise ServiceDownError(f"Kubeflow Pipelines at {host} answers {answer.status_code}; see its log")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return kfp.Client(host=host, namespace=namespace, existing_token=token)


def submit(client: kfp.Client, package: Path, arguments: Mapping[str, Any], *, run_name: str) -> str:
    """Start a compiled pipeline once.

    Args:
        client: What `connect` returned.
        package: The YAML.
        arguments: The pipeline's parameters; no credentials, which would stay in the run's history.
        run_name: What to call the run.

    Returns:
        Kubeflow's id of the run.

    Raises:
        MissingObjectError: There is no such file.
    """
    _present(package)
    made = client.create_run_from_pipeline_package(
        str(package), arguments=dict(arguments), run_name=run_name, experiment_name=EXPERIMENT, enable_caching=True
    )
    return str(made.run_id)


def schedule(client: kfp.Client, package: Path, arguments: Mapping[str, Any], *, cron: str, job_name: str) -> str:
    """Start a compiled pipeline again and again.

    Args:
        client: What `connect` returned.
        package: The YAML.
        arguments: The pipeline's parameters.
        cron: When, in Kubeflow's form with seconds: `0 0 3 * * *` is 3 o'clock every night.
        job_name: What to call it.

    Returns:
        Kubeflow's id of the recurring run.

    Raises:
        MissingObjectError: There is no such file.
    """
    _present(package)
    experiment = client.create_experiment(EXPERIMENT)
    made = client.create_recurring_run(
        experiment_id=experiment.experiment_id,
        job_name=job_name,
        cron_expression=cron,
        max_concurrency=1,
        no_catchup=True,
        params=dict(arguments),
        pipeline_package_path=str(package),
        enable_caching=True,
    )
    return str(made.recurring_run_id)


def _present(package: Path) -> None:
    if not package.is_file():
        raise MissingObjectError(f"{package} is not there; run 'python -m mlplatform_pipeline compile'")
