"""The pipeline's steps against real servers, a run with Kubeflow's own local runner, and what a cluster is sent."""

from __future__ import annotations

import json
import logging
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar
from uuid import uuid4

import mlflow
import pandas as pd
import pytest
import yaml
from xgboost import XGBClassifier

from mlplatform import income, objectstore, registry, table, tracking
from mlplatform.errors import (
    CredentialsError,
    DataError,
    MissingObjectError,
    RegistryError,
    ServiceDownError,
    UntrustedModelError,
)
from mlplatform.settings import REQUIRED, Settings
from mlplatform_pipeline import steps
from mlplatform_pipeline.__main__ import main
from mlplatform_pipeline.variables import ADDRESS_VARIABLES, SECRET_VARIABLES

ROOT = Path(__file__).parents[2]
PACKAGES = ROOT / "deploy" / "components" / "pipeline" / "compiled"
MOMENT = pd.Timestamp("2023-09-16", tz="UTC").as_unit("us")


@pytest.fixture(scope="module")
def submit() -> Any:
    """The module that talks to Kubeflow; its packages warn as they are imported."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from mlplatform_pipeline import submit as module
    return module


@pytest.mark.parametrize(
    ("people", "message"),
    [
        (pd.DataFrame({"user_id": [], "event_timestamp": []}), "names nobody"),
        (pd.DataFrame(), "lacks user_id, event_timestamp; it has no columns"),
        (pd.DataFrame({"user": ["a"], "event_timestamp": [MOMENT]}), "lacks user_id; it has user, event_timestamp"),
        (pd.DataFrame({"user_id": [1], "event_timestamp": [MOMENT]}), "not text"),
        (pd.DataFrame({"user_id": ["a"], "event_timestamp": ["today"]}), "no moment with a time zone"),
        (pd.DataFrame({"user_id": ["a", "a"], "event_timestamp": [MOMENT, MOMENT]}), "asks 1 times about somebody"),
    ],
)
def test_a_batch_that_does_not_say_who_and_when_is_refused_in_one_line(people: pd.DataFrame, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        steps.check_people(people, "s3://bucket/people.parquet")
    assert "\n" not in str(caught.value)


def predictions(probability: list[float | None]) -> str:
    users = [f"user-{place}-{uuid4()}" for place in range(len(probability))]
    frame = pd.DataFrame({"user_id": users, "event_timestamp": MOMENT, "probability": probability})
    return objectstore.write_frame(
        frame.astype({"probability": float}), f"s3://mlflow-datasets/test-{uuid4()}/p.parquet"
    )


THRESHOLDS = steps.Thresholds(most_unknown=0.01, lowest_mean=0.15, highest_mean=0.35)


@pytest.mark.parametrize(
    ("users", "unknown", "mean", "said"),
    [
        (100, 0, 0.25, ""),
        (100, 1, 0.25, ""),
        (100, 2, 0.25, "2.00% of 100 people are unknown, and 1.00% may be"),
        (100, 0, 0.50, "the mean probability 0.500 is not in 0.15 to 0.35"),
        (100, 100, float("nan"), "100.00% of 100 people are unknown"),
    ],
)
def test_a_batch_is_stopped_when_it_crosses_a_threshold(users: int, unknown: int, mean: float, said: str) -> None:
    figures = {"users": float(users), "unknown_users": float(unknown), "mean_probability": mean}
    assert steps._crossed(figures, THRESHOLDS).startswith(said) if said else not steps._crossed(figures, THRESHOLDS)


def test_people_who_are_gone_are_named(platform: Settings) -> None:
    with pytest.raises(MissingObjectError, match="people-gone"):
        steps.read_people("s3://mlflow-datasets/people/people-gone.parquet", "champion")


def test_without_a_champion_a_batch_says_who_makes_one(platform: Settings) -> None:
    people = steps.write_people([f"user-{uuid4()}"], MOMENT)
    with pytest.raises(
        RegistryError, match=r"^no alias 'nobody' on 'income-above-50k'; run notebook 04_register_model"
    ):
        steps.read_people(people, "nobody")


def test_a_champion_that_nobody_signed_scores_no_batch(platform: Settings) -> None:
    mlflow.set_experiment(f"test-{uuid4()}")
    frame = income.read_income(ROOT / "data" / "income_data.csv").head(500)
    run = tracking.fit_and_log("unsigned", XGBClassifier(n_estimators=2), tracking.write_datasets(frame, frame, frame))
    client, alias = mlflow.MlflowClient(), f"test-{uuid4()}"
    version = registry.register(run.run_id)
    client.set_registered_model_alias(table.current().model, alias, str(version))
    features = frame.assign(user_id=[str(uuid4()) for _ in range(len(frame))], event_timestamp=MOMENT)
    uri = objectstore.write_frame(features, f"s3://mlflow-datasets/test-{uuid4()}/features.parquet")
    try:
        with pytest.raises(UntrustedModelError, match=f"version {version} is not signed; train it with"):
            steps.score(uri, alias, str(version), 0, 1)
    finally:
        client.delete_model_version(table.current().model, str(version))


def test_parts_that_are_not_everybody_are_refused(platform: Settings) -> None:
    people = steps.write_people([f"user-{uuid4()}" for _ in range(3)], MOMENT)
    some = objectstore.read_frame(people).head(2).assign(probability=0.5)
    part = objectstore.write_frame(some, f"s3://mlflow-datasets/test-{uuid4()}/part.parquet")
    with pytest.raises(DataError, match="2 predictions for 3 people"):
        steps.collect(people, "s3://b/f", "digest", "1", [part])


@pytest.fixture
def local_runner() -> Any:
    """Runs a pipeline of `doubling` on this machine."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import doubling

        from mlplatform_pipeline import local
    return lambda name, *rest, **more: local.run(getattr(doubling, name), *rest, **more)


