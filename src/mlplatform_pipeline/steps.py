"""What each step of the batch does, without a word about Kubeflow: addresses and digests in, addresses out.

Data passes between steps in the object store, under names that hold its digest, and steps pass these names on. So a
step's arguments say exactly which bytes it reads, and Kubeflow's cache, which looks at arguments only, is right.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import yaml
from numpy.typing import NDArray
from sklearn.base import clone
from sklearn.pipeline import Pipeline

from mlplatform import feature_client, history, income, lineage, modeling, objectstore, registry, table, tracking
from mlplatform.clients.hastening import hasten_feast
from mlplatform.engines import EngineName
from mlplatform.engines.cluster import map_rows
from mlplatform.errors import DataError, PlatformError, RegistryError
from mlplatform.history import EVENT_TIMESTAMP
from mlplatform.monitoring import drift_watch
from mlplatform.promotion import evaluation, gate
from mlplatform.promotion.alias import ask_gate
from mlplatform.settings import DATASETS_BUCKET, find_root, find_settings

BATCH = "income-batch"
BATCH_STEPS = ("read_people", "fetch_features", "score", "collect", "summarise")
EXPERIMENT = "income-batches"
RETRAINING_EXPERIMENT = "income-retraining"
PIPELINE_TAG = "pipeline"
STEPS_TAG = "pipeline_steps"
INPUTS_TAG = "pipeline_inputs"
OUTPUTS_TAG = "pipeline_outputs"
PEOPLE = f"s3://{DATASETS_BUCKET}/people/people.parquet"
FEATURES = f"{drift_watch.BATCHES}/features.parquet"
PARTS = f"s3://{DATASETS_BUCKET}/predictions-parts/part.parquet"
PREDICTIONS = f"s3://{DATASETS_BUCKET}/predictions/income.parquet"


def ready() -> None:
    """Let every library in a step's process find the platform; a service that is down is named by whoever asks it."""
    table.current().only_census("the pipeline")
    settings = find_settings()
    settings.put_into(os.environ)
    hasten_feast()
    mlflow.set_tracking_uri(settings.tracking_uri)


class BatchStoppedError(PlatformError, RuntimeError):
    """A batch crossed a threshold, and its predictions must not be used."""


@dataclass(frozen=True)
class Batch:
    """What a batch depends on, as found when it began.

    Attributes:
        people: How many people are to be scored.
        features_digest: Of the feature files and of which features the service offers.
        model_version: The version that holds the alias.
    """

    people: int
    features_digest: str
    model_version: str


@dataclass(frozen=True)
class Thresholds:
    """What a batch must keep.

    Attributes:
        most_unknown: Share of people without features.
        lowest_mean: Mean probability.
        highest_mean: Mean probability.
    """

    most_unknown: float
    lowest_mean: float
    highest_mean: float


def write_people(users: Sequence[str], moment: pd.Timestamp) -> str:
    """Store who is to be scored and when, for the first step.

    Args:
        users: User ids.
        moment: As of when their features are taken, UTC.

    Returns:
        The address.

    Raises:
        DataError: There is no user, or one twice.
    """
    people = pd.DataFrame(
        {history.USER_ID: pd.Series(list(users), dtype=object), EVENT_TIMESTAMP: moment.as_unit("us")}
    )
    return objectstore.write_frame(check_people(people, "the list"), PEOPLE)


def check_people(people: pd.DataFrame, uri: str) -> pd.DataFrame:
    """Refuse a table that does not say who is to be scored and when.

    Raises:
        DataError: A column is missing or of another kind, there is nobody, or somebody is asked about twice.
    """
    missing = [column for column in (history.USER_ID, EVENT_TIMESTAMP) if column not in people.columns]
    if missing:
        found = ", ".join(map(str, people.columns)) or "no columns"
        raise DataError(f"{uri} lacks {', '.join(missing)}; it has {found}; give user_id and event_timestamp")
    if people.empty:
        raise DataError(f"{uri} names nobody; give at least one user_id")
    asked = people[[history.USER_ID, EVENT_TIMESTAMP]]
    if not asked[history.USER_ID].map(lambda user: isinstance(user, str)).all():
        raise DataError(f"{uri} has a user_id that is not text; convert them with str")
    if not isinstance(asked[EVENT_TIMESTAMP].dtype, pd.DatetimeTZDtype) or asked[EVENT_TIMESTAMP].isna().any():
        raise DataError(
            f"{uri} has an event_timestamp that is no moment with a time zone; use pd.to_datetime(utc=True)"
        )
    twice = int(asked.duplicated().sum())
    if twice:
        raise DataError(f"{uri} asks {twice} times about somebody at the same moment again; drop duplicates")
    return asked.reset_index(drop=True)


def read_people(people_uri: str, alias: str) -> Batch:
    """Check who is to be scored, and find what the answer depends on.

    Raises:
        DataError: As in `check_people`.
        MissingObjectError: There is no such table, or no feature file.
        RegistryError: No version holds the alias, or nothing is registered with the feature store.
    """
    people = check_people(objectstore.read_frame(people_uri), people_uri)
    version = registry.require(alias)
    return Batch(len(people), _features_digest(), str(version.version))


