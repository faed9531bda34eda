"""The compiled champion and the watch on its alias: no server needed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from mlflow.exceptions import MlflowException
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline
from xgboost import XGBClassifier

# The modules themselves, since names of them are replaced below.
import mlplatform.serving.predictor as predictor_module
import mlplatform.serving.releases as releases
import mlplatform.serving.served_model as served_model
from mlplatform import income, modeling, objectstore
from mlplatform.errors import ServiceDownError
from mlplatform.serving import endpoint_log, online_reader
from mlplatform.serving.endpoint_log import EndpointLog
from mlplatform_serving import metrics

CSV = Path(__file__).parents[2] / "data" / "income_data.csv"


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    return income.read_income(CSV)


@pytest.fixture(scope="module")
def boosted(frame: pd.DataFrame) -> Pipeline:
    train, _ = income.split(frame, seed=42)
    model = modeling.make_pipeline(XGBClassifier(n_estimators=20, max_depth=4, n_jobs=2))
    return model.fit(modeling.inputs(train), modeling.labels(train))


def test_the_compiled_form_equals_the_pipeline_on_every_row_to_the_last_bit(boosted: Pipeline, frame: pd.DataFrame):
    score, compiled, remark = served_model.compile_model(boosted, frame)
    assert (compiled, remark) == (True, "the compiled form equals the pipeline on 30162 reference rows")
    assert score(modeling.inputs(frame).to_numpy().tolist()) == modeling.probabilities(boosted, frame).tolist()


def test_one_row_is_answered_like_the_same_row_in_a_batch(boosted: Pipeline, frame: pd.DataFrame):
    score = served_model.CompiledModel(boosted)
    rows = modeling.inputs(frame.head(50)).to_numpy().tolist()
    assert [score([row])[0] for row in rows] == score(rows)


def test_a_compiled_form_that_differs_in_one_row_is_not_used(
    boosted: Pipeline, frame: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
):
    true = served_model.CompiledModel.__call__

    def wrong(self: served_model.CompiledModel, rows: list[list[str]]) -> list[float]:
        answers = true(self, rows)
        return [0.5, *answers[1:]]

    monkeypatch.setattr(served_model.CompiledModel, "__call__", wrong)
    score, compiled, remark = served_model.compile_model(boosted, frame)
    assert (compiled, remark[:36]) == (False, "the compiled form differs in 1 of 77")
    assert (
        score(modeling.inputs(frame.head(3)).to_numpy().tolist())
        == modeling.probabilities(boosted, frame.head(3)).tolist()
    )


def test_a_category_that_only_unseen_rows_have_is_compared_too(boosted: Pipeline, frame: pd.DataFrame):
    rows = served_model._probe_rows(frame)
    strange = [row for row in rows if served_model._NEVER_SEEN in row]
    assert [row.index(served_model._NEVER_SEEN) for row in strange] == list(range(8))


def test_an_estimator_of_scikit_learn_answers_by_its_pipeline(frame: pd.DataFrame):
    model = modeling.make_pipeline(LogisticRegression(max_iter=50, tol=0.1))
    model.fit(modeling.inputs(frame.head(2_000)), modeling.labels(frame.head(2_000)))
    score, compiled, remark = served_model.compile_model(model, frame)
    assert (compiled, remark) == (False, "LogisticRegression is not compiled: the pipeline answers")
    assert (
        score(modeling.inputs(frame.head(3)).to_numpy().tolist())
        == modeling.probabilities(model, frame.head(3)).tolist()
    )


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let the registry hold a version, without a registry."""

    def hold(version: int) -> None:
        monkeypatch.setattr(releases, "read", lambda **_: releases.Release(version))
        model = served_model.ServedModel("m", version, "s", lambda rows: [version / 10] * len(rows), True, "made up")
        monkeypatch.setattr(predictor_module, "load", lambda *_, **__: model)

    return hold


def test_a_moved_alias_is_followed_and_a_known_version_is_not_loaded_again(
    served: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
):
    follower = predictor_module.Follower()
    for version in (1, 2):
        served(version)
        follower.look()
        assert follower.current is not None
        assert follower.current.version == version
    served(1)
    monkeypatch.delattr(predictor_module, "load")
    follower.look()
    assert follower.current.version == 1


def test_while_the_registry_is_away_or_a_version_is_broken_the_old_one_answers(
    served: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
):
    said: list[str] = []
    follower = predictor_module.Follower(notify=said.append)
    served(1)
    follower.look()

    def away(*_: object, **__: object) -> None:
        raise ServiceDownError("the MLflow server does not answer")

    served(2)
    for broken in ((predictor_module, "load"), (releases, "read")):
        monkeypatch.setattr(*broken, away)
        follower.look()
        assert follower.current is not None
        assert follower.current.version == 1
    assert said[1:] == ["waiting: the MLflow server does not answer"]


