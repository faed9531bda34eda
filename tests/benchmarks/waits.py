"""Time what users wait for beside the tools' own ways: training and logging, objects, start and stop.

`make bench` runs this after the feature store's. Each figure is the median of five runs, the contenders take turns, and
the figures go to `build/benchmarks/waits.json`. Experiments and objects have names of their own and are removed again;
what is started and stopped is a platform in a temporary folder.
"""

from __future__ import annotations

import argparse
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path

import psutil
import requests
from figures import OURS, Figure, keep, take_turns, timed

from mlplatform import connect, objectstore
from mlplatform.connection import s3_client
from mlplatform.settings import STATE_VARIABLE, find_root
from mlplatform_ops.embedded.supervisor import processes_of
from mlplatform_ops.ports import free_port

BUCKET = "mlflow-datasets"
LARGE_BYTES = 2**30
SMALL_BYTES, SMALL_COUNT = 10_000, 1_000
IDLE_S = 30.0
AS_THE_PLATFORM, NO_JOBS = ("--workers", "1"), {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


def main() -> None:
    """Measure, print a Markdown table and keep it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5, help="runs of which the median counts")
    parser.add_argument("--only", choices=("train", "objects", "start"), help="measure this alone")
    parser.add_argument("--train", choices=(OURS, "defaults"), help="train and log four models in this way")
    parser.add_argument("--experiment")
    options = parser.parse_args()
    connect()
    if options.train:
        train(options.train, options.experiment)
        return
    parts = {"objects": measure_objects, "train": measure_training, "start": measure_start}
    chosen = [measure for name, measure in parts.items() if options.only in {None, name}]
    keep("waits", chain.from_iterable(measure(options.repeats) for measure in chosen))


# Objects


def measure_objects(repeats: int) -> Iterator[Figure]:
    """Write and read one large object and many small ones, beside boto3 alone."""
    folder, client = f"benchmark-{secrets.token_hex(4)}", s3_client()
    large, small = secrets.token_bytes(LARGE_BYTES), secrets.token_bytes(SMALL_BYTES)

    def ours(body: bytes, count: int) -> None:
        for number in range(count):
            uri = objectstore.write_bytes(body, f"s3://{BUCKET}/{folder}/ours-{number}")
            assert len(objectstore.read_bytes(uri)) == len(body)

    def bare(body: bytes, count: int) -> None:
        for number in range(count):
            key = f"{folder}/bare-{number}"
            client.put_object(Bucket=BUCKET, Key=key, Body=body)
            assert len(client.get_object(Bucket=BUCKET, Key=key)["Body"].read()) == len(body)

    try:
        for what, body, count in (
            ("1 GiB in and out", large, 1),
            (f"{SMALL_COUNT:,} objects of 10 kB in and out", small, SMALL_COUNT),
        ):
            ways = {
                name: lambda way=way, b=body, n=count: timed(lambda: way(b, n))
                for name, way in ((OURS, ours), ("boto3", bare))
            }
            yield from take_turns(what, ways, repeats)
    finally:
        for uri in objectstore.list_objects(f"s3://{BUCKET}/{folder}")["uri"]:
            bucket, key = objectstore.split_uri(uri)
            client.delete_object(Bucket=bucket, Key=key)


# Training


def measure_training(repeats: int) -> Iterator[Figure]:
    """Train and log four models in a new process each time, so that imports count."""
    import mlflow

    experiment = f"benchmark-{secrets.token_hex(4)}"
    mlflow.create_experiment(experiment)
    command = [sys.executable, "-W", "ignore", __file__, "--experiment", experiment, "--train"]
    ways = {
        name: lambda name=name: timed(lambda: subprocess.run([*command, name], check=True, capture_output=True))
        for name in (OURS, "defaults")
    }
    try:
        yield from take_turns("train and log four models, imports included", ways, repeats)
    finally:
        found = mlflow.get_experiment_by_name(experiment)
        assert found is not None
        mlflow.delete_experiment(found.experiment_id)


def train(way: str, experiment: str) -> None:
    """Fit four models, and log of each the same parameters, metrics, data sets and one model that can be loaded."""
    import mlflow
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.tree import DecisionTreeClassifier
    from xgboost import XGBClassifier

    from mlplatform import income, modeling, tracking

    rows = income.read_income(find_root() / "data" / "income_data.csv")
    train_rows, test_rows = income.split(rows, seed=42)
    mlflow.set_experiment(experiment)
    estimators = {
        "tree": DecisionTreeClassifier(random_state=0),
        "forest": RandomForestClassifier(min_samples_leaf=5, n_jobs=-1, random_state=0),
        "linear": LogisticRegression(max_iter=1_000),
        "xgboost": XGBClassifier(n_estimators=100, max_depth=4, random_state=0),
    }
    if way == OURS:
        datasets = tracking.write_datasets(train_rows, test_rows, rows)
        for name, estimator in estimators.items():
            tracking.fit_and_log(name, estimator, datasets)
        return
    for name, estimator in estimators.items():
        with mlflow.start_run(run_name=name):
            mlflow.log_params(estimator.get_params())
            for context, frame in zip(tracking.CONTEXTS, (train_rows, test_rows, rows), strict=True):
                mlflow.log_input(mlflow.data.from_pandas(frame, name=context), context=context)
            model = modeling.make_pipeline(estimator).fit(modeling.inputs(train_rows), modeling.labels(train_rows))
            mlflow.log_metrics(modeling.scores(model, train_rows, test_rows))
            # As in most tutorials; the default format, skops, refuses trees unless their types are named.
            mlflow.sklearn.log_model(
                model,
                name="model",
                serialization_format="cloudpickle",
                input_example=modeling.inputs(train_rows.head()),
            )


# Start, stop, idle


def measure_start(repeats: int) -> Iterator[Figure]:
    """Start and stop a platform, beside MLflow's own server alone; then leave it idle."""
    with tempfile.TemporaryDirectory() as folder:
        state = Path(folder, "state").resolve()
        environ = {**os.environ, STATE_VARIABLE: str(state)}

        def ours(command: str) -> None:
            subprocess.run(
                [sys.executable, "-m", "mlplatform_ops", command], check=True, capture_output=True, env=environ
            )

        def alone() -> None:
            with mlflow_server(Path(folder)):
                pass

        ours("up")  # makes certificates, databases and buckets
        ours("down")
        ways = {
            "make up": lambda: timed(lambda: ours("up")),
            "make down": lambda: timed(lambda: ours("down")),
            "MLflow's server alone, to its first answer and gone": lambda: timed(alone),
        }
        yield from take_turns("platform up and down", ways, repeats)
        ours("up")
        try:
            time.sleep(10)  # what is left of the start
            before = cpu_seconds(state)
            time.sleep(IDLE_S)
            used = (cpu_seconds(state) - before) / IDLE_S
            memory = sum(process.memory_info().rss for process in processes_of(state))
            yield Figure("idle platform", OURS, memory / 2**30, "GiB", rate=f"{100 * used:.1f} % of one core")
        finally:
            ours("down")


@contextmanager
def mlflow_server(
    folder: Path, options: Sequence[str] = AS_THE_PLATFORM, variables: Mapping[str, str] = NO_JOBS
) -> Iterator[None]:
    """Run MLflow's server until it answers, by default as the platform runs it."""
    port = free_port()
    command = ["-m", "mlflow", "server", "--port", str(port), *options]
    environ = {**os.environ, **variables}
    process = subprocess.Popen(
        [sys.executable, *command, "--backend-store-uri", f"sqlite:///{folder}/alone.db"],
        env=environ,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    family = psutil.Process(process.pid)
    try:
        while not answers(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None, "MLflow's server ended"
            time.sleep(0.05)
        yield
    finally:
        for member in [*family.children(recursive=True), family]:
            member.kill()
        process.wait()


def answers(url: str) -> bool:
    """Say whether a server is there."""
    try:
        return requests.get(url, timeout=5).ok
    except requests.RequestException:
        return False


def cpu_seconds(state: Path) -> float:
    """Add up the CPU time of a platform's processes."""
    times = [process.cpu_times() for process in processes_of(state)]
    return float(sum(entry.user + entry.system for entry in times))


if __name__ == "__main__":
    main()
