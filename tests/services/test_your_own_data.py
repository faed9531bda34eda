"""docs/your-own-data.md does what it says: its files are written and its commands run, in a copy of the repository."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.datasets import load_breast_cancer

from mlplatform.settings import STATE_VARIABLE, VARIABLES
from mlplatform_ops.ports import free_port

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "your-own-data.md"
BLOCKS = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MADE = ("bin/uv", ".ready", ".serving", ".drift", ".pipelines")
PORTS = ("S3", "REDIS", "MLFLOW", "FEATURE_SERVER", "FEAST_UI", "ENDPOINT")
MEANS = load_breast_cancer(as_frame=True).data.filter(like="mean ")

# What came out, asked in the copy by a process that knows nothing of the page's own scripts.
LOOK = """
import json
import mlflow
import numpy as np
from mlplatform import connect, features, history, modeling, registry, table, tracking
from mlplatform.monitoring import drift_watch
from mlplatform.promotion import signing
from mlplatform.serving import model_client

connect()
frame, versions = table.read(), history.build_history(table.read())
store = features.open_store()
asked = versions[["sample_id", "event_timestamp"]]
offline = store.get_historical_features(asked, store.get_feature_service("breast_cancer_v1")).to_df()
online = features.read_online(store, asked["sample_id"].tolist())
version, model = registry.find("champion"), registry.load_model()
run = mlflow.get_run(version.run_id)
answers = [modeling.probabilities(model, rows) for rows in (frame, offline, online)]
larger = frame.sample(300, random_state=1)
larger["mean radius"] *= 1.2
watched = drift_watch.watch(larger, source="larger", report=True)
print(json.dumps({
    "run_id": run.info.run_id,
    "drifted": watched.columns.drifted,
    "scores": watched.scores.columns.index.tolist(),
    "report": sorted(name for name in mlflow.get_run(watched.run_id).data.metrics if name.startswith("evidently/mean")),
    "served": model_client.predict(frame)["score"].tolist(),
    "asked": model_client.predict_users([asked["sample_id"].iloc[0], "a-stranger"]).fillna("").to_dict("list"),
    "dtypes": frame.dtypes.astype(str).to_dict(),
    "signature": {
        entry.name: entry.type.name
        for entry in mlflow.models.get_model_info("models:/breast-cancer@champion").signature.inputs.inputs
    },
    "views": {
        view.name: {field.name: str(field.dtype) for field in view.features} for view in store.list_feature_views()
    },
    "keys": [entity.join_key for entity in store.list_entities() if entity.name != "__dummy"],
    "experiment": mlflow.get_experiment(run.info.experiment_id).name,
    "metrics": run.data.metrics,
    "data": {data.context: data.uri for data in tracking.data_sets(run)},
    "version": version.name,
    "signed": signing.TAG in version.tags,
    "card": mlflow.artifacts.load_text(f"runs:/{version.run_id}/model_card.md"),
    "registered": [entry.name for entry in mlflow.search_registered_models()],
    "offline": offline.drop(columns=["sample_id", "event_timestamp"]).to_dict("list"),
    "online": online.drop(columns=["sample_id", "found"]).to_dict("list"),
    "found": online["found"].tolist(),
    "people": int(asked["sample_id"].nunique()),
    "answers": [answer.tolist() for answer in answers],
}))
"""

# A table with categories, and with ids and times of its own.
FLATS = """
name = "flats"
file = "flats.csv"
model = "let-within-a-week"
groups = ["district"]

[target]
column = "let"
positive = "yes"
negative = "no"

[columns]
"floor area" = "number"
district = "category"
rent = "number"

[entity]
name = "flat"
key = "flat"
time = "offered"
history = "file"
start = 2025-01-01
end = 2025-12-31
"""
LOOK_AT_FLATS = """
import json
import mlflow
from mlplatform import connect, features, history, modeling, registry, table

