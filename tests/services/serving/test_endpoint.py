"""The endpoint as a process, on the platform: what it answers, refuses and follows."""

from __future__ import annotations

import http.client
import json
import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import mlflow
import pandas as pd
import pytest
import requests
from people import PERSON
from xgboost import XGBClassifier

from mlplatform import features, history, income, modeling, objectstore, registry, tracking
from mlplatform.connection import s3_client
from mlplatform.errors import CredentialsError, DataError, ServiceDownError
from mlplatform.monitoring import drift_watch
from mlplatform.promotion import alias
from mlplatform.serving import endpoint_log, model_client, predictor, releases
from mlplatform.serving.online_reader import OnlineReader
from mlplatform.settings import Settings
from mlplatform_ops.ports import free_port

ROOT = Path(__file__).parents[3]
TOKEN = "test-token"  # noqa: S105 - of servers that live for one test
BEARER = {"Authorization": f"Bearer {TOKEN}"}


@contextmanager
def endpoint(name: str, *, log: str = "") -> Iterator[str]:
    """Run the endpoint for a registered model on a free port, and give its address once it answers."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "mlplatform_serving", "--port", str(port), "--model", name, "--log", log],
        cwd=ROOT / "feature_repo",
        env={**os.environ, "MODEL_ENDPOINT_TOKEN": TOKEN},
    )
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(1_200):
            assert process.poll() is None, f"the endpoint ended with {process.returncode}"
            with suppress(requests.RequestException):
                requests.get(f"{url}/healthz", timeout=20)
                break
            time.sleep(0.1)
        else:
            pytest.fail("the endpoint does not answer")
        yield url
    finally:
        process.terminate()
        try:
            process.wait(timeout=60)
        finally:
            process.kill()


@pytest.fixture(scope="module")
def name(platform: Settings) -> Iterator[str]:
    """A registered model of these tests' own, with two versions that answer differently; the first is the champion."""
    mlflow.set_experiment(f"test-{uuid4()}")
    frame = income.read_income(ROOT / "data" / "income_data.csv")
    train, test = income.split(frame, seed=42)
    data = tracking.write_datasets(train, test, frame)
    chosen = f"test-{uuid4()}"
    for trees in (20, 40):
        run = tracking.fit_and_log(f"{trees} trees", XGBClassifier(n_estimators=trees, max_depth=4, n_jobs=2), data)
        version = registry.register(run.run_id, name=chosen)
        alias.sign(mlflow.MlflowClient().get_model_version(chosen, str(version)))
    mlflow.MlflowClient().set_registered_model_alias(chosen, "champion", "1")
    yield chosen
    mlflow.MlflowClient().delete_registered_model(chosen)


@pytest.fixture(scope="module")
def store(platform: Settings) -> Any:
    features.build(ROOT / "data" / "income_data.csv", ROOT / "feature_repo", notify=lambda _: None)
    return features.open_store(ROOT / "feature_repo")


@pytest.fixture(scope="module")
def url(name: str, store: Any) -> Iterator[str]:
    with endpoint(name) as address:
        yield address


@pytest.fixture(scope="module")
def environ(url: str) -> dict[str, str]:
    return {"MODEL_ENDPOINT_URL": url, "MODEL_ENDPOINT_TOKEN": TOKEN}


def post(url: str, path: str, body: object, **headers: str) -> requests.Response:
    given = {"Content-Type": "application/json", **BEARER, **headers}
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return requests.post(f"{url}/{path}", data=raw, headers=given, timeout=20)


def figures(url: str) -> dict[str, float]:
    lines = requests.get(f"{url}/metrics", timeout=20).text.splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}


def test_people_are_answered_as_the_pipeline_answers(url: str, environ: dict[str, str], name: str):
    frame = income.read_income(ROOT / "data" / "income_data.csv").head(500)
    answer = model_client.predict(frame, environ=environ)
    expected = modeling.probabilities(registry.load_model(name=name), frame)
    assert answer["score"].tolist() == expected.tolist()
    whole = post(url, "predict", {"people": [PERSON]}).json()
    assert (whole["model"], whole["model_version"], whole["feature_service"]) == (name, 1, "income_v1")


def test_users_are_answered_from_online_features_and_a_stranger_is_null_with_a_reason(
    environ: dict[str, str], name: str, store: Any
):
    users = [history.STEADY_USER, "a-stranger", history.CHANGING_USER]
    answer = model_client.predict_users(users, environ=environ)
    known = features.read_online(store, [users[0], users[2]])
    expected = modeling.probabilities(registry.load_model(name=name), known).tolist()
    assert [answer["score"][0], answer["score"][2]] == expected
    assert answer["score"].isna().tolist() == [False, True, False]
    assert answer["reason"].tolist() == [None, predictor.UNKNOWN_USER, None]
    assert answer["model_version"].tolist() == [1, 1, 1]


