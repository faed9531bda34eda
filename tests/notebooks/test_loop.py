"""The whole loop on what the notebooks made, and its evidence, every number of which is computed again here.

It takes a minute or two of an idle machine: an endpoint, three steps of a pipeline in a process each, two evaluations
on folds, and five thousand questions. `make loop` goes the same way with the same sizes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any
from uuid import uuid4

import mlflow
import numpy as np
import pandas as pd
import pytest
import skops.io
from scipy import stats
from sklearn.metrics import accuracy_score, roc_auc_score
from sklearn.pipeline import Pipeline

from mlplatform import income, modeling, objectstore, registry, table, tracking
from mlplatform.monitoring import drift
from mlplatform.promotion import evaluation, signing
from mlplatform.serving import releases
from mlplatform.settings import Settings
from mlplatform_ops.cli import main

ROOT = Path(__file__).parents[2]
SEED = 1
# The first test waits for the whole loop; where ten other things run, that takes half an hour.
pytestmark = pytest.mark.timeout(3_600)
STEPS = ["champion", "equal", "shifted", "retrain", "gate", "shadow", "canary starts", "promote", "rollback"]


@pytest.fixture(scope="module")
def before(executed: dict[str, Path], platform: Settings) -> releases.Release:
    """Which version of the platform's own model answered before the loop."""
    return releases.read()


