"""Promotion against real servers: one at a time, mended when it dies halfway, and only of what was signed."""

from __future__ import annotations

import os
import pickle
import sys
import time
from collections.abc import Iterator
from multiprocessing.pool import Pool
from pathlib import Path
from uuid import uuid4

import mlflow
import pytest
import warm
from evaluations import log_evaluation
from sklearn.base import BaseEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.tree import DecisionTreeClassifier
from xgboost import XGBClassifier

from mlplatform import income, modeling, objectstore, registry, tracking
from mlplatform.connection import connect, s3_client
from mlplatform.errors import RegistryError, UntrustedModelError
from mlplatform.promotion import evaluation, gate, lock, signing
from mlplatform.promotion.alias import PENDING, PREVIOUS, ask_gate
from mlplatform.settings import ARTIFACTS_BUCKET, Settings

CSV = Path(__file__).parents[2] / "data" / "income_data.csv"
PROCESSES, ROUNDS = 8, 2


@pytest.fixture(scope="module")
def trained(platform: Settings) -> list[str]:
    """Runs of models that differ, each better than the one before: their ids."""
    mlflow.set_experiment(f"test-{uuid4()}")
    frame = income.read_income(CSV).head(600)
    parts = frame.head(400), frame.tail(200).reset_index(drop=True), frame
    datasets = tracking.write_datasets(*parts)
    runs = []
    for number in range(PROCESSES):
        estimator = LogisticRegression(C=10.0 ** (number - 4), max_iter=200)
        run = tracking.fit_and_log(f"model-{number}", estimator, datasets)
        log_evaluation(run.run_id, auc=0.80 + 0.01 * number)
        runs.append(run.run_id)
    return runs


@pytest.fixture
def name() -> Iterator[str]:
    """The name of a registered model of this test's own."""
    chosen = f"test-{uuid4()}"
    yield chosen
    if mlflow.MlflowClient().search_registered_models(f"name = '{chosen}'"):
        mlflow.MlflowClient().delete_registered_model(chosen)


def holder(alias: str, name: str) -> int | None:
    found = registry.find(alias, name=name)
    return None if found is None else int(found.version)


def register_and_promote(run_id: str, name: str) -> dict[str, object]:
    """What one of several processes does."""
    outcome = registry.promote(registry.register(run_id, name=name), name=name)
    return {"run_id": run_id, "version": outcome.version, "promoted": outcome.promoted, "over": outcome.over}


@pytest.fixture(scope="module")
def pool(platform: Settings) -> Iterator[Pool]:
    """Eight processes, of which each is one person's."""
    with warm.context().Pool(PROCESSES) as processes:
        yield processes


@pytest.mark.parametrize("round_", range(ROUNDS))
def test_eight_processes_promote_at_once_and_the_best_becomes_champion(
    round_: int, trained: list[str], pool: Pool, name: str
) -> None:
    outcomes = pool.starmap(register_and_promote, [(run_id, name) for run_id in trained], chunksize=1)
    versions = mlflow.MlflowClient().search_model_versions(f"name = '{name}'")
    assert sorted(int(entry.version) for entry in versions) == list(range(1, PROCESSES + 1))
    champion = registry.find(registry.CHAMPION, name=name)
    assert champion.run_id == trained[-1], "the best is not the champion"
    # A search leaves out the aliases; the versions themselves say them.
    fresh = [mlflow.MlflowClient().get_model_version(name, entry.version) for entry in versions]
    assert [entry.version for entry in fresh if registry.CHAMPION in entry.aliases] == [champion.version]
    # Those that were told so were champion one after the other, each after the one that it says it replaced.
    told = {outcome["over"]: outcome["version"] for outcome in outcomes if outcome["promoted"]}
    assert len(told) == sum(bool(outcome["promoted"]) for outcome in outcomes)
    chain, last = [], None
    while last in told:
        last = told[last]
        chain.append(last)
    assert len(chain) == len(told)
    assert last == int(champion.version)
    events = registry.decisions(name=name)
    assert events[events["event"].str.startswith("promoted")]["version"].tolist() == chain
    assert holder(PREVIOUS, name) == (chain[-2] if len(chain) > 1 else None)
    assert not [entry for entry in versions if PENDING in entry.tags]


# Seven trees, each better than the one before, and one model that leads all of them clearly, on every fold.
CANDIDATES: dict[str, BaseEstimator] = {
    **{
        f"tree-{leaves}": DecisionTreeClassifier(max_leaf_nodes=leaves, random_state=0)
        for leaves in (6, 8, 12, 16, 24, 40, 80)
    },
    "boosted": XGBClassifier(n_estimators=60, max_depth=4, n_jobs=1, random_state=0),
}