def test_the_fast_read_equals_feasts_own_answer_for_every_user(store: Any, platform: Settings):
    reader = OnlineReader(store, "income_v1", platform.redis_url)
    versions = history.build_history(income.read_income(ROOT / "data" / "income_data.csv"))
    users = [*versions["user_id"].drop_duplicates(), "a-stranger"]
    assert len(users) == 28_067
    fast = reader.read(users)
    slow = features.read_online(store, users)
    assert [entry.row is not None for entry in fast] == slow["found"].tolist()
    assert not slow["found"].iloc[-1]
    expected = modeling.inputs(slow.iloc[:-1])
    pd.testing.assert_frame_equal(
        pd.DataFrame([entry.row for entry in fast[:-1]], columns=list(income.COLUMNS)), expected, check_dtype=False
    )
    assert fast[users.index(history.STEADY_USER)].oldest == history.STEADY_TIME.timestamp()


@pytest.mark.parametrize("path", ["predict", "predict_users"])
def test_without_the_token_nothing_is_answered(url: str, path: str):
    for given in ("", "Bearer other", f"Basic {TOKEN}"):
        assert post(url, path, {"people": [PERSON], "users": ["x"]}, Authorization=given).status_code == 401
    with pytest.raises(CredentialsError, match="refuses the token; check MODEL_ENDPOINT_TOKEN"):
        model_client.predict_users(["x"], environ={"MODEL_ENDPOINT_URL": url, "MODEL_ENDPOINT_TOKEN": "other"})


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str, str]]:
        return Path.write_text, (Path("/nowhere/never"), "written by a pickle")


@pytest.mark.parametrize("media", ["application/vnd.bentoml+pickle", "application/octet-stream", "multipart/form-data"])
def test_a_pickle_is_refused_and_never_loaded(url: str, media: str):
    reply = post(url, "predict", pickle.dumps(Evil()), **{"Content-Type": media})
    assert (reply.status_code, reply.json()) == (415, {"detail": "send JSON: -H 'Content-Type: application/json'"})


def test_a_pickle_that_says_it_is_json_is_no_json(url: str):
    assert post(url, "predict", pickle.dumps(Evil())).status_code == 400


def test_a_field_that_is_wrong_is_named(url: str):
    less = {key: value for key, value in PERSON.items() if key != "Sex"}
    for people, where in {
        "missing": [less],
        "a number": [{**PERSON, "Sex": 3}],
        "null": [{**PERSON, "Sex": None}],
        "empty": [{**PERSON, "Sex": ""}],
        "long": [{**PERSON, "Sex": "x" * 101}],
    }.items():
        reply = post(url, "predict", {"people": where})
        assert reply.status_code == 400, people
        assert reply.json()["detail"][0]["loc"] == ["people", 0, "Sex"], people
    extra = post(url, "predict", {"people": [{**PERSON, "Income": "1"}]})
    assert extra.json()["detail"][0]["loc"] == ["people", 0, "Income"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"people": []}',
        b'{"people": {}}',
        b'{"people": ["\\ud800"]}',
        b"\xff",
        b"[" * 5_000,
    ],
    ids=["nothing", "half", "list", "null", "empty", "object", "half a character", "no UTF-8", "deep"],
)
def test_a_body_that_is_no_question_is_the_callers_fault(url: str, body: bytes):
    assert post(url, "predict", body).status_code == 400
    assert post(url, "predict_users", body).status_code == 400


def test_more_rows_or_bytes_than_the_bound_are_refused(url: str):
    assert post(url, "predict_users", {"users": ["x"] * 1_001}).status_code == 400
    assert post(url, "predict_users", {"users": ["x" * 1_000_001]}).status_code == 413
    # Sent in pieces, a body does not say its size.
    pieces = (b"x" * 100_000 for _ in range(11))
    headers = {"Content-Type": "application/json", **BEARER}
    assert requests.post(f"{url}/predict", data=pieces, headers=headers, timeout=20).status_code == 413


def test_a_body_that_says_it_is_too_large_is_not_waited_for(url: str):
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=20)
    connection.putrequest("POST", "/predict")
    for header, value in {"Content-Type": "application/json", "Content-Length": "1000001", **BEARER}.items():
        connection.putheader(header, value)
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()