connect()
frame = table.read()
versions = history.build_history(frame)
store = features.open_store()
offline = features.point_in_time(store, versions[["flat", "event_timestamp"]])
last = versions.sort_values("event_timestamp").drop_duplicates("flat", keep="last")
online = features.read_online(store, last["flat"].tolist())
print(json.dumps({
    "signature": [
        (entry.name, entry.type.name)
        for entry in mlflow.models.get_model_info("models:/let-within-a-week@champion").signature.inputs.inputs
    ],
    "views": {
        view.name: {field.name: str(field.dtype) for field in view.features} for view in store.list_feature_views()
    },
    "history": modeling.inputs(offline).equals(modeling.inputs(frame)),
    "online": modeling.inputs(online).equals(modeling.inputs(last).reset_index(drop=True)),
    "flats": len(last),
    "probability": float(modeling.probabilities(registry.load_model(), online).mean()),
}))
"""


class Reader:
    """Somebody with a clone of their own, who types what the page says."""

    def __init__(self, clone: Path) -> None:
        self.clone = clone
        listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
        for name in subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines():
            if (ROOT / name).is_file():
                (clone / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, clone / name)
        (clone / ".venv").symlink_to(sys.prefix)
        unset = {STATE_VARIABLE, *VARIABLES.values()}
        self.environment = {name: value for name, value in os.environ.items() if name not in unset} | {
            "PYTHONPATH": str(clone / "src"),  # the environment knows the code of the clone under test
            # The environment is there: make must not make it again because a copied file is newer.
            "MAKEFLAGS": " ".join(f"--old-file=.venv/{made}" for made in MADE),
        }
        taken: list[str] = []
        for name in PORTS:
            taken.append(str(free_port(avoid=taken)))
            self.environment[f"MLPLATFORM_{name}_PORT"] = taken[-1]

    def type(self, command: str) -> str:
        done = subprocess.run(
            ["/bin/sh", "-ec", command],
            cwd=self.clone,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    def follow(self, page: str) -> list[str]:
        """Write the files and type the commands, from the top to the bottom; give what was printed."""
        said = []
        for kind, text in BLOCKS.findall(page):
            path = re.match(r"# (\S+/\S+)\n", text)
            if path:
                (self.clone / path[1]).parent.mkdir(exist_ok=True)
                (self.clone / path[1]).write_text(text)
            elif kind == "sh":
                said.append(self.type(text))
        return said


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reader]:
    """A reader who has followed the page to its end; the platform runs until the last test."""
    somebody = Reader(tmp_path_factory.mktemp("own") / "clone")
    page, end = PAGE.read_text().split("## At the end")
    try:
        somebody.follow(page)
        yield somebody
    finally:
        somebody.follow(end)


@pytest.fixture(scope="module")
def found(reader: Reader) -> dict[str, Any]:
    (reader.clone / "look.py").write_text(LOOK)
    return json.loads(reader.type(".venv/bin/python look.py").splitlines()[-1])


def test_numbers_are_numbers_in_the_file_the_models_signature_and_the_feature_views(found: dict[str, Any]) -> None:
    assert found["dtypes"] == dict.fromkeys(MEANS, "float64") | {"diagnosis": "object"}
    assert found["signature"] == dict.fromkeys(MEANS, "double")
    fields = {name: kind for view in found["views"].values() for name, kind in view.items()}
    assert fields == {column.replace(" ", "_"): "Float64" for column in MEANS}
    assert {name: len(view) for name, view in found["views"].items()} == {"size": 3, "shape": 7}
    assert found["keys"] == ["sample_id"]


def test_the_champion_is_a_logged_evaluated_and_signed_model_of_that_table(found: dict[str, Any]) -> None:
    assert (found["version"], found["registered"]) == ("breast-cancer", ["breast-cancer"])
    assert found["signed"]
    assert found["experiment"] == "breast-cancer-classifier"
    assert 0.9 < found["metrics"]["roc_auc_score_test"] < 1
    assert found["metrics"]["evaluation_worst_group_recall"] > 0.7
    assert set(found["data"]) == {"training", "testing", "reference"}
    assert all(uri.startswith("s3://mlflow-datasets/breast-cancer/") for uri in found["data"].values())
    assert "diagnosis is malignant" in found["card"]
    assert not re.search("census|50,000|earner", found["card"])


def test_history_and_online_store_give_the_table_back_and_the_model_answers_the_same(found: dict[str, Any]) -> None:
    expected = {column.replace(" ", "_"): MEANS[column].tolist() for column in MEANS}
    assert found["people"] == len(MEANS) == 569
    assert found["offline"] == expected
    assert found["online"] == expected
    assert all(found["found"])
    from_file, from_history, from_online = found["answers"]
    assert len(from_file) == 569
    assert from_file == from_history == from_online


def test_the_endpoint_takes_numbers_and_answers_as_the_model_does(found: dict[str, Any]) -> None:
    assert found["served"] == pytest.approx(found["answers"][0], abs=1e-6)
    assert found["asked"]["sample_id"][1] == "a-stranger"
    assert found["asked"]["score"] == [pytest.approx(found["answers"][0][0], abs=1e-6), ""]


def test_a_number_that_drifted_is_named_and_drawn(found: dict[str, Any]) -> None:
    assert "mean radius" in found["drifted"]
    assert found["report"] == [f"evidently/{column}" for column in sorted(MEANS)]


def test_a_run_of_that_table_is_reproduced_from_its_id(reader: Reader, found: dict[str, Any]) -> None:
    said = reader.type(f"make reproduce RUN={found['run_id']}")
    assert re.search(r"answers for the test rows.*equal", said)


def test_the_loop_is_for_the_census_and_says_so_in_one_line(reader: Reader) -> None:
    said = reader.type("! make loop 2>&1")
    assert "error: make loop is for the census and not for 'breast-cancer'; see docs/your-own-data.md" in said
    assert "Traceback" not in said


def test_a_table_with_categories_ids_and_times_of_its_own_takes_the_same_steps(reader: Reader) -> None:
    rng, rows = np.random.default_rng(3), 3_000
    flats = pd.DataFrame(
        {
            "offered": pd.Timestamp("2025-01-01") + pd.to_timedelta(np.sort(rng.uniform(0, 360, rows)), unit="D"),
            "flat": rng.integers(0, 2_000, rows),
            "floor area": rng.normal(70, 20, rows),
            "district": rng.choice(["north", "south", "west"], rows),
            "rent": rng.normal(900, 250, rows).round(),
        }
    )
    wanted = flats["floor area"] / 20 - flats["rent"] / 250 + (flats["district"] == "north") + rng.normal(0, 1, rows)
    flats.assign(let=np.where(wanted > 0, "yes", "no")).to_csv(reader.clone / "data" / "flats.csv", index=False)
    (reader.clone / "data" / "table.toml").write_text(FLATS)
    for command in (".venv/bin/python own/train.py", ".venv/bin/python own/register.py", "make features"):
        reader.type(command)
    (reader.clone / "look.py").write_text(LOOK_AT_FLATS)
    found = json.loads(reader.type(".venv/bin/python look.py").splitlines()[-1])
    assert found["signature"] == [["floor area", "double"], ["district", "string"], ["rent", "double"]]
    assert found["views"] == {"flats": {"floor_area": "Float64", "district": "String", "rent": "Float64"}}
    assert found["history"]
    assert found["online"]
    assert found["flats"] == flats["flat"].nunique() < rows
    assert 0 < found["probability"] < 1