def test_a_pipeline_runs_where_the_environments_path_has_a_space(
    local_runner: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "a folder" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(python))
    assert local_runner("doubling", {"number": 21}, tmp_path / "root").outputs == {"Output": 42}


def test_steps_that_overlap_leave_print_and_the_log_as_they_were(
    local_runner: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, log = print, logging.getLogger()
    monkeypatch.setattr("builtins.print", before)  # so that no other test suffers where this one fails
    handlers, level, said = log.handlers[:], log.level, []
    local_runner("overlapping", {}, tmp_path / "root", notify=said.append)
    assert print is before
    assert (log.handlers, log.level) == (handlers, level)
    assert said.count("wait: success") == 2


def test_kfp_runs_with_the_versions_of_the_lock_though_its_own_bounds_are_older() -> None:
    locked = (ROOT / "requirements.lock").read_text()
    for package in ("protobuf", "kubernetes", "requests", "urllib3"):
        assert f"\n{package}=={metadata.version(package)} " in f"\n{locked}", package
    code = (
        "import warnings; warnings.simplefilter('ignore')\n"
        "from kfp import compiler, components, dsl, kubernetes\nimport kfp, tempfile, pathlib\n"
        "@dsl.component(base_image='python:3.11')\ndef step(a: int) -> int:\n    return a + 1\n"
        "@dsl.pipeline(name='p')\ndef p(a: int = 1):\n"
        "    task = step(a=a)\n    kubernetes.use_secret_as_env(task, 's', {'K': 'K'})\n"
        "path = pathlib.Path(tempfile.mkdtemp()) / 'p.yaml'\n"
        "compiler.Compiler().compile(p, str(path))\n"
        "print(components.load_component_from_file(str(path)).name)\n"
    )
    path = ROOT / "build" / "kfp_check.py"  # Kubeflow reads the source of a step from its file
    path.parent.mkdir(exist_ok=True)
    path.write_text(code)
    try:
        done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, check=False)
    finally:
        path.unlink()
    assert done.stdout.strip() == "p", done.stderr


def test_the_compiled_pipelines_are_what_the_code_says(submit: Any, tmp_path: Path) -> None:
    for path in submit.compile_all(tmp_path):
        assert (PACKAGES / path.name).read_text() == path.read_text(), "run 'make pipeline-yaml'"


def test_every_step_runs_our_image_with_credentials_from_a_secret_resources_and_retries() -> None:
    for name in ("batch", "retraining"):
        pipeline, platforms = yaml.safe_load_all((PACKAGES / f"{name}.yaml").read_text())
        on_kubernetes = platforms["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
        executors = pipeline["deploymentSpec"]["executors"]
        assert set(executors) == set(on_kubernetes)
        for step, executor in executors.items():
            assert executor["container"]["image"] == "mlplatform:0.1.0"
            assert executor["container"]["resources"]["resourceMemoryLimit"] == "2Gi"
            assert "env" not in executor["container"], step
            secrets = {entry["secretName"] for entry in on_kubernetes[step]["secretAsEnv"] if not entry.get("optional")}
            assert secrets == {"platform-client"}
        dags = [pipeline["root"], *pipeline["components"].values()]
        tasks = [task for part in dags if "dag" in part for task in part["dag"]["tasks"].values()]
        retried = [task for task in tasks if "retryPolicy" in task]
        assert len(retried) == len(executors)
        inputs = set(pipeline["root"]["inputDefinitions"]["parameters"])
        assert not [given for given in inputs if any(word in given for word in ("password", "secret", "token", "key"))]


def test_a_step_is_given_every_setting_that_a_platform_needs_once() -> None:
    assert sorted([*SECRET_VARIABLES, *ADDRESS_VARIABLES]) == sorted(REQUIRED)


def test_every_cached_step_of_the_batch_is_told_a_digest_or_the_models_version() -> None:
    pipeline, _ = yaml.safe_load_all((PACKAGES / "batch.yaml").read_text())
    tasks = pipeline["root"]["dag"]["tasks"]
    assert not tasks["read-people"]["cachingOptions"].get("enableCache")
    assert not tasks["summarise"]["cachingOptions"].get("enableCache")
    needed = {"fetch-features": {"features_digest"}, "collect": {"features_digest", "model_version"}}
    for name, names in needed.items():
        assert names <= set(tasks[name]["inputs"]["parameters"])
    assert {"features_uri", "model_version"} <= set(tasks["score-parts"]["inputs"]["parameters"])


class Kubeflow(BaseHTTPRequestHandler):
    """As much of Kubeflow's API server as the client asks for when it starts a run."""

    sent: ClassVar[list[tuple[str, str, dict[str, Any]]]] = []

    def log_message(self, *_: object) -> None: ...

    def do_GET(self) -> None:
        if self.headers.get("Authorization") == "Bearer wrong":
            self.answer({}, 401)
        elif "/experiments" in self.path:
            self.answer({"experiments": [{"experiment_id": "e1", "display_name": "mlplatform"}]})
        else:
            self.answer({"multi_user": False})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.sent.append(("POST", self.path, body))
        kind = "recurring_run_id" if "recurringruns" in self.path else "run_id"
        self.answer({kind: "r1", "experiment_id": "e1", "display_name": body.get("display_name", "")})

    def answer(self, body: dict[str, Any], status: int = 200) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def kubeflow() -> Iterator[str]:
    Kubeflow.sent.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Kubeflow)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.filterwarnings("ignore")  # the client's own, about what it will drop one day