def train_and_promote(candidate: str, name: str) -> str:
    """What one of eight people does at the same time: notebooks 2, 3 and 4 for a model of their own."""
    connect()
    # Twice: when another process makes the experiment at the same moment, the first call finds it and does not set it.
    mlflow.set_experiment(experiment_id=mlflow.set_experiment(name).experiment_id)
    frame, estimator = income.read_income(CSV), CANDIDATES[candidate]
    train, test = income.split(frame, test_size=0.2, seed=42)
    run = tracking.fit_and_log(candidate, estimator, tracking.write_datasets(train, test, frame))
    scores = evaluation.fold_scores({candidate: estimator}, frame, folds=3, repeats=1, seed=42)
    answers, truth = modeling.probabilities(run.model, test), modeling.labels(test)
    evaluated = gate.Evaluation(
        rows=len(test),
        calibration_error=evaluation.calibration_error(truth, answers),
        groups=evaluation.group_rates(test, answers).to_dict("records"),
        folds=scores.attrs,
        fold_auc=scores[candidate].tolist(),
    )
    with mlflow.start_run(run_id=run.run_id):
        gate.log(evaluated)
    registry.promote(registry.register(run.run_id, name=name), name=name)
    return run.run_id


def test_eight_people_train_evaluate_and_promote_at_once(pool: Pool, name: str) -> None:
    """On one platform, with the whole table, into an experiment and a registered model that nobody has made before."""
    began = time.monotonic()
    run_ids = dict(
        zip(CANDIDATES, pool.starmap(train_and_promote, [(each, name) for each in CANDIDATES], 1), strict=True)
    )
    sys.stderr.write(f"eight trainings at once took {time.monotonic() - began:.0f} s\n")
    runs = mlflow.search_runs(experiment_names=[name], output_format="list")
    assert {run.info.run_id: run.info.status for run in runs} == dict.fromkeys(run_ids.values(), "FINISHED")
    for run in runs:
        assert set(modeling.SCORES) <= run.data.metrics.keys()
        assert [data.context for data in tracking.data_sets(run)] == list(tracking.CONTEXTS)
    assert len({data.uri for run in runs for data in tracking.data_sets(run)}) == len(tracking.CONTEXTS)
    versions = [
        mlflow.MlflowClient().get_model_version(name, entry.version)
        for entry in mlflow.MlflowClient().search_model_versions(f"name = '{name}'")
    ]
    assert sorted(entry.run_id for entry in versions) == sorted(run_ids.values())
    assert [entry.run_id for entry in versions if registry.CHAMPION in entry.aliases] == [run_ids["boosted"]]
    frame = income.read_income(CSV).head(100)
    assert len(modeling.probabilities(registry.load_model(name=name), frame)) == 100