def test_whatever_a_look_at_the_registry_raises_the_watch_goes_on(
    served: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
):
    def damaged(**_: object) -> None:
        raise MlflowException('relation "model_version_tags" does not exist\n[SQL: SELECT ...]')

    looked = threading.Event()
    follower = predictor_module.Follower(every_s=0.01, notify=lambda line: looked.set() if "SQL" in line else None)
    served(1)
    follower.look()
    monkeypatch.setattr(releases, "read", damaged)
    follower.start()
    try:
        assert looked.wait(timeout=60)
        assert follower.problem == 'MlflowException: relation "model_version_tags" does not exist [SQL: SELECT ...]'
        served(2)
        for _ in range(6_000):
            if follower.current is not None and follower.current.version == 2:
                break
            time.sleep(0.01)
        assert (follower.current and follower.current.version, follower.problem) == (2, "")
    finally:
        follower.stop()


def test_before_there_is_a_champion_the_answer_says_what_to_run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(releases, "read", lambda **_: releases.Release(None))
    follower = predictor_module.Follower()
    predictor = predictor_module.Predictor(follower, lambda: pytest.fail("nothing is read without a model"))
    follower.look()
    with pytest.raises(ServiceDownError, match=r"no model answers yet: no alias 'champion' .*; run 'make run'"):
        predictor.users(["x"])


def test_the_key_of_a_user_is_the_one_that_feast_makes():
    from feast.infra.key_encoding_utils import serialize_entity_key
    from feast.protos.feast.types.EntityKey_pb2 import EntityKey
    from feast.protos.feast.types.Value_pb2 import Value

    from mlplatform.feast_plugins.online_hashes import HashNames

    for user in ("a-user", "Übergröße", "x" * 300):
        key = EntityKey(join_keys=["user_id"], entity_values=[Value(string_val=user)])
        assert HashNames("user_id", "income")([user.encode()]) == [serialize_entity_key(key, 3) + b"income"]


class Registered:
    """A registered model as MLflow's client gives it, and what an endpoint read after each change."""

    def __init__(self) -> None:
        self.aliases, self.tags = {"champion": "1"}, dict[str, str]()
        self.seen: list[releases.Release] = []

    def set_registered_model_alias(self, _: str, alias: str, version: str) -> None:
        self.aliases[alias] = version
        self.seen.append(releases.read(name="m"))

    def set_registered_model_tag(self, _: str, tag: str, value: str) -> None:
        self.tags[tag] = value
        self.seen.append(releases.read(name="m"))

    def delete_registered_model_tag(self, _: str, tag: str) -> None:
        del self.tags[tag]
        self.seen.append(releases.read(name="m"))

    def get_registered_model(self, _: str) -> Registered:
        return self

    def search_registered_models(self, _: str) -> list[Registered]:
        return [self]

    def get_model_version(self, _: str, version: str) -> str:
        return version


def test_no_reader_sees_a_version_released_in_the_way_of_another(monkeypatch: pytest.MonkeyPatch):
    registered = Registered()
    monkeypatch.setattr(releases.mlflow, "MlflowClient", lambda: registered)
    monkeypatch.setattr(releases, "sign", lambda _: None)
    monkeypatch.setattr(releases, "note", lambda *_: None)
    releases.shadow(5, name="m")
    releases.canary(5, 0.1, name="m")
    releases.canary(5, 0.5, name="m")
    releases.shadow(6, name="m")
    asked = [releases.Release(1, 5, way, share) for way, share in (("shadow", 0.0), ("canary", 0.1), ("canary", 0.5))]
    asked.append(releases.Release(1, 6, "shadow"))
    ways = [release for release in registered.seen if release != releases.Release(1)]
    assert list(dict.fromkeys(ways)) == asked
    # A share that grows never takes the version away in between.
    assert registered.seen.count(releases.Release(1)) == 3


def test_a_share_of_users_is_the_canarys_and_a_larger_share_keeps_them():
    users = [f"user-{number}" for number in range(20_000)]
    few, more = ({user for user in users if releases.in_canary(user, share)} for share in (0.1, 0.3))
    assert few < more
    assert (len(few) / 20_000, len(more) / 20_000) == pytest.approx((0.1, 0.3), abs=0.01)
    assert not any(releases.in_canary(user, 0.0) for user in users)
    assert all(releases.in_canary(user, 1.0) for user in users)


