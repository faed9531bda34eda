"""What notebooks 5 to 7 made and claimed: history, online values, predictions, and where these come from."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

import mlflow
import pandas as pd
import pytest
import requests

from mlplatform import features, history, income, lineage, modeling, objectstore, registry, results, tracking
from mlplatform.settings import Settings

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def built(executed: dict[str, Path]) -> dict[str, Any]:
    return results.read_results(executed["05_build_features"])


@pytest.fixture(scope="module")
def retrieved(executed: dict[str, Path]) -> dict[str, Any]:
    return results.read_results(executed["06_retrieve_features"])


@pytest.fixture(scope="module")
def predicted(executed: dict[str, Path]) -> dict[str, Any]:
    return results.read_results(executed["07_predict_income"])


@pytest.fixture(scope="module")
def store(executed: dict[str, Path], platform: Settings):
    return features.open_store(ROOT / "feature_repo")


def test_every_view_has_28066_users_online(built: dict[str, Any]):
    assert built["online"] == dict.fromkeys(history.VIEWS, 28_066)
    assert built["changed_again"] == 0


def test_the_feature_files_hold_the_history(built: dict[str, Any]):
    versions = history.build_history(income.read_income(ROOT / "data" / "income_data.csv"))
    assert built["files"] == {view: f"s3://feature-data-sets/{view}.parquet" for view in history.VIEWS}
    for view, frame in history.split_views(versions).items():
        pd.testing.assert_frame_equal(objectstore.read_frame(built["files"][view]), frame, check_exact=True)


def test_all_30162_pairs_of_user_and_moment_give_back_the_file(store):
    frame = income.read_income(ROOT / "data" / "income_data.csv")
    pairs = history.build_history(frame)[["user_id", "event_timestamp"]]
    answer = features.point_in_time(store, pairs)
    assert len(answer) == 30_162
    pd.testing.assert_frame_equal(modeling.inputs(answer), frame[list(income.COLUMNS)], check_exact=True)


def test_the_steady_user_was_male_on_30_january(store):
    asked = pd.DataFrame(
        {
            "user_id": ["9f2ac416-06e1-44a0-87bd-d4787c85bf66"],
            "event_timestamp": pd.to_datetime(["2023-01-30 10:59:42"]),
        }
    )
    assert features.point_in_time(store, asked, ["demographic:Sex"])["Sex"].tolist() == ["Male"]


def test_the_changing_user_is_answered_with_the_version_of_20_may(retrieved: dict[str, Any]):
    assert retrieved["version_in_may"].startswith("2023-05-20T")


def test_what_notebook_6_compared_was_everybody_and_equal(retrieved: dict[str, Any]):
    assert retrieved["pairs"] == 30_162
    assert retrieved["compared_users"] == 28_066
    assert retrieved["differences"] == 0
    assert (retrieved["asked"], retrieved["nulls"], retrieved["expired"]) == (7, 3, 69)
    assert retrieved["compared_http"] == 100


def test_online_and_offline_predictions_agree_for_everybody(predicted: dict[str, Any]):
    assert predicted["scored"] == predicted["compared_online"] == 28_066
    assert max(predicted["single"].values()) - min(predicted["single"].values()) < 1e-6
    assert len(predicted["single"]) == 3


def test_the_stored_predictions_are_the_champions(predicted: dict[str, Any], store):
    stored = objectstore.read_frame(predicted["predictions"])
    some = stored.sample(500, random_state=1)
    answer = features.point_in_time(store, some[["user_id", "event_timestamp"]])
    expected = modeling.probabilities(registry.load_model(), answer)
    assert some["probability"].tolist() == expected.tolist()


def test_a_stranger_gets_no_prediction(predicted: dict[str, Any]):
    assert predicted["refusals"]["require_found"].startswith("RegistryError: the online store knows nothing of user")
    assert predicted["refusals"]["probabilities"].startswith("DataError")


def test_the_feature_store_trains_the_same_model_as_the_file(predicted: dict[str, Any]):
    assert predicted["same_model_rows"] == 6_033


def test_a_prediction_leads_back_to_the_data_its_model_was_trained_on(predicted: dict[str, Any]):
    steps = lineage.trace(predicted["run_id"])
    assert steps.to_dict("records") == predicted["lineage"]
    assert steps["step"].tolist() == [
        *(f"{context} data" for context in tracking.CONTEXTS),
        "run",
        "model version",
        "feature service",
        "prediction",
    ]
    where = steps.set_index("step")["where"]
    version = registry.find(registry.CHAMPION)
    assert where["model version"] == f"models:/{version.name}/{version.version}"
    assert where["run"] == f"runs:/{version.run_id}"
    assert where["prediction"] == predicted["predictions"]
    assert len(objectstore.read_frame(where["training data"])) == 24_129
    assert mlflow.get_run(predicted["run_id"]).data.tags["feast.feature_service"] == "income_v1"


def send(command: str) -> requests.Response:
    """Send what a printed curl command sends, since no machine need have curl."""
    curl = argparse.ArgumentParser()
    curl.add_argument("-s", action="store_true")
    curl.add_argument("-X", dest="method")
    curl.add_argument("-H", dest="headers", action="append")
    curl.add_argument("-d", dest="data")
    curl.add_argument("url")
    # In the environment of `eval "$(make -s env)"`, which is this process's.
    words = curl.parse_args(shlex.split(os.path.expandvars(command.replace("\\\n", " ")))[1:])
    headers = dict(header.split(": ", 1) for header in words.headers)
    return requests.request(words.method, words.url, headers=headers, data=words.data, timeout=60)


@pytest.mark.parametrize("document", ["README.md", "notebooks/06_retrieve_features.ipynb"])
def test_the_curl_commands_work_as_printed(document: str, executed: dict[str, Path], platform: Settings):
    text = (ROOT / document).read_text()
    if document.endswith(".ipynb"):
        text = "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])
    asked = re.findall(r"^(curl (?:.*\\\n)*.*)$", text, flags=re.MULTILINE)
    assert asked, f"{document} shows no request to the feature server"
    for command in asked:
        reply = send(command)
        assert '"Male"' in reply.text, reply.text
        assert '"PRESENT"' in reply.text
        assert "2023-01-24T06:52:20Z" in reply.text