@pytest.fixture(scope="module")
def told(before: releases.Release) -> tuple[str, str]:
    """The folder of the evidence, and what the loop told."""
    done = subprocess.run(
        [sys.executable, "-m", "mlplatform_ops", "loop", "--seed", str(SEED)],
        cwd=ROOT,
        env=dict(os.environ),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    # MLflow prints where each run can be seen.
    return done.stdout.splitlines()[-1], done.stderr


@pytest.fixture(scope="module")
def folder(told: tuple[str, str]) -> str:
    return told[0]


@pytest.fixture(scope="module")
def found(folder: str) -> dict[str, Any]:
    """What the evidence says."""
    return read_json(f"{folder}/evidence.json")


@pytest.fixture(scope="module")
def record(found: dict[str, Any]) -> dict[str, Any]:
    """What happened, from which the evidence was made."""
    return read_json(found["record"])


def read_json(uri: str) -> Any:
    return json.loads(objectstore.read_bytes(uri))


def logged(uri: str) -> Any:
    return json.loads(mlflow.artifacts.load_text(uri))


def stored_model(model_id: str) -> Pipeline:
    """Load a logged model by its id alone, without the registry."""
    path = Path(mlflow.artifacts.download_artifacts(f"models:/{model_id}")) / signing.MODEL_FILE
    return skops.io.load(path, trusted=signing.TRUSTED_TYPES)


def same(found: Any, expected: Any, where: str = "evidence") -> None:
    """Compare two nested structures whole, so that no number is left out."""
    if isinstance(expected, dict):
        assert set(found) == set(expected), where
        for key in expected:
            same(found[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for place, (one, other) in enumerate(zip(found, expected, strict=True)):
            same(one, other, f"{where}[{place}]")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-9), where
    else:
        assert found == expected, where


def test_nine_steps_are_told_with_their_seconds(told: tuple[str, str]) -> None:
    titles = re.findall(r"^(\d)\. ", told[1], re.MULTILINE)
    assert [int(number) for number in titles[:9]] == list(range(1, 10))
    assert len(re.findall(r"^   \d+\.\d s$", told[1], re.MULTILINE)) == len(STEPS) + 1


def test_five_thousand_questions_were_answered_none_failed_and_no_user_flipped(found: dict[str, Any]) -> None:
    asked = objectstore.read_frame(found["requests"]["source"])
    assert len(asked) >= 5_000
    assert set(asked["status"]) == {200}
    assert asked["score"].between(0, 1).all()
    during = asked[(asked["began_in"] == "canary") & (asked["ended_in"] == "canary")]
    versions = during.groupby("user_id")["version"].agg(["nunique", "first", "size"])
    assert set(versions["nunique"]) == {1}
    assert versions["size"].min() > 1, "a user was asked for once, and could not flip"
    expected = [2 if releases.in_canary(str(user), 0.1) else 1 for user in versions.index]
    assert versions["first"].tolist() == expected
    assert set(expected) == {1, 2}


def test_a_users_answers_come_from_the_champion_then_the_challenger_then_the_worse_one_and_back(
    found: dict[str, Any],
) -> None:
    asked = objectstore.read_frame(found["requests"]["source"])
    for user, rows in asked.groupby("user_id"):
        order = rows["version"][rows["version"].diff() != 0].tolist()
        assert order == [1, 2, 3, 2], user


def test_the_shadow_changed_no_answer_and_was_logged(found: dict[str, Any], folder: str) -> None:
    asked = objectstore.read_frame(found["requests"]["source"])
    assert set(asked[asked["ended_in"] == "shadow"]["version"]) == {1}
    files = objectstore.list_objects(f"{folder}/endpoint-shadow/")["uri"]
    both = pd.concat([objectstore.read_frame(uri) for uri in files])
    assert set(zip(both["model_version"], both["challenger_version"], strict=True)) == {(1, 2)}
    assert (both["score"] != both["challenger_score"]).any()


def test_an_equal_batch_is_silent_and_the_alarm_names_the_column_that_moved(found: dict[str, Any]) -> None:
    assert not found["drift"]["equal"]["alarm"]
    shifted = found["drift"]["shifted"]
    assert [name for name, entry in shifted["columns"].items() if entry["alarm"] and name != "score"] == ["Occupation"]
    assert shifted["auc"] < shifted["auc_reference"] - 0.02


def test_the_gate_let_the_retrained_model_in_and_kept_the_worse_one_out(
    found: dict[str, Any], record: dict[str, Any]
) -> None:
    assert found["gate"]["retrained"]["broken"] == []
    assert found["gate"]["retrained"]["lead"]["low"] > 0
    assert found["gate"]["worse"]["lead"]["high"] < 0
    assert found["gate"]["worse"]["broken"]
    events = registry.decisions(name=record["name"])
    retrained = events[events["version"] == 2]["event"].tolist()
    assert [event.partition(":")[0] for event in retrained[:4]] == [
        "passes the gate, against champion 1",
        "answers in the shadow of the champion",
        "answers 10% of the users",
        "promoted, against champion 1",
    ]
    assert retrained[-1] == "rolled back from version 3: it answers worse than the one before"
    (refused,) = events[(events["version"] == 3) & events["event"].str.startswith("not promoted")]["event"]
    assert "lead in AUC" in refused


def test_the_platforms_own_champion_and_log_are_left_alone(
    found: dict[str, Any], before: releases.Release, record: dict[str, Any]
) -> None:
    assert releases.read() == before
    assert before.champion is not None
    assert record["name"] != table.current().model
    # A later run of notebook 4 chooses among the runs of this experiment.
    names = set(mlflow.search_runs(experiment_names=[tracking.EXPERIMENT])["tags.mlflow.runName"])
    assert not {"retrained", "worse"} & names


def test_every_number_of_the_evidence_is_what_its_sources_give(
    found: dict[str, Any], record: dict[str, Any], folder: str
) -> None:
    expected = {
        "record": f"{folder}/record.json",
        "seconds": {name: ended - began for name, began, ended in record["steps"]},
        "requests": requests_again(found, record),
        "drift": {name: drift_again(found, record, name) for name in ("equal", "shifted")},
        "models": {name: model_again(found["models"][name], record, name) for name in record["versions"]},
        "gate": {
            name: gate_again(found["gate"][name], record, name, other)
            for name, other in {"retrained": "champion", "worse": "retrained"}.items()
        },
        "code": code_again(found["code"]["files"]),
        "files": {
            name: hashlib.sha256(objectstore.read_bytes(f"{folder}/{name}")).hexdigest() for name in found["files"]
        },
    }
    same(found, expected)
    assert list(expected["seconds"]) == STEPS
    assert set(found["files"]) >= {"model_card.md", "drift_report.html", "requests.parquet", "decisions.json"}


def requests_again(found: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    asked = objectstore.read_frame(found["requests"]["source"])
    versions = asked["version"].to_numpy()
    canary = asked[(asked["began_in"] == "canary") & (asked["ended_in"] == "canary")]
    first = canary.drop_duplicates(["user_id", "version"])
    worse = asked[versions == 3]["answered"]
    return {
        "source": found["requests"]["source"],
        "asked": asked.shape[0],
        "failed": int((asked["status"] != 200).sum() + asked["score"].isna().sum()),
        "users": len(set(asked["user_id"])),
        "answered_by_version": {str(number): int((versions == number).sum()) for number in sorted(set(versions))},
        "shadow_answers_by_others": int(
            ((asked["began_in"] == "shadow") & (asked["ended_in"] == "shadow") & (asked["version"] != 1)).sum()
        ),
        "canary_users": len(set(canary["user_id"])),
        "canary_users_of_challenger": len(set(canary[canary["version"] == 2]["user_id"])),
        "canary_users_flipped": int(first["user_id"].duplicated().sum()),
        "median_ms": float(np.median(1_000 * (asked["answered"] - asked["asked"]))),
        "seconds_of_worse": float(max(worse) - min(worse)),
    }


def drift_again(found: dict[str, Any], record: dict[str, Any], name: str) -> dict[str, Any]:
    said = found["drift"][name]
    batch, reference = objectstore.read_frame(said["batch"]), objectstore.read_frame(said["reference"])
    champion = found["models"]["champion"]
    model = stored_model(champion["model_id"])
    test = objectstore.read_frame(champion["data"]["testing"]["uri"])
    columns = drift.compare(drift.Reference.of(reference), batch)
    scores = drift.compare_scores(modeling.probabilities(model, reference), modeling.probabilities(model, batch))
    judged = pd.concat([columns.columns, scores.columns])
    now, then = (
        float(roc_auc_score(modeling.labels(rows), modeling.probabilities(model, rows))) for rows in (batch, test)
    )
    performance = drift.compare_performance(
        modeling.labels(test),
        modeling.probabilities(model, test),
        modeling.labels(batch),
        modeling.probabilities(model, batch),
    )
    return {
        "batch": record["batches"][name],
        "run": record["drift_runs"][name],
        "reference": champion["data"]["reference"]["uri"],
        "model_version": 1,
        "alarm": columns.alarm or scores.alarm or performance.alarm,
        "columns": {
            str(column): {
                "p": float(row["p"]),
                "effect": float(row["effect"]),
                "alarm": bool(row["alarm"]),
                "why": row["why"],
            }
            for column, row in judged.iterrows()
        },
        "auc": now,
        "auc_reference": then,
    }


def model_again(said: dict[str, Any], record: dict[str, Any], name: str) -> dict[str, Any]:
    version = mlflow.MlflowClient().get_model_version(record["name"], str(record["versions"][name]))
    run = mlflow.get_run(version.run_id)
    data = {entry.context: entry.uri for entry in tracking.data_sets(run) if entry.context in tracking.CONTEXTS}
    model = stored_model(run.outputs.model_outputs[0].model_id)
    train, test = objectstore.read_frame(data["training"]), objectstore.read_frame(data["testing"])
    sides = {}
    for side, rows in (("train", train), ("test", test)):
        truth, answer = (
            (rows[income.TARGET] == ">50K").astype(int),
            model.predict_proba(rows[list(income.COLUMNS)])[:, 1],
        )
        sides[side] = float(roc_auc_score(truth, answer)), float(accuracy_score(truth, answer > 0.5))
    packages = ("joblib", "mlflow", "numpy", "pandas", "pyarrow", "scikit-learn", "scipy", "skops", "threadpoolctl")
    environment = {package: metadata.version(package) for package in (*packages, "xgboost")}
    environment |= {"python": sys.version.split()[0], "machine": os.uname().machine}
    text = json.dumps(environment, sort_keys=True)
    return {
        "version": record["versions"][name],
        "run": run.info.run_id,
        "model_id": run.outputs.model_outputs[0].model_id,
        "data": {
            context: {"uri": uri, "sha256": hashlib.sha256(objectstore.read_bytes(uri)).hexdigest()}
            for context, uri in data.items()
        },
        "code": code_digest(),
        "environment": text,
        "environment_digest": hashlib.sha256(text.encode()).hexdigest(),
        "scores": {
            "roc_auc_score_train": sides["train"][0],
            "roc_auc_score_test": sides["test"][0],
            "training_accuracy": sides["train"][1],
            "test_accuracy": sides["test"][1],
        },
        "calibration_error": evaluation.calibration_error(modeling.labels(test), modeling.probabilities(model, test)),
        "groups": groups_again(test, modeling.probabilities(model, test)),
    }


def groups_again(test: pd.DataFrame, probability: Any) -> list[dict[str, Any]]:
    rows = []
    rich = test[income.TARGET] == ">50K"
    for column in ("Race", "Sex"):
        for group in sorted(set(test[rich][column])):
            mine = (rich & (test[column] == group)).to_numpy()
            hits, people = int((probability[mine] > 0.5).sum()), int(mine.sum())
            interval = stats.binomtest(hits, people).proportion_ci(0.95, method="wilson")
            rows.append(
                {
                    "column": column,
                    "group": group,
                    "positives": people,
                    "true_positive_rate": hits / people,
                    "low": float(interval.low),
                    "high": float(interval.high),
                }
            )
    return rows


def gate_again(said: dict[str, Any], record: dict[str, Any], name: str, against: str) -> dict[str, Any]:
    mine, theirs = logged(said["evaluation"]), logged(said["champion_evaluation"])
    lead = np.array(mine["fold_auc"]) - np.array(theirs["fold_auc"])
    share = 1 / (mine["folds"]["folds"] - 1)
    half = stats.t.ppf(0.975, len(lead) - 1) * np.sqrt(lead.var(ddof=1) * (1 / len(lead) + share))
    groups = [group for group in mine["groups"] if group["positives"] >= 30]
    broken = [
        event.partition(": ")[2].split("; ")
        for event in registry.decisions(name=record["name"])
        .query(f"version == {record['versions'][name]} and event.str.startswith('not promoted')")["event"]
        .tolist()
    ]
    versions = {
        role: mlflow.MlflowClient().get_model_version(record["name"], str(number))
        for role, number in record["versions"].items()
    }
    rival = {
        "retrained": f"runs:/{versions[name].run_id}/evaluation_of_champion.json",
        "worse": f"runs:/{versions[against].run_id}/evaluation.json",
    }
    return {
        "evaluation": f"runs:/{versions[name].run_id}/evaluation.json",
        "champion_evaluation": rival[name],
        "lead": {"mean": float(lead.mean()), "low": float(lead.mean() - half), "high": float(lead.mean() + half)},
        "calibration_error": mine["calibration_error"],
        "worst_group": min(groups, key=lambda group: group["true_positive_rate"]),
        "broken": broken[0] if broken else [],
    }


def code_again(files: str) -> dict[str, Any]:
    package = ROOT / "src" / "mlplatform"
    paths = [path for path in package.rglob("*") if path.suffix in {".py", ".toml", ".md"}]
    digests = {str(path.relative_to(package)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    assert read_json(files) == digests
    return {"digest": hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest(), "files": files}


def code_digest() -> str:
    package = ROOT / "src" / "mlplatform"
    paths = [path for path in package.rglob("*") if path.suffix in {".py", ".toml", ".md"}]
    digests = {str(path.relative_to(package)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def test_the_evaluations_that_the_gate_read_are_what_models_and_rows_give(found: dict[str, Any]) -> None:
    retrained, champion = found["models"]["retrained"], found["models"]["champion"]
    test, frame = (objectstore.read_frame(retrained["data"][name]["uri"]) for name in ("testing", "reference"))
    for model, source in ((retrained, "evaluation"), (champion, "champion_evaluation")):
        said = logged(found["gate"]["retrained"][source])
        fitted = stored_model(model["model_id"])
        probability = modeling.probabilities(fitted, test)
        assert said["calibration_error"] == pytest.approx(
            evaluation.calibration_error(modeling.labels(test), probability)
        )
        same(said["groups"], groups_again(test, probability))
    # The champion is scored as it is; the challenger's folds are fitted anew, one of which is enough here.
    said = logged(found["gate"]["retrained"]["champion_evaluation"])
    again = evaluation.fitted_fold_scores(stored_model(champion["model_id"]), frame, like=said["folds"])
    assert said["fold_auc"] == pytest.approx(again)


def test_the_model_card_says_what_the_model_and_its_rows_give(found: dict[str, Any], folder: str, record: Any) -> None:
    card = objectstore.read_bytes(f"{folder}/model_card.md").decode()
    retrained = found["models"]["retrained"]
    test = objectstore.read_frame(retrained["data"]["testing"]["uri"])
    model = stored_model(retrained["model_id"])
    assert card == evaluation.describe(model, test, name=f"{record['name']}, run retrained")
    for group in retrained["groups"]:
        said = f"{group['column']} {group['group']}: {group['true_positive_rate']:.3f} "
        assert f"- {said}({group['low']:.3f} to {group['high']:.3f}), {group['positives']} people" in card


def test_the_drift_report_is_the_one_of_the_run(found: dict[str, Any], folder: str) -> None:
    page = objectstore.read_bytes(f"{folder}/drift_report.html").decode()
    assert page == mlflow.artifacts.load_text(f"runs:/{found['drift']['shifted']['run']}/drift/report.html")
    assert "Occupation" in page


@pytest.mark.parametrize("name", ["champion", "retrained"])
def test_a_run_is_trained_again_from_its_id_and_nothing_differs(
    found: dict[str, Any], capsys: pytest.CaptureFixture[str], name: str
) -> None:
    runs = len(mlflow.search_runs(search_all_experiments=True))
    assert main(["reproduce", found["models"][name]["run"]]) == 0
    table = capsys.readouterr().out
    assert "DIFFERS" not in table
    assert table.count("equal") == 10
    assert len(mlflow.search_runs(search_all_experiments=True)) == runs


def test_a_run_that_cannot_be_trained_again_is_refused_in_one_line(
    found: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    mlflow.set_experiment(f"test-{uuid4()}")
    frame = income.read_income(ROOT / "data" / "income_data.csv").head(50)
    uri = objectstore.write_frame(frame, f"s3://mlflow-datasets/test-{uuid4()}/gone.parquet")
    with mlflow.start_run() as run:
        for context in ("training", "testing"):
            data = mlflow.data.from_pandas(frame, source=uri, targets="Target", name=context)
            mlflow.log_input(data, context=context)
        mlflow.log_param("estimator", "XGBClassifier")
    bucket, key = objectstore.split_uri(uri)
    objectstore._default_client().delete_object(Bucket=bucket, Key=key)
    capsys.readouterr()  # MLflow tells of each new experiment
    for run_id, message in {
        "f" * 32: f"Run with id={'f' * 32} not found",
        found["drift"]["equal"]["run"]: "trained no model of ours; give a run of notebook 02",
        run.info.run_id: f"the training data of run {run.info.run_id} is gone ({uri}); restore it from a backup",
    }.items():
        assert main(["reproduce", run_id]) == 1
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1


def test_another_result_is_called_different(found: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    run_id = found["models"]["worse"]["run"]
    client = mlflow.MlflowClient()
    kept = mlflow.get_run(run_id).data.metrics["test_accuracy"]
    client.log_metric(run_id, "test_accuracy", kept + 0.01)
    try:
        assert main(["reproduce", run_id]) == 1
    finally:
        client.log_metric(run_id, "test_accuracy", kept)
    assert capsys.readouterr().out.count("DIFFERS") == 1


def test_make_rollback_gives_the_alias_back(found: dict[str, Any], record: dict[str, Any]) -> None:
    words = ["make", "-s", "--old-file=.venv/.ready", "rollback", "REASON=tried by a test", f"MODEL={record['name']}"]
    for version in (3, 2):  # the version before the last one, and back
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stderr.endswith(f"version {version} is the champion again\n")
        assert releases.read(name=record["name"]) == releases.Release(version)


def test_the_release_commands_say_what_they_did_and_refuse_what_makes_no_sense(
    found: dict[str, Any], record: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    def release(*words: str) -> tuple[int, str]:
        status = main(["release", *words, "--model", record["name"]])
        return status, capsys.readouterr().err.strip()

    serving = releases.read(name=record["name"]).champion
    assert release("promote")[1].startswith(f"error: nothing of '{record['name']}' is being released")
    assert release("shadow", "3") == (0, "version 3 answers in the shadow; the endpoint logs both answers")
    assert release("status") == (0, f"champion {serving}, challenger 3 as shadow")
    assert release("canary", "3", "--share", "2")[1].startswith("error: a share of 2.0 is none")
    assert release("canary", "3", "--share", "0.5") == (0, "version 3 answers 50% of the users")
    status, said = release("promote")
    assert status == 1
    assert said.startswith(f"version 3 not promoted, against champion {serving}: ")
    assert release("end") == (0, "the champion answers everybody")
    assert release("status") == (0, f"champion {serving}")
    assert release("shadow", "77")[0] == 1