class Reader:
    """Everybody's features, without a store."""

    def read(self, users: list[str]) -> list[online_reader.OnlineRow]:
        return [online_reader.OnlineRow(["x"] * 8 if user != "stranger" else None, 1.0) for user in users]


def constant(version: int) -> served_model.ServedModel:
    return served_model.ServedModel("m", version, "s", lambda rows: [version / 10] * len(rows), True, "made up")


def released(mode: str, share: float = 0.0) -> predictor_module.Follower:
    follower = predictor_module.Follower(current=constant(1), challenger=constant(2))
    follower.release = releases.Release(1, 2, mode, share)
    return follower


def test_in_the_shadow_no_answer_changes_and_both_are_logged():
    shadow_log = EndpointLog(columns=endpoint_log.shadowed())
    predictor = predictor_module.Predictor(released("shadow"), Reader, EndpointLog(), shadow_log)  # type: ignore[arg-type]
    _, answers = predictor.users(["a", "stranger", "b"])
    assert [(entry.score, entry.version) for entry in answers] == [(0.1, 1), (None, 1), (0.1, 1)]
    predictor._compare(*predictor._shadows.get_nowait())
    assert (predictor.compared, predictor.greatest_difference) == (2, pytest.approx(0.1))
    assert [row[8:12] for row in shadow_log._rows] == [(1, 0.1, 2, 0.2)] * 2


def test_rows_that_either_log_has_no_room_for_are_counted():
    log, shadow_log = EndpointLog(most=2), EndpointLog(columns=endpoint_log.shadowed(), most=1)
    predictor = predictor_module.Predictor(released("shadow"), Reader, log, shadow_log)  # type: ignore[arg-type]
    predictor.users(["a", "b", "c"])
    predictor._compare(*predictor._shadows.get_nowait())
    assert (log.dropped, shadow_log.dropped, predictor.not_logged) == (1, 2, 3)


def test_a_shadow_that_is_slow_holds_no_request_up():
    predictor = predictor_module.Predictor(released("shadow"), Reader)  # type: ignore[arg-type]
    for _ in range(1_003):
        predictor.people([["x"] * 8])
    assert predictor.not_mirrored == 3


def test_a_canary_answers_its_share_and_nobody_flips():
    users = [f"user-{number}" for number in range(500)]
    predictor = predictor_module.Predictor(released("canary", 0.2), Reader)  # type: ignore[arg-type]
    first = [entry.version for entry in predictor.users(users)[1]]
    assert first == [2 if releases.in_canary(user, 0.2) else 1 for user in users]
    assert [entry.version for user in users for entry in predictor.users([user])[1]] == first
    scores = [entry.score for entry in predictor.users(users)[1]]
    assert scores == [version / 10 for version in first]


def test_the_page_says_which_version_is_loaded_before_anybody_asks_and_0_while_there_is_none():
    follower = predictor_module.Follower()
    metrics.follow(predictor_module.Predictor(follower, lambda: pytest.fail("nobody asks")))
    for current, said in ((None, 0.0), (constant(3), 3.0), (constant(4), 4.0)):
        follower.current = current
        assert f"\nendpoint_model_version {said}\n" in metrics.page().decode()


def test_the_log_keeps_no_user_and_drops_what_has_no_room(monkeypatch: pytest.MonkeyPatch):
    log = EndpointLog(most=2)
    predictor = predictor_module.Predictor(released(""), Reader, log)  # type: ignore[arg-type]
    predictor.users(["a", "b", "c"])
    written: list[pd.DataFrame] = []
    monkeypatch.setattr(objectstore, "write_frame", lambda frame, uri: written.append(frame) or uri)
    uri = log.write()
    assert uri is not None
    assert uri.startswith("s3://mlflow-datasets/endpoint/20")
    assert tuple(written[0].columns) == endpoint_log.logged()
    assert (len(written[0]), log.dropped, log.write()) == (2, 1, None)


@pytest.mark.parametrize("kind", [ServiceDownError, ValueError])
def test_rows_that_cannot_be_written_are_kept(kind: type[Exception], monkeypatch: pytest.MonkeyPatch):
    def away(*_: object) -> None:
        raise kind("the object store does not answer")

    said: list[str] = []
    log = EndpointLog(notify=said.append)
    log.add((*["x"] * 8, 1, 0.5))
    monkeypatch.setattr(objectstore, "write_frame", away)
    assert log.write() is None
    assert said == ["rows are kept until they can be written: the object store does not answer"]
    monkeypatch.setattr(objectstore, "write_frame", lambda frame, uri: f"{uri}: {len(frame)}")
    assert str(log.write()).endswith(": 1")
