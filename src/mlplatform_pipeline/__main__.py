"""The commands behind `make pipeline` and `make k8s-pipeline`: `python -m mlplatform_pipeline COMMAND`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from cyclopts import App, CycloptsError, Parameter

from mlplatform.engines import EngineName
from mlplatform.engines.cluster import scheduler_of
from mlplatform.errors import PlatformError, SettingsError
from mlplatform.settings import find_root

PACKAGES = Path("deploy") / "components" / "pipeline" / "compiled"

app = App(
    name="mlplatform_pipeline",
    help=(__doc__ or "").splitlines()[0],
    help_format="plaintext",
    version_flags=(),
    result_action="return_value",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0, 1 after an error, 2 for a command line that can't be understood."""
    try:
        return int(app(sys.argv[1:] if arguments is None else arguments, exit_on_error=False, print_error=False) or 0)
    except CycloptsError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except PlatformError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


@app.command
def batch(
    *,
    people: str | None = None,
    scored_at: str = "2023-09-16",
    alias: str = "champion",
    engine: EngineName = "local",
) -> None:
    """Score people here, with Kubeflow's local runner.

    Args:
        people: S3 address of user_id and event_timestamp; by default every user of the history, at scored_at.
        scored_at: The moment, UTC.
        alias: Which version of the model.
        engine: Who scores; dask is the cluster that DASK_SCHEDULER_ADDRESS names.
    """
    _installed()
    scheduler_of(engine)
    import pandas as pd

    from mlplatform import connect, history, income
    from mlplatform_pipeline import batch as pipeline
    from mlplatform_pipeline import local, steps

    connect()
    steps.ready()
    if people is None:
        frame = income.read_income()
        users = history.build_history(frame)[history.USER_ID].drop_duplicates()
        people = steps.write_people(users.tolist(), pd.Timestamp(scored_at, tz="UTC"))
    root = find_root() / "build" / "pipeline"
    done = local.run(pipeline.batch, {"people_uri": people, "alias": alias, "engine": engine}, root, notify=_say)
    _say(f"MLflow's run {done.outputs['Output']} of experiment {steps.EXPERIMENT} names inputs and outputs")


@app.command
def retrain(
    data: str,
    /,
    *,
    alias: str = "champion",
    seed: int = 42,
    model: str | None = None,
    engine: EngineName = "local",
) -> None:
    """Train again here on a window of labelled rows, and ask the gate; prints MLflow's run.

    Args:
        data: S3 address of the eight columns and the target.
        alias: Whose estimator is used.
        seed: Of the split.
        model: The registered model, by default the table's.
        engine: Who fits; dask is the cluster that DASK_SCHEDULER_ADDRESS names.
    """
    _installed()
    scheduler_of(engine)
    from mlplatform import connect, table
    from mlplatform_pipeline import local, retraining, steps

    connect()
    steps.ready()
    arguments = {"data_uri": data, "alias": alias, "seed": seed, "engine": engine}
    arguments["model"] = model or table.current().model
    done = local.run(retraining.retraining, arguments, find_root() / "build" / "pipeline", notify=_say)
    _say(str(done.outputs["decision"]))
    print(done.outputs["run_id"])


@app.command(name="compile")
def compile_() -> None:
    """Write the YAML that a cluster runs."""
    _installed()
    from mlplatform_pipeline.submit import compile_all

    for path in compile_all(find_root() / PACKAGES):
        _say(f"wrote {path.relative_to(find_root())}")


@app.command
def submit(
    name: str = "batch",
    /,
    *,
    arguments: Annotated[Sequence[str], Parameter(name="-p", negative=())] = (),
    cron: str | None = None,
    host: Annotated[str | None, Parameter(env_var="KFP_HOST")] = None,
) -> None:
    """Submit a compiled pipeline to Kubeflow, once or on a schedule.

    Args:
        name: batch or retraining.
        arguments: NAME=VALUE of a parameter; may be repeated.
        cron: When again and again, with seconds: "0 0 3 * * *".
        host: Address of Kubeflow's API server.
    """
    _installed()
    from mlplatform_pipeline import submit as client

    if not host:
        raise SettingsError("KFP_HOST is not set; set it to the address of Kubeflow's API server, http://host:port")
    values = dict(map(_argument, arguments))
    package = find_root() / PACKAGES / f"{name}.yaml"
    connected = client.connect(host.rstrip("/"), token=os.environ.get("KFP_TOKEN"))
    if cron:
        _say(f"recurring run {client.schedule(connected, package, values, cron=cron, job_name=f'income-{name}')}")
    else:
        run_name = f"income-{name}-{datetime.now(UTC):%Y-%m-%dT%H-%M-%SZ}"
        _say(f"run {client.submit(connected, package, values, run_name=run_name)}")


def _argument(given: str) -> tuple[str, object]:
    """Read NAME=VALUE, whose value is YAML."""
    import yaml

    name, equals, value = given.partition("=")
    if not equals:
        raise SettingsError(f"-p {given!r} is not NAME=VALUE")
    try:
        return name, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise SettingsError(
            f"-p {given!r}: {value!r} is not YAML; a text with such signs stands in quotes, as {name}='\"...\"'"
        ) from error


def _installed() -> None:
    try:
        import kfp.kubernetes  # noqa: F401
    except ImportError as error:
        raise PlatformError(
            "Kubeflow's packages are not installed here; run 'make pipeline', which adds them"
        ) from error


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