def test_the_page_that_loads_a_tag_manager_is_not_served(url: str):
    for path in ("", "static_content/index.css", "schema.json", "livez", "predict", "docs.json/../"):
        reply = requests.get(f"{url}/{path}", timeout=20)
        assert reply.status_code == 404, path
        assert "googletagmanager" not in reply.text
    described = requests.get(f"{url}/docs.json", timeout=20).json()
    assert {"/predict", "/predict_users"} <= set(described["paths"])
    assert set(described["components"]["schemas"]["Person"]["properties"]) == set(income.COLUMNS)


def test_what_is_counted_is_what_was_asked(url: str):
    before = figures(url)
    post(url, "predict_users", {"users": [history.STEADY_USER, "a-stranger"]})
    post(url, "predict_users", {"users": 3})
    after = figures(url)
    grown = {key: after[key] - before.get(key, 0) for key in after if after[key] != before.get(key, 0)}
    assert grown['endpoint_requests_total{path="/predict_users",status="200"}'] == 1
    assert grown['endpoint_requests_total{path="/predict_users",status="400"}'] == 1
    assert grown['endpoint_predictions_total{version="1"}'] == 1
    assert grown["endpoint_unknown_users_total"] == 1
    assert grown['endpoint_request_seconds_count{path="/predict_users"}'] == 2
    # The steady user's features are of January 2023: older than the last bound but one.
    assert grown["endpoint_feature_age_seconds_count"] == 1
    assert after["endpoint_model_version"] == 1


def test_a_moved_alias_is_followed_without_a_failed_request(url: str, name: str):
    seen: list[tuple[int, int]] = []
    done = threading.Event()

    def ask() -> None:
        with requests.Session() as session:
            while not done.is_set():
                reply = session.post(f"{url}/predict", json={"people": [PERSON]}, headers=BEARER, timeout=20)
                seen.append((reply.status_code, reply.json().get("model_version", 0)))

    askers = [threading.Thread(target=ask) for _ in range(4)]
    for asker in askers:
        asker.start()
    try:
        for version in (2, 1):
            mlflow.MlflowClient().set_registered_model_alias(name, "champion", str(version))
            deadline = time.monotonic() + 60
            while not seen or seen[-1][1] != version:
                assert time.monotonic() < deadline, f"version {version} never answered"
                time.sleep(0.05)
    finally:
        done.set()
        for asker in askers:
            asker.join()
    assert {status for status, _ in seen} == {200}
    assert {version for _, version in seen} == {1, 2}