def _features_digest() -> str:
    from mlplatform import features  # Feast takes seconds to import, and most steps need it not

    store = features.open_store()
    service = store.get_feature_service(feature_client.SERVICE)
    offered = {view.name: sorted(field.name for field in view.features) for view in service.feature_view_projections}
    digest = hashlib.sha256(json.dumps(offered, sort_keys=True).encode())
    for view in sorted(offered):
        source: Any = store.get_feature_view(view).batch_source
        digest.update(objectstore.read_bytes(source.path))
    return digest.hexdigest()[: objectstore.DIGEST_LENGTH]


def fetch_features(people_uri: str) -> str:
    """Get what was known of each person at their moment, under the model's column names.

    Returns:
        Address of a table with user, moment and the eight columns, in the order asked; null for who is unknown.
    """
    from mlplatform import features

    people = check_people(objectstore.read_frame(people_uri), people_uri)
    answer = features.point_in_time(features.open_store(), people)
    answer = answer.rename(columns={feature: column for column, feature in table.current().features.items()})
    return objectstore.write_frame(answer[[history.USER_ID, EVENT_TIMESTAMP, *income.COLUMNS]], FEATURES)


def score(
    features_uri: str, alias: str, model_version: str, part: int, parts: int, engine: EngineName = "local"
) -> str:
    """Let the champion score one part of the people; who has no features gets no number.

    Args:
        features_uri: What `fetch_features` returned.
        alias: Which model.
        model_version: The version that must hold the alias, so that all parts are scored by one model.
        part: Which part, from 0.
        parts: How many there are.
        engine: Who scores; `dask` divides the part once more, among the workers of a cluster.

    Returns:
        Address of a table of user, moment and probability.

    Raises:
        RegistryError: The alias has moved since the batch began.
        SettingsError: As in `map_rows`.
        ServiceDownError: As in `map_rows`.
    """
    rows = objectstore.read_frame(features_uri)
    start, stop = (len(rows) * edge // parts for edge in (part, part + 1))
    model = _load_model(alias, model_version)
    features = rows if engine == "local" else features_uri  # a worker reads for itself
    scored = map_rows(engine, score_rows, range(start, stop), features, model)
    people = rows[[history.USER_ID, EVENT_TIMESTAMP]].iloc[start:stop].reset_index(drop=True)
    return objectstore.write_frame(people.assign(probability=np.concatenate(scored)), PARTS)


def score_rows(features: str | pd.DataFrame, model: Pipeline, rows: range) -> NDArray[np.float64]:
    """Score some of the people, in this process or on a worker, which can read the object store and not MLflow.

    Returns:
        Each one's probability; not a number for who has no features.
    """
    whole = objectstore.read_frame(features) if isinstance(features, str) else features
    frame = whole.iloc[rows.start : rows.stop]
    known = frame[list(income.COLUMNS)].notna().all(axis=1).to_numpy()
    probability = np.full(len(frame), np.nan)
    if known.any():
        probability[known] = modeling.probabilities(model, frame[known])
    return probability


def _load_model(alias: str, model_version: str) -> Pipeline:
    holder = registry.require(alias)
    if str(holder.version) != model_version:
        raise RegistryError(
            f"{alias!r} moved from version {model_version} to {holder.version} while the batch ran; "
            "run it again for one model"
        )
    return registry.load_version(holder)


def collect(people_uri: str, features_uri: str, features_digest: str, model_version: str, parts: Sequence[str]) -> str:
    """Join the parts in the order asked and keep beside them where they come from.

    Returns:
        Address of the predictions; the same with `.lineage.json` instead of `.parquet` holds their lineage.

    Raises:
        DataError: The parts are not everybody who was asked about.
    """
    people = check_people(objectstore.read_frame(people_uri), people_uri)
    joined = pd.concat([objectstore.read_frame(uri) for uri in parts], ignore_index=True)
    found = people.merge(joined, on=[history.USER_ID, EVENT_TIMESTAMP], how="left", validate="one_to_one")
    if len(joined) != len(people):
        raise DataError(f"{len(joined)} predictions for {len(people)} people; run the pipeline again")
    uri = objectstore.write_frame(found, PREDICTIONS)
    version = mlflow.MlflowClient().get_model_version(table.current().model, model_version)
    record = {
        "people": people_uri,
        "features": features_uri,
        "features_digest": features_digest,
        "feature_service": feature_client.SERVICE,
        "model": table.current().model,
        "model_version": model_version,
        "training_run": str(version.run_id),
        "parts": list(parts),
        "predictions": uri,
    }
    objectstore.write_bytes(json.dumps(record, indent=1).encode(), lineage_uri(uri))
    return uri


def lineage_uri(predictions_uri: str) -> str:
    """Say where the lineage of predictions lies."""
    return predictions_uri.removesuffix(".parquet") + ".lineage.json"


def summarise(predictions_uri: str, alias: str, thresholds: Thresholds) -> tuple[str, dict[str, float]]:
    """Record the batch in MLflow, and stop it if it crosses a threshold.

    Args:
        predictions_uri: What `collect` returned.
        alias: Which model.
        thresholds: What the batch must keep.

    Returns:
        MLflow's run, and the figures.

    Raises:
        BatchStoppedError: A threshold is crossed; MLflow's run is marked as failed, and says which.
    """
    frame = objectstore.read_frame(predictions_uri)
    record = json.loads(objectstore.read_bytes(lineage_uri(predictions_uri)))
    version = mlflow.MlflowClient().get_model_version(record["model"], record["model_version"])
    figures = {
        "users": float(len(frame)),
        "unknown_users": float(frame["probability"].isna().sum()),
        "mean_probability": float(frame["probability"].mean()),
    }
    crossed = _crossed(figures, thresholds)
    mlflow.set_experiment(EXPERIMENT)
    with mlflow.start_run(run_name=f"{BATCH}-{_moment(frame)}") as run:
        lineage.note_prediction(version, alias, predictions_uri)
        mlflow.set_tags(
            {
                PIPELINE_TAG: BATCH,
                STEPS_TAG: json.dumps(BATCH_STEPS),
                INPUTS_TAG: json.dumps({name: record[name] for name in ("people", "features", "features_digest")}),
                OUTPUTS_TAG: json.dumps({"predictions": predictions_uri, "lineage": lineage_uri(predictions_uri)}),
                lineage.SERVICE_TAG: record["feature_service"],
                "feast.project": _project(),
            }
        )
        mlflow.log_metrics({name: value for name, value in figures.items() if not np.isnan(value)})
        if crossed:
            raise BatchStoppedError(f"{crossed}; look at {predictions_uri} before anybody uses it")
    return run.info.run_id, figures


def _project() -> str:
    path = find_root() / "feature_repo" / "feature_store.yaml"
    return str(yaml.safe_load(path.read_text())["project"])


def _moment(frame: pd.DataFrame) -> str:
    return f"{frame[EVENT_TIMESTAMP].max():%Y-%m-%d}"


def _crossed(figures: dict[str, float], thresholds: Thresholds) -> str:
    unknown, mean = figures["unknown_users"] / figures["users"], figures["mean_probability"]
    if unknown > thresholds.most_unknown:
        return f"{unknown:.2%} of {figures['users']:,.0f} people are unknown, and {thresholds.most_unknown:.2%} may be"
    if not thresholds.lowest_mean <= mean <= thresholds.highest_mean:
        return f"the mean probability {mean:.3f} is not in {thresholds.lowest_mean} to {thresholds.highest_mean}"
    return ""


def train(data_uri: str, alias: str, seed: int, model: str | None = None, engine: EngineName = "local") -> str:
    """Fit the champion's estimator on a window of labelled rows, as notebook 2 does, and evaluate it for the gate.

    The champion is evaluated on the same rows: how it did on those of its own time says nothing about these.

    Args:
        data_uri: The eight columns and the target.
        alias: Whose estimator is used.
        seed: Of the split.
        model: The registered model, by default the table's.
        engine: Who fits, as in `tracking.fit_and_log`.

    Returns:
        MLflow's run, in an experiment of its own: notebook 4 compares runs that were tested on the same rows.

    Raises:
        DataError: The table is not the income data's shape.
        RegistryError: No version holds the alias.
    """
    model = model or table.current().model
    frame = income.check_income(objectstore.read_frame(data_uri), name=data_uri)
    holder = registry.require(alias, name=model)
    champion = registry.load_version(holder)
    training, testing = income.split(frame, seed=seed)
    datasets = tracking.write_datasets(training, testing, frame)
    mlflow.set_experiment(RETRAINING_EXPERIMENT)
    estimator = clone(champion.named_steps["estimator"])
    params = {"seed": seed, "window": data_uri}
    run = tracking.fit_and_log("retrained", estimator, datasets, params=params, engine=engine)
    with mlflow.start_run(run_id=run.run_id):
        found = gate.evaluate(run.model, testing, frame)
        gate.log(found, champion=(str(holder.run_id), gate.evaluate_serving(champion, testing, frame, like=found)))
        mlflow.log_text(evaluation.describe(run.model, testing, name=f"{model}, run {run.name}"), evaluation.CARD_FILE)
    return run.run_id


def decide(run_id: str, model: str | None = None) -> str:
    """Register a run's model and ask the gate; a version that passes waits for its release.

    Returns:
        What the gate said, and what to type next.
    """
    model = model or table.current().model
    version = registry.register(run_id, name=model)
    outcome = ask_gate(version, name=model)
    then = f"; release it with 'release shadow {version}'" if outcome.promoted else ""
    return f"version {version} of {model}: {outcome.reason}{then}"


def data_digest(uri: str) -> str:
    """Give the digest of an object's content, whatever its name says.

    Raises:
        MissingObjectError: It is not there.
    """
    return hashlib.sha256(objectstore.read_bytes(uri)).hexdigest()[: objectstore.DIGEST_LENGTH]


def serving_version(alias: str, model: str) -> str:
    """Give the number of the version that holds an alias.

    Raises:
        RegistryError: No version holds it.
    """
    return str(registry.require(alias, name=model).version)