@pytest.mark.parametrize("dies_before", ["set_registered_model_alias", "delete_model_version_tag"])
def test_a_promotion_that_dies_halfway_is_mended_by_the_next(
    dies_before: str, trained: list[str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third = (registry.register(run_id, name=name) for run_id in trained[:3])
    registry.promote(first, name=name)

    class Killed(BaseException):
        pass

    def die(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(mlflow.MlflowClient, dies_before, die)
        with pytest.raises(Killed):
            registry.promote(second, name=name)
    moved = dies_before != "set_registered_model_alias"
    assert holder(registry.CHAMPION, name) == (second if moved else first)
    assert registry.promote(third, name=name).over == (second if moved else first)
    assert holder(registry.CHAMPION, name) == third
    assert holder(PREVIOUS, name) == (second if moved else first)
    events = registry.decisions(name=name).groupby("version")["event"].agg(list)
    begun = events[second][0]
    assert begun.startswith("promoted" if moved else "interrupted before the alias moved: promoted")
    assert events[first].count(f"replaced by version {second}") == int(moved)
    assert not [v for v in mlflow.MlflowClient().search_model_versions(f"name = '{name}'") if PENDING in v.tags]


def test_rolling_back_is_a_recorded_decision_and_can_be_undone(trained: list[str], name: str) -> None:
    first, second = (registry.register(run_id, name=name) for run_id in trained[:2])
    registry.promote(first, name=name)
    with pytest.raises(RegistryError, match="no champion before"):
        registry.rollback("too early", name=name)
    registry.promote(second, name=name)
    outcome = registry.rollback("it overlooks people", name=name)
    assert (outcome.promoted, outcome.version, outcome.over) == (True, first, second)
    assert holder(registry.CHAMPION, name) == first
    assert holder(PREVIOUS, name) == second
    assert f"rolled back from version {second}: it overlooks people" in set(registry.decisions(name=name)["event"])
    registry.load_model(name=name)
    registry.rollback("it was right", name=name)
    assert holder(registry.CHAMPION, name) == second


def test_a_lock_is_held_by_one_and_names_its_holder_to_the_others(platform: Settings) -> None:
    name = f"test-{uuid4()}"
    with (
        lock.exclusive(name) as held,
        pytest.raises(RegistryError, match=f":{os.getpid()}:[0-9a-f]* holds the lock s3"),
        lock.exclusive(name, wait_s=0.5),
    ):
        pass
    with lock.exclusive(name, wait_s=0.5) as again:
        assert again.holder != held.holder


def test_a_lock_whose_write_was_answered_too_late_is_still_held_and_then_free(
    platform: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"test-{uuid4()}"
    with lock.exclusive(name) as held:
        put = held.client.put_object
        # As a client does that hears nothing: it sends the same again, which the first one has made too late.
        monkeypatch.setattr(held.client, "put_object", lambda **words: put(**words) and put(**words))
        held.renew()
        held.renew()
    monkeypatch.undo()
    with lock.exclusive(name, wait_s=0.5) as again:
        assert again.holder != held.holder


def test_a_lock_of_a_dead_process_is_taken_over_and_the_dead_one_can_write_no_more(
    platform: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"test-{uuid4()}"
    monkeypatch.setattr(lock, "LEASE_S", 1.0)
    with (
        lock.exclusive(name) as dead,
        lock.exclusive(name, wait_s=20),
        pytest.raises(RegistryError, match="lost the lock"),
    ):
        dead.renew()


@pytest.fixture
def champion(trained: list[str], name: str) -> Iterator[tuple[str, str]]:
    """A model with a champion: its name, and where the champion's files lie in the object store; they are put back."""
    registry.promote(registry.register(trained[0], name=name), name=name)
    folder = stored(signing.model_id_of(registry.find(registry.CHAMPION, name=name)))
    before = {uri: objectstore.read_bytes(uri) for uri in objectstore.list_objects(folder)["uri"]}
    yield name, folder
    added = set(objectstore.list_objects(folder)["uri"]) - set(before)
    replace_in_place(folder, {uri.removeprefix(f"{folder}/"): None for uri in added})
    for uri, body in before.items():
        objectstore.write_bytes(body, uri)


def stored(model_id: str) -> str:
    """Where the object store holds the files of a logged model."""
    return mlflow.get_logged_model(model_id).artifact_location.replace(
        "mlflow-artifacts:/", f"s3://{ARTIFACTS_BUCKET}/"
    )


def replace_in_place(champion: str, change: dict[str, bytes | None]) -> dict[str, bytes]:
    """Change files as somebody can who may write to the object store; give what was there."""
    bucket, _, key = champion.removeprefix("s3://").partition("/")
    client, before = s3_client(), {}
    for name, body in change.items():
        path = f"{key}/{name}"
        if name in {Path(uri).name for uri in objectstore.list_objects(champion)["uri"]}:
            before[name] = objectstore.read_bytes(f"s3://{bucket}/{path}")
        if body is None:
            client.delete_object(Bucket=bucket, Key=path)
        else:
            client.put_object(Bucket=bucket, Key=path, Body=body)
    return before


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.mark,))


def test_a_model_replaced_in_the_object_store_does_not_run(champion: tuple[str, str], tmp_path: Path) -> None:
    name, folder = champion
    mark = tmp_path / "mark"
    text = objectstore.read_bytes(f"{folder}/MLmodel").decode()
    pickled = text.replace("model.skops", "model.pkl").replace(
        "serialization_format: skops", "serialization_format: cloudpickle"
    )
    assert pickled.count("pkl") >= 1
    replace_in_place(
        folder, {"MLmodel": pickled.encode(), "model.pkl": pickle.dumps(Payload(mark)), "model.skops": None}
    )
    with pytest.raises(UntrustedModelError, match=f"'{name}' version 1 is not what was signed"):
        registry.load_model(name=name)
    assert not mark.exists()
    # Without the check this would have been the end of it: MLflow itself runs the payload.
    mlflow.artifacts.download_artifacts(f"models:/{name}@champion", dst_path=str(tmp_path))
    pickle.loads((tmp_path / "model.pkl").read_bytes())  # noqa: S301
    assert mark.exists()


def test_one_changed_byte_in_the_object_store_is_refused_and_putting_it_back_helps(champion: tuple[str, str]) -> None:
    name, folder = champion
    body = objectstore.read_bytes(f"{folder}/model.skops")
    before = replace_in_place(folder, {"model.skops": body[:100] + bytes([body[100] ^ 1]) + body[101:]})
    with pytest.raises(UntrustedModelError):
        registry.load_model(name=name)
    replace_in_place(folder, before)
    registry.load_model(name=name)


def test_an_alias_moved_by_hand_to_an_unsigned_version_loads_nothing(
    champion: tuple[str, str], trained: list[str]
) -> None:
    name, _ = champion
    other = registry.register(trained[1], name=name)
    mlflow.MlflowClient().set_registered_model_alias(name, registry.CHAMPION, str(other))
    with pytest.raises(UntrustedModelError, match="version 2 is not signed"):
        registry.load_model(name=name)
    signature = mlflow.MlflowClient().get_model_version(name, "1").tags[signing.TAG]
    mlflow.MlflowClient().set_model_version_tag(name, str(other), signing.TAG, signature)
    with pytest.raises(UntrustedModelError, match="version 2 is not what was signed"):
        registry.load_model(name=name)


def test_after_an_alias_was_moved_by_hand_a_roll_back_gives_the_version_promoted_last(
    trained: list[str], name: str
) -> None:
    for run_id in trained[:3]:
        registry.promote(registry.register(run_id, name=name), name=name)
    client = mlflow.MlflowClient()
    client.set_registered_model_alias(name, registry.CHAMPION, "1")
    # `previous` is version 2, and version 3 is the one that this hand replaced.
    assert holder(PREVIOUS, name) == 2
    assert registry.rollback("moved by hand", name=name).version == 3
    assert holder(registry.CHAMPION, name) == 3


def test_asking_the_gate_moves_no_alias_and_writes_down_what_it_said(trained: list[str], name: str) -> None:
    registry.promote(registry.register(trained[1], name=name), name=name)
    for run_id, passes, said in (
        (trained[2], True, "passes the gate, against champion 1: "),
        (trained[0], False, "not "),
    ):
        version = registry.register(run_id, name=name)
        outcome = ask_gate(version, name=name)
        assert outcome.promoted is passes
        assert holder(registry.CHAMPION, name) == 1
        events = registry.decisions(name=name)
        assert events[events["version"] == version]["event"].tolist() == [outcome.reason]
        assert outcome.reason.startswith(said)


def test_promotion_signs_only_what_the_training_run_logged(trained: list[str], name: str) -> None:
    version = registry.register(trained[2], name=name)
    entry = mlflow.MlflowClient().get_model_version(name, str(version))
    honest = objectstore.read_bytes(f"{stored(signing.model_id_of(entry))}/model.skops")
    other_id = mlflow.get_run(trained[3]).outputs.model_outputs[0].model_id
    other = objectstore.read_bytes(f"{stored(other_id)}/model.skops")
    replace_in_place(stored(signing.model_id_of(entry)), {"model.skops": other})
    try:
        with pytest.raises(UntrustedModelError, match="as its training run logged it is not what was signed"):
            registry.promote(version, name=name)
        assert registry.find(registry.CHAMPION, name=name) is None
    finally:
        replace_in_place(stored(signing.model_id_of(entry)), {"model.skops": honest})
    assert registry.promote(version, name=name).promoted


def test_a_model_that_its_run_did_not_sign_is_not_promoted(trained: list[str], name: str) -> None:
    frame = income.read_income(CSV).head(200)
    model = modeling.make_pipeline(LogisticRegression()).fit(modeling.inputs(frame), modeling.labels(frame))
    with mlflow.start_run() as run:
        mlflow.sklearn.log_model(model, name="model", pip_requirements=["scikit-learn"])
    log_evaluation(run.info.run_id, auc=0.9)
    with pytest.raises(UntrustedModelError, match="is not signed"):
        registry.promote(registry.register(run.info.run_id, name=name), name=name)


def test_files_are_fetched_for_others_to_load(champion: tuple[str, str], tmp_path: Path) -> None:
    name, _ = champion
    files = signing.fetch_verified(registry.find(registry.CHAMPION, name=name), tmp_path)
    rows = income.read_income(CSV).head(50)
    expected = modeling.probabilities(registry.load_model(name=name), rows)
    assert modeling.probabilities(signing.load(files), rows).tolist() == expected.tolist()
    assert "MLmodel" in {path.name for path in files.iterdir()}