def _until(ask: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + 60
    while not ask():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def test_a_release_goes_from_shadow_to_canary_to_all_and_back(
    url: str, name: str, environ: dict[str, str], platform: Settings
):
    frame = income.read_income(ROOT / "data" / "income_data.csv")
    users = history.build_history(frame)["user_id"].drop_duplicates().head(300).tolist()

    def versions() -> list[int]:
        return model_client.predict_users(users, environ=environ)["model_version"].tolist()  # type: ignore[no-any-return]

    alone = model_client.predict_users(users, environ=environ)
    assert set(alone["model_version"]) == {1}
    releases.shadow(2, name=name)

    def mirrored() -> bool:
        pd.testing.assert_frame_equal(model_client.predict_users(users, environ=environ), alone)
        return figures(url)["endpoint_shadow_compared"] >= len(users)

    _until(mirrored, "the challenger was never asked")
    releases.canary(2, 0.1, name=name)
    expected = [2 if releases.in_canary(user, 0.1) else 1 for user in users]
    _until(lambda: versions() == expected, "the canary never answered its share")
    assert 10 < expected.count(2) < 60
    mlflow.MlflowClient().set_registered_model_alias(name, registry.PREVIOUS, "1")
    mlflow.MlflowClient().set_registered_model_alias(name, registry.CHAMPION, "2")
    releases.end(name=name)
    _until(lambda: set(versions()) == {2}, "the promoted version never answered everybody")
    assert releases.roll_back("too slow", name=name) == 1
    _until(lambda: set(versions()) == {1}, "the version before never came back")
    assert releases.read(name=name) == releases.Release(1)
    events = registry.decisions(name=name)["event"].tolist()
    assert events[0] == "answers in the shadow of the champion"
    assert "rolled back from version 2: too slow" in events


def test_an_endpoint_that_is_ready_says_its_version_before_anybody_asks(name: str):
    with endpoint(name) as fresh:
        environ = {"MODEL_ENDPOINT_URL": fresh, "MODEL_ENDPOINT_TOKEN": TOKEN}
        _until(lambda: model_client.readiness(environ) == "ready", "the endpoint was never ready")
        assert figures(fresh)["endpoint_model_version"] == releases.read(name=name).champion


def test_what_was_asked_is_in_the_object_store_without_the_users(name: str, store: Any, platform: Settings):
    asked = f"Occupation-{uuid4()}"
    log = f"s3://mlflow-datasets/test-{uuid4()}"
    with endpoint(name, log=log) as url:
        environ = {"MODEL_ENDPOINT_URL": url, "MODEL_ENDPOINT_TOKEN": TOKEN}
        answer = model_client.predict(pd.DataFrame([{**PERSON, "Occupation": asked}]), environ=environ)
        model_client.predict_users([history.STEADY_USER], environ=environ)
    # It writes what is left when it is stopped.
    seen = drift_watch.read_endpoint_log(log)
    assert tuple(seen.columns) == endpoint_log.logged()
    (row,) = seen[seen["Occupation"] == asked].to_dict("records")
    assert (row["score"], row["model_version"], row["Sex"]) == (answer["score"][0], 1, "Male")
    assert not seen.isin([history.STEADY_USER]).any(axis=None)


def test_without_a_champion_it_is_alive_not_ready_and_says_why(platform: Settings):
    with endpoint("nobody-registered-this") as url:
        assert requests.get(f"{url}/healthz", timeout=20).status_code == 200
        assert requests.get(f"{url}/readyz", timeout=20).status_code == 503
        assert figures(url)["endpoint_model_version"] == 0
        environ = {"MODEL_ENDPOINT_URL": url, "MODEL_ENDPOINT_TOKEN": TOKEN}
        assert model_client.readiness(environ).startswith("no alias 'champion' on 'nobody-registered-this'; run ")
        with pytest.raises(ServiceDownError, match=r"503 .*no alias 'champion' on .*run 'make run'"):
            model_client.predict_users(["x"], environ=environ)


def test_an_alias_moved_to_an_unsigned_version_is_not_followed_and_the_old_one_goes_on(url: str, name: str):
    data = tracking.write_datasets(*(income.read_income(ROOT / "data" / "income_data.csv").head(500) for _ in range(3)))
    mlflow.set_experiment(f"test-{uuid4()}")
    run = tracking.fit_and_log("unsigned", XGBClassifier(n_estimators=2, max_depth=1, n_jobs=1), data)
    version = registry.register(run.run_id, name=name)
    champion = releases.read(name=name).champion
    client = mlflow.MlflowClient()
    client.set_registered_model_alias(name, "champion", str(version))
    try:
        with endpoint(name) as fresh:
            environ = {"MODEL_ENDPOINT_URL": fresh, "MODEL_ENDPOINT_TOKEN": TOKEN}
            _until(lambda: "is not signed" in model_client.readiness(environ), "nobody said why there is no model")
            assert post(fresh, "predict", {"people": [PERSON]}).status_code == 503
        # The one that runs has had the time to look many times.
        assert post(url, "predict", {"people": [PERSON]}).json()["model_version"] == champion
    finally:
        client.set_registered_model_alias(name, "champion", str(champion))
        client.delete_model_version(name, str(version))


def test_a_version_whose_reference_is_gone_is_not_answered_with_and_the_address_is_named(name: str):
    version = mlflow.MlflowClient().get_model_version(name, "1")
    uri, rows = drift_watch.read_context(version, "reference")
    bucket, key = objectstore.split_uri(uri)
    s3_client().delete_object(Bucket=bucket, Key=key)
    try:
        with endpoint(name) as fresh:
            environ = {"MODEL_ENDPOINT_URL": fresh, "MODEL_ENDPOINT_TOKEN": TOKEN}
            _until(lambda: f"{uri} is not there; run " in model_client.readiness(environ), "nobody said what is gone")
            assert post(fresh, "predict", {"people": [PERSON]}).status_code == 503
    finally:
        assert objectstore.write_frame(rows, f"s3://{bucket}/income/reference.parquet") == uri


def test_an_endpoint_that_is_down_or_unnamed_is_named_with_what_to_run():
    for environ in ({"MODEL_ENDPOINT_URL": "http://127.0.0.1:9"}, {}):
        with pytest.raises(ServiceDownError, match="run 'make serve-model'"):
            model_client.predict_users(["x"], environ=environ)


def test_a_wrong_value_is_an_error_of_the_data(environ: dict[str, str]):
    with pytest.raises(DataError, match="400"):
        model_client.predict_users([], environ=environ)
    with pytest.raises(DataError, match="the rows lack Sex"):
        model_client.predict(pd.DataFrame([PERSON]).drop(columns="Sex"), environ=environ)