def test_a_run_is_sent_with_the_compiled_pipeline_and_its_parameters_and_nothing_secret(
    submit: Any, kubeflow: str
) -> None:
    client = submit.connect(kubeflow)
    people = "s3://mlflow-datasets/people/people-0123456789abcdef.parquet"
    assert submit.submit(client, PACKAGES / "batch.yaml", {"people_uri": people}, run_name="batch-1") == "r1"
    ((_, path, body),) = Kubeflow.sent
    assert path == "/apis/v2beta1/runs"
    assert body["display_name"] == "batch-1"
    assert body["runtime_config"]["parameters"] == {"people_uri": people}
    sent = body["pipeline_spec"]
    assert sent["pipeline_spec"]["pipelineInfo"]["name"] == "income-batch"
    assert sent["platform_spec"]["platforms"]["kubernetes"]["deploymentSpec"]["executors"]


@pytest.mark.filterwarnings("ignore")
def test_a_recurring_run_is_sent_with_its_schedule_and_one_at_a_time(submit: Any, kubeflow: str) -> None:
    client = submit.connect(kubeflow)
    submit.schedule(client, PACKAGES / "batch.yaml", {"people_uri": "s3://b/p"}, cron="0 0 3 * * *", job_name="nightly")
    path, body = next((path, body) for _, path, body in Kubeflow.sent if "recurringruns" in path)
    assert path == "/apis/v2beta1/recurringruns"
    assert body["trigger"]["cron_schedule"]["cron"] == "0 0 3 * * *"
    assert str(body["max_concurrency"]) == "1"
    assert body["no_catchup"] is True


@pytest.mark.parametrize(
    ("given", "message"),
    [("people_uri", r"-p 'people_uri' is not NAME=VALUE"), ("x={a", r"-p 'x=\{a': '\{a' is not YAML; a text with")],
)
def test_a_parameter_that_is_none_is_named_before_anything_is_sent(
    given: str, message: str, kubeflow: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", "batch", "-p", given, "--host", kubeflow]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not Kubeflow.sent


def test_kubeflow_that_is_away_or_refuses_is_named_with_what_to_type(submit: Any, kubeflow: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        closed = probe.getsockname()[1]
    with pytest.raises(ServiceDownError, match=f"{closed} does not answer; forward it .*port-forward"):
        submit.connect(f"http://127.0.0.1:{closed}")
    with pytest.raises(CredentialsError, match="set KFP_TOKEN"):
        submit.connect(kubeflow, token="wrong")  # noqa: S106
    with pytest.raises(MissingObjectError, match="mlplatform_pipeline compile"):
        submit.submit(None, PACKAGES / "no-such.yaml", {}, run_name="x")


def command(*arguments: str, block: str = "", **environ: str) -> subprocess.CompletedProcess[str]:
    code = f"import sys; {f'sys.modules[{block!r}] = None; ' if block else ''}"
    code += "from mlplatform_pipeline.__main__ import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *arguments],
        cwd=ROOT,
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )


def test_without_kubeflows_packages_the_message_says_what_adds_them() -> None:
    done = command("batch", block="kfp")
    assert (done.returncode, done.stderr) == (
        1,
        "error: Kubeflow's packages are not installed here; run 'make pipeline', which adds them\n",
    )


def test_without_an_address_of_kubeflow_the_message_names_the_variable() -> None:
    done = command("submit")
    assert done.returncode == 1
    assert done.stderr.startswith("error: KFP_HOST is not set; ")
