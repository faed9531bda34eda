"""Watch a batch, or what the endpoint saw, for drift: find the reference, judge, draw a report, log all to MLflow.

The alarm is `monitoring`'s. Evidently draws the report that a person looks at when it rang; it is imported when a
report is drawn, since it is not part of the base environment.
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
import numpy as np
import pandas as pd
from mlflow.data.pandas_dataset import from_pandas
from mlflow.entities.model_registry import ModelVersion

from mlplatform import history, modeling, objectstore, registry, table
from mlplatform.errors import DataError, MissingObjectError, PlatformError, RegistryError
from mlplatform.monitoring import drift
from mlplatform.monitoring.drift import Performance, Reference, Verdict
from mlplatform.serving import endpoint_log
from mlplatform.settings import DATASETS_BUCKET
from mlplatform.tracking import data_sets

if TYPE_CHECKING:
    from feast import FeatureStore
    from sklearn.pipeline import Pipeline

__getattr__ = table.names(__name__, EXPERIMENT=lambda described: f"{described.name}-drift")
BATCHES = f"s3://{DATASETS_BUCKET}/batches"
REPORT = "drift/report.html"
VERDICT = "drift/verdict.json"
REPORT_ROWS = 30_000  # of each side; Evidently keeps a copy of what it draws
CLOCKS_DIFFER = pd.Timedelta(hours=1)  # at most, between an endpoint and the object store


@dataclass(frozen=True)
class Watched:
    """What came of watching one batch.

    Attributes:
        source: What was watched: an address, or a name.
        version: The champion's version, whose reference was used.
        columns: The verdict on the columns.
        scores: The verdict on the model's answers.
        performance: How well it did, if labels are there.
        run_id: MLflow's run, which holds the report and every figure.
    """

    source: str
    version: int
    columns: Verdict
    scores: Verdict
    performance: Performance | None
    run_id: str

    @property
    def alarm(self) -> bool:
        """Whether columns, scores or performance raised an alarm."""
        return self.columns.alarm or self.scores.alarm or bool(self.performance and self.performance.alarm)

    def __str__(self) -> str:
        lines = [f"columns: {self.columns}", f"scores: {self.scores}"]
        return "\n".join([*lines, f"performance: {self.performance}"] if self.performance else lines)


def read_context(version: ModelVersion, context: str) -> tuple[str, pd.DataFrame]:
    """Read a data set that a version's training run logged.

    Args:
        version: A registered version.
        context: One of `tracking.CONTEXTS`; `reference` is what later data is compared with.

    Returns:
        Its address and its rows.

    Raises:
        RegistryError: The run logged no such data set.
        MissingObjectError: The file is gone.
        DataError: The file holds other bytes than its name says.
    """
    logged = {data.context: data.uri for data in data_sets(mlflow.get_run(str(version.run_id)))}
    if context not in logged:
        raise RegistryError(
            f"the run of {version.name} version {version.version} logged no {context} data; "
            "train it again with notebook 02_train_models"
        )
    uri = logged[context]
    try:
        return uri, objectstore.read_frame(uri)
    except MissingObjectError as error:
        raise MissingObjectError(
            f"the {context} data of {version.name} version {version.version} is gone ({uri}); restore it, "
            "or run notebook 02_train_models, which writes it again"
        ) from error


def read_endpoint_log(prefix: str = endpoint_log.FOLDER, *, since: pd.Timestamp | None = None) -> pd.DataFrame:
    """Read what the endpoint was asked and answered.

    Args:
        prefix: Where its parquet files are.
        since: Leave out what is older; UTC.

    Returns:
        One row per request: the columns, `model_version`, `score` and `event_timestamp`.

    Raises:
        DataError: Nothing was logged since then.
    """
    files = objectstore.list_objects(prefix + "/")
    files = files[files["uri"].str.endswith(".parquet")]
    if since is not None:
        # A row is older than its file: an old file has no new row, and is not fetched.
        files = files[files["modified"] >= since - CLOCKS_DIFFER]
    frames = [objectstore.read_frame(uri) for uri in files["uri"]]
    empty = pd.DataFrame(columns=[*table.current().columns, history.EVENT_TIMESTAMP])
    frame = pd.concat(frames, ignore_index=True) if frames else empty
    if since is not None and len(frame):
        frame = frame[frame[history.EVENT_TIMESTAMP] >= since].reset_index(drop=True)
    if frame.empty:
        when = f" since {since:%Y-%m-%d %H:%M}" if since is not None else ""
        raise DataError(f"the endpoint logged nothing under {prefix}/{when}; ask it something, or give a batch")
    return frame


def newest_batch(prefix: str = BATCHES) -> tuple[str, pd.DataFrame]:
    """Read the newest batch that was scored.

    Args:
        prefix: Where the batch pipeline leaves the features that it scored.

    Returns:
        Its address and its rows.

    Raises:
        DataError: There is none.
    """
    files = objectstore.list_objects(prefix + "/")
    if files.empty:
        raise DataError(f"nobody asked the endpoint and no batch lies under {prefix}/; run 'make pipeline' first")
    uri = str(files.sort_values("modified")["uri"].iloc[-1])
    return uri, objectstore.read_frame(uri)


def find_batch(uri: str | None = None, *, days: int | None = None) -> tuple[str, pd.DataFrame]:
    """Read the batch that is named; by default what the endpoint saw, or else the newest batch that was scored.

    Args:
        uri: A parquet file in the object store.
        days: How far back the endpoint's log is read; all of it by default.

    Returns:
        Where it came from, and its rows.

    Raises:
        DataError: There is none, or the file named is no parquet file.
        MissingObjectError: The file named is not there.
    """
    if uri:
        return uri, objectstore.read_frame(uri)
    if objectstore.list_objects(endpoint_log.FOLDER + "/").empty:
        return newest_batch()
    since = pd.Timestamp.now(tz="UTC") - pd.Timedelta(days=days) if days else None
    return endpoint_log.FOLDER, read_endpoint_log(since=since)


def watch(
    batch: pd.DataFrame,
    *,
    source: str,
    truth: Sequence[int] | None = None,
    report: bool = True,
    alias: str = registry.CHAMPION,
    name: str | None = None,
) -> Watched:
    """Compare a batch with the data of the champion's run and log what was found.

    The alias is looked up once: reference, scores and record are of one version, even if it moves meanwhile.

    Args:
        batch: The raw columns; others are ignored.
        source: Where the batch came from, for the record.
        truth: Labels that arrived later, 0 or 1 for each row.
        report: Whether Evidently draws its report, which takes seconds.
        alias: Whose training data is the reference.
        name: The registered model, by default the table's.

    Raises:
        RegistryError: There is no champion, it takes other columns, or its run logged no reference.
        UntrustedModelError: Its files are not those that were signed when it was promoted.
        MissingObjectError: The reference is gone.
        DataError: The batch is empty or lacks a column.
        PlatformError: A report was asked for and Evidently is not installed.
    """
    version = registry.require(alias, name=name)
    checked = drift.check_columns(batch)
    if report:
        _evidently()
    uri, reference = read_context(version, "reference")
    columns = drift.compare(Reference.of(reference), checked)
    model = registry.load_version(version)
    scores = _score(model, checked)
    verdict = drift.compare_scores(_score(model, reference), scores)
    performance = None
    if truth is not None:
        _, tested = read_context(version, "testing")
        labels = np.asarray(truth, dtype=np.int64)
        performance = drift.compare_performance(modeling.labels(tested), _score(model, tested), labels, scores)
    mlflow.set_experiment(f"{table.current().name}-drift")
    with mlflow.start_run(run_name=f"drift-{Path(source).stem}") as run:
        mlflow.log_params({"source": source, "reference": uri, "model_version": version.version, **_settings()})
        inputs = reference[list(table.current().columns)]
        for frame, context, place in ((inputs, "reference", uri), (checked, "current", source)):
            mlflow.log_input(_described(frame, place), context=context)
        watched = Watched(source, int(version.version), columns, verdict, performance, run.info.run_id)
        mlflow.log_metrics(metrics(watched))
        mlflow.log_dict(_record(watched), VERDICT)
        if report:
            mlflow.log_metrics(log_report(reference, checked))
        mlflow.set_tags({"alarm": str(watched.alarm).lower(), "drifted": ", ".join(columns.drifted)})
    return watched


def _score(model: Pipeline, frame: pd.DataFrame) -> drift.Numbers:
    # A missing category stands there as one that the encoder does not know, and sets none of its columns. A row that
    # lacks a number gets no score.
    described = table.current()
    asked = frame[list(described.columns)].assign(
        **{column: pd.to_numeric(frame[column], errors="coerce") for column in described.numbers}
    )
    known = asked[list(described.numbers)].notna().all(axis=1).to_numpy()
    scores = np.full(len(asked), np.nan)
    if known.any():
        scores[known] = modeling.probabilities(model, asked[known])
    return scores


def _settings() -> dict[str, float]:
    return {"alpha": drift.ALPHA, "least_effect": drift.LEAST_EFFECT}


def _described(frame: pd.DataFrame, source: str) -> Any:
    place = {"source": source} if source.startswith("s3://") else {}
    dataset = from_pandas(frame, name=Path(source).stem, **place)
    dataset.schema = mlflow.models.infer_signature(frame.head()).inputs
    return dataset


def metrics(watched: Watched) -> dict[str, float]:
    """Name every figure of a comparison as MLflow keeps it."""
    named: dict[str, float] = {
        "alarm": float(watched.alarm),
        "rows": float(watched.columns.rows),
        "drifted_columns": float(len(watched.columns.drifted)),
    }
    for column, row in pd.concat([watched.columns.columns, watched.scores.columns]).iterrows():
        if watched.columns.tested:
            named[f"p/{column}"] = float(row["p"])
        named[f"effect/{column}"] = float(row["effect"])
    if watched.performance:
        named |= {"auc": watched.performance.auc, "auc_reference": watched.performance.auc_reference}
    return named


def _record(watched: Watched) -> dict[str, Any]:
    columns = pd.concat([watched.columns.columns, watched.scores.columns])
    return {
        "source": watched.source,
        "model_version": watched.version,
        "alarm": watched.alarm,
        "said": str(watched),
        "columns": json.loads(columns.reset_index().to_json(orient="records")),
    }


def log_report(reference: pd.DataFrame, batch: pd.DataFrame) -> dict[str, float]:
    """Let Evidently draw its drift report and keep the page in the active run.

    Args:
        reference: The raw columns.
        batch: The raw columns; missing values are a category, which Evidently else leaves out.

    Returns:
        Evidently's own figures: `evidently/<column>`, its distance, and `evidently/drifted_columns`.

    Raises:
        PlatformError: Evidently is not installed.
    """
    snapshot = evidently_snapshot(drift.check_columns(reference), batch)
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / Path(REPORT).name
        snapshot.save_html(str(page))
        mlflow.log_artifact(str(page), str(Path(REPORT).parent))
    return evidently_figures(snapshot)


def evidently_snapshot(reference: pd.DataFrame, batch: pd.DataFrame) -> Any:
    """Run Evidently's drift preset with its default methods and thresholds on the raw columns.

    Raises:
        PlatformError: Evidently is not installed.
    """
    evidently = _evidently()
    described = table.current()
    kinds = {"categorical_columns": list(described.categories), "numerical_columns": list(described.numbers)}
    definition = evidently.DataDefinition(**kinds)
    sides = [
        evidently.Dataset.from_pandas(
            frame[list(described.columns)]
            .assign(**{column: pd.to_numeric(frame[column], errors="coerce") for column in described.numbers})
            .sample(min(len(frame), REPORT_ROWS), random_state=0),
            data_definition=definition,
        )
        for frame in (batch, reference)
    ]
    return evidently.Report([evidently.presets.DataDriftPreset()], include_tests=True).run(*sides)


def evidently_figures(snapshot: Any) -> dict[str, float]:
    """Read the distance of each column, and how many columns Evidently calls drifted."""
    figures: dict[str, float] = {}
    for entry in snapshot.dict()["metrics"]:
        if "column" in entry["config"]:
            figures[f"evidently/{entry['config']['column']}"] = float(entry["value"])
        else:
            figures["evidently/drifted_columns"] = float(entry["value"]["count"])
    return figures


def _evidently() -> Any:
    os.environ.setdefault("DO_NOT_TRACK", "1")
    try:
        with warnings.catch_warnings():
            # Of its own code and its server's framework, about what they will drop one day.
            warnings.simplefilter("ignore")
            import evidently
            import evidently.presets
    except ImportError as error:
        raise PlatformError("Evidently is not installed here; run 'make drift', which adds it") from error
    return evidently


def online_moments(store: FeatureStore, users: Sequence[str], service: str) -> pd.Series:
    """Ask the online store when each user's oldest value happened.

    Args:
        store: The feature store.
        users: User ids.
        service: The feature service's name.

    Returns:
        A moment per user, UTC; null for a user without values.
    """
    answer = store.get_online_features(
        features=store.get_feature_service(service), entity_rows=[{history.USER_ID: user} for user in users]
    ).to_dict(include_event_timestamps=True)
    # The key has a time too, always 0.
    times = {name: answer[name] for name in answer if name.endswith("__ts") and name != f"{history.USER_ID}__ts"}
    oldest = pd.DataFrame(times).min(axis=1)
    return pd.Series(pd.to_datetime(oldest.where(oldest > 0), unit="s", utc=True)).set_axis(list(users))


def prometheus_text(watched: Watched) -> str:
    """Write the verdict in Prometheus' text form, for a collector that reads files.

    `deploy/monitoring/alerts.yaml` asks for these names.
    """
    lines = [
        "# HELP mlplatform_drift_alarm Whether columns, scores or performance raised an alarm.",
        "# TYPE mlplatform_drift_alarm gauge",
        f'mlplatform_drift_alarm{{model_version="{watched.version}"}} {int(watched.alarm)}',
        "# HELP mlplatform_drift_column_alarm Whether this column raised an alarm.",
        "# TYPE mlplatform_drift_column_alarm gauge",
        "# HELP mlplatform_drift_effect Share of rows that would have to change their category.",
        "# TYPE mlplatform_drift_effect gauge",
    ]
    for column, row in pd.concat([watched.columns.columns, watched.scores.columns]).iterrows():
        lines.append(f'mlplatform_drift_column_alarm{{column="{column}"}} {int(row["alarm"])}')
        lines.append(f'mlplatform_drift_effect{{column="{column}"}} {row["effect"]:.6f}')
    lines += [
        "# HELP mlplatform_drift_checked_timestamp_seconds When drift was last checked.",
        "# TYPE mlplatform_drift_checked_timestamp_seconds gauge",
        f"mlplatform_drift_checked_timestamp_seconds {pd.Timestamp.now(tz='UTC').timestamp():.0f}",
    ]
    return "\n".join(lines) + "\n"
