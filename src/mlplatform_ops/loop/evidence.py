"""The evidence of a loop: one folder in the object store, in which each number names what it was computed from.

`record.json` says what happened; `requests.parquet` has every answer; `evidence.json` has every number that was made of
these, of MLflow's runs and of the data sets, beside the addresses of all of them.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

import mlflow
import numpy as np
import pandas as pd

from mlplatform import modeling, objectstore, registry, tracking
from mlplatform.monitoring import drift_watch
from mlplatform.promotion import evaluation, gate, signing
from mlplatform_ops import provenance
from mlplatform_ops.loop import traffic

RECORD, EVIDENCE, REQUESTS = "record.json", "evidence.json", "requests.parquet"


@dataclass(frozen=True)
class Record:
    """What happened in a loop.

    Attributes:
        name: The registered model of this loop alone.
        seed: What decided whom it drew.
        share: The canary's share of the users.
        versions: The versions by what they were: `champion`, `retrained`, `worse`.
        batches: Addresses of the batches, by name.
        drift_runs: MLflow's runs that judged them, by the same names.
        window: Address of the rows of the retraining.
        steps: When each step began and ended, in seconds since 1970: name, beginning, end.
    """

    name: str
    seed: int
    share: float
    versions: dict[str, int]
    batches: dict[str, str]
    drift_runs: dict[str, str]
    window: str
    steps: list[tuple[str, float, float]]


def write(record: Record, asked: pd.DataFrame, folder: str) -> dict[str, Any]:
    """Compute the evidence and store it.

    Args:
        record: What happened.
        asked: Every question to the endpoint, as `traffic.Traffic.frame` gives it.
        folder: Where to, as `s3://bucket/folder`.

    Returns:
        What `evidence.json` holds.
    """
    retrained = _version(record, "retrained")
    found: dict[str, Any] = {
        "record": f"{folder}/{RECORD}",
        "seconds": {name: ended - began for name, began, ended in record.steps},
        "requests": requests(asked, record, f"{folder}/{REQUESTS}"),
        "drift": {name: drift(record, name) for name in record.batches},
        "models": {name: model(record, name) for name in record.versions},
        "gate": {name: decision(record, name, against) for name, against in _CHALLENGES.items()},
        "code": {"digest": provenance.digest(provenance.code()), "files": f"{folder}/code.json"},
    }
    run_id = str(retrained.run_id)
    files = {
        RECORD: _json(asdict(record)),
        REQUESTS: objectstore.encode(asked, REQUESTS),
        "code.json": _json(provenance.code()),
        "decisions.json": registry.decisions(name=record.name).to_json(orient="records", date_format="iso").encode(),
        evaluation.CARD_FILE: mlflow.artifacts.load_text(f"runs:/{run_id}/{evaluation.CARD_FILE}").encode(),
        "drift_report.html": mlflow.artifacts.load_text(
            f"runs:/{record.drift_runs['shifted']}/{drift_watch.REPORT}"
        ).encode(),
    }
    found["files"] = {name: hashlib.sha256(body).hexdigest() for name, body in files.items()}
    for name, body in {**files, EVIDENCE: _json(found)}.items():
        objectstore.write_bytes(body, f"{folder}/{name}")
    return found


# Each version that the gate judged, and the one that served then.
_CHALLENGES = {"retrained": "champion", "worse": "retrained"}


def requests(asked: pd.DataFrame, record: Record, source: str) -> dict[str, Any]:
    """Count what was asked and answered while the loop went on."""
    canary = asked[(asked["began_in"] == "canary") & (asked["ended_in"] == "canary")]
    shadow = asked[(asked["began_in"] == "shadow") & (asked["ended_in"] == "shadow")]
    return {
        "source": source,
        "asked": len(asked),
        "failed": len(traffic.failed(asked)),
        "users": int(asked["user_id"].nunique()),
        "answered_by_version": {str(version): int(rows) for version, rows in asked["version"].value_counts().items()},
        "shadow_answers_by_others": int((shadow["version"] != record.versions["champion"]).sum()),
        "canary_users": int(canary["user_id"].nunique()),
        "canary_users_of_challenger": int(
            canary[canary["version"] == record.versions["retrained"]]["user_id"].nunique()
        ),
        "canary_users_flipped": traffic.flipped(asked, "canary"),
        "median_ms": float(1_000 * (asked["answered"] - asked["asked"]).median()),
        "seconds_of_worse": _seconds_of(asked, record.versions["worse"]),
    }


def _seconds_of(asked: pd.DataFrame, version: int) -> float:
    rows = asked[asked["version"] == version]
    return float(rows["answered"].max() - rows["answered"].min())


def drift(record: Record, name: str) -> dict[str, Any]:
    """Give the figures of one judged batch, as its run logged them."""
    run = mlflow.get_run(record.drift_runs[name])
    verdict = mlflow.artifacts.load_dict(f"runs:/{run.info.run_id}/{drift_watch.VERDICT}")
    logged = run.data.metrics
    return {
        "batch": record.batches[name],
        "run": run.info.run_id,
        "reference": run.data.params["reference"],
        "model_version": int(run.data.params["model_version"]),
        "alarm": verdict["alarm"],
        "columns": {entry.pop("index", entry.pop("column", "")): entry for entry in verdict["columns"]},
        "auc": logged["auc"],
        "auc_reference": logged["auc_reference"],
    }


def model(record: Record, name: str) -> dict[str, Any]:
    """Give the digests, scores and groups of one version, computed from its files and its data sets."""
    version = _version(record, name)
    run = mlflow.get_run(str(version.run_id))
    data = {entry.context: entry for entry in tracking.data_sets(run) if entry.context in tracking.CONTEXTS}
    frames = {context: objectstore.read_frame(entry.uri) for context, entry in data.items()}
    fitted = registry.load_version(version)
    test = frames["testing"]
    probability = modeling.probabilities(fitted, test)
    return {
        "version": int(version.version),
        "run": run.info.run_id,
        "model_id": signing.model_id_of(version),
        "data": {context: {"uri": entry.uri, "sha256": _sha256(entry.uri)} for context, entry in data.items()},
        "code": run.data.tags.get(provenance.CODE_TAG),
        "environment": run.data.tags.get(provenance.ENVIRONMENT_TAG),
        "environment_digest": _text_digest(run.data.tags.get(provenance.ENVIRONMENT_TAG)),
        "scores": modeling.scores(fitted, frames["training"], test),
        "calibration_error": evaluation.calibration_error(modeling.labels(test), probability),
        "groups": evaluation.group_rates(test, probability).to_dict("records"),
    }


def decision(record: Record, name: str, against: str) -> dict[str, Any]:
    """Give what the gate compared, and what it found broken."""
    challenger, champion = _version(record, name), _version(record, against)
    mine = gate.read(str(challenger.run_id))
    theirs = gate.read_champion(str(challenger.run_id), str(champion.run_id))
    source = f"runs:/{challenger.run_id}/{gate.RIVAL_FILE}"
    if theirs is None:
        theirs, source = gate.read(str(champion.run_id)), f"runs:/{champion.run_id}/{gate.FILE}"
    lead = np.array(mine.fold_auc) - np.array(theirs.fold_auc)
    mean, low, high = evaluation.paired_interval(lead, folds=mine.folds["folds"])
    return {
        "evaluation": f"runs:/{challenger.run_id}/{gate.FILE}",
        "champion_evaluation": source,
        "lead": {"mean": mean, "low": low, "high": high},
        "calibration_error": mine.calibration_error,
        "worst_group": mine.worst_group,
        "broken": gate.check(mine, theirs)[0],
    }


def _version(record: Record, name: str) -> Any:
    return mlflow.MlflowClient().get_model_version(record.name, str(record.versions[name]))


def _sha256(uri: str) -> str:
    return hashlib.sha256(objectstore.read_bytes(uri)).hexdigest()


def _text_digest(text: str | None) -> str | None:
    return hashlib.sha256(text.encode()).hexdigest() if text else None


def _json(value: object) -> bytes:
    return json.dumps(value, indent=1).encode()
