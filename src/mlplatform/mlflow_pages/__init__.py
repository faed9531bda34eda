"""Where MLflow's own pages are: links that lead straight to what a notebook has made.

Each opens as *Model training*, without the switch at the top left. JupyterLab makes a printed address a link.
"""

from __future__ import annotations

from urllib.parse import quote, urlencode

import mlflow

from mlplatform.errors import RegistryError


def runs_page(experiment: str, *, query: str = "", order_by: str = "", chart: bool = False) -> str:
    """Give the address of an experiment's runs.

    Args:
        experiment: Its name.
        query: What stands in the search bar, such as `metrics.roc_auc_score_test > 0.8`.
        order_by: The metric to sort by, best first; by default the newest run comes first.
        chart: Whether to show charts instead of the table.

    Raises:
        RegistryError: There is no such experiment.
    """
    found = mlflow.get_experiment_by_name(experiment)
    if found is None:
        raise RegistryError(f"no experiment {experiment!r}; run the notebook that makes it, or 'make run'")
    options = {"searchFilter": query} if query else {}
    if order_by:
        options |= {"orderByKey": f"metrics.`{order_by}`", "orderByAsc": "false"}
    if chart:
        options["compareRunsMode"] = "CHART"
    return _page(f"experiments/{found.experiment_id}/runs", options)


def run_page(run_id: str, artifact: str = "") -> str:
    """Give the address of a run.

    Args:
        run_id: MLflow's id of it.
        artifact: A file or folder among its artifacts, which is then shown; by default the overview is.
    """
    experiment_id = mlflow.get_run(run_id).info.experiment_id
    tab = f"/artifacts/{quote(artifact)}" if artifact else ""
    return _page(f"experiments/{experiment_id}/runs/{run_id}{tab}")


def version_page(name: str, version: str | int) -> str:
    """Give the address of a registered model's version."""
    return _page(f"models/{quote(name, safe='')}/versions/{version}")


def _page(path: str, options: dict[str, str] | None = None) -> str:
    query = urlencode({**(options or {}), "workflowType": "machine_learning"}, quote_via=quote)
    return f"{mlflow.get_tracking_uri()}/#/{path}?{query}"
