"""The version that holds an alias, checked, loaded and compiled to what one row needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlflow
import numpy as np
import pandas as pd
import xgboost
from sklearn.pipeline import Pipeline

from mlplatform import modeling, objectstore, registry, table, tracking
from mlplatform.errors import RegistryError
from mlplatform.registry import CHAMPION

# Raw categories and numbers, in the order of the description.
Row = Sequence[str | float]
Scorer = Callable[[Sequence[Row]], list[float]]

# A category that no training row has: the encoder sets no column for it, and so must the table.
_NEVER_SEEN = "never seen"


class CompiledModel:
    """A pipeline of encoder and XGBoost as a table from category to column and the booster on an array.

    A number is scaled as the encoder does, and goes straight into its column.

    The pipeline takes 15 to 20 ms for one row, nearly all of it in pandas. This takes a fraction of a millisecond.

    Args:
        pipeline: A fitted pipeline of `modeling.make_pipeline` whose estimator is an `XGBClassifier`.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        described = modeling.describe_encoder(pipeline)
        column = {name: index for index, name in enumerate(described["columns"])}
        self._width = len(column)
        inputs = list(table.current().columns)
        self._tables = [
            (inputs.index(name), {category: column[f"{name}_{category}"] for category in known})
            for name, known in described["categories"].items()
        ]
        self._numbers = [
            (inputs.index(name), column[name], mean, deviation)
            for name, (mean, deviation) in described.get("numbers", {}).items()
        ]
        self._booster: xgboost.Booster = pipeline.named_steps["estimator"].get_booster().copy()
        # For one row, starting threads costs more than they save.
        self._booster.set_param({"nthread": 1})

    def __call__(self, rows: Sequence[Row]) -> list[float]:
        """Give each row's probability."""
        encoded = np.zeros((len(rows), self._width), dtype=np.float32)
        for index, row in enumerate(rows):
            for at, places in self._tables:
                place = places.get(row[at])
                if place is not None:
                    encoded[index, place] = 1.0
            for at, place, mean, deviation in self._numbers:
                encoded[index, place] = (row[at] - mean) / deviation
        answers: list[float] = self._booster.inplace_predict(encoded, validate_features=False).tolist()
        return answers


class PipelineModel:
    """A pipeline as it is, for estimators that are not compiled.

    Args:
        pipeline: A fitted pipeline.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline

    def __call__(self, rows: Sequence[Row]) -> list[float]:
        """Give each row's probability."""
        frame = pd.DataFrame(list(rows), columns=list(table.current().columns))
        answers: list[float] = modeling.probabilities(self._pipeline, frame).tolist()
        return answers


@dataclass(frozen=True)
class ServedModel:
    """One version of the registered model, ready to answer.

    Attributes:
        name: The registered model, by default the table's.
        version: The version's number.
        service: The feature service whose features the model takes.
        score: Gives the probability of each of several rows.
        compiled: Whether `score` is the compiled form.
        remark: How `score` was chosen, in one sentence.
    """

    name: str
    version: int
    service: str
    score: Scorer
    compiled: bool
    remark: str


def compile_model(pipeline: Pipeline, reference: pd.DataFrame) -> tuple[Scorer, bool, str]:
    """Compile a pipeline, and use the result only if it answers as the pipeline does.

    Args:
        pipeline: A fitted pipeline of `modeling.make_pipeline`.
        reference: All rows that the model's run logged as its reference, with the described columns.

    Returns:
        What scores rows; whether it is the compiled form; why, in one sentence. The compiled form is used if its
        answers equal the pipeline's to the last bit, for every reference row and for rows with categories never seen.
    """
    plain = PipelineModel(pipeline)
    estimator = pipeline.named_steps["estimator"]
    if not isinstance(estimator, xgboost.XGBClassifier):
        return plain, False, f"{type(estimator).__name__} is not compiled: the pipeline answers"
    rows = _probe_rows(reference)
    try:
        compiled = CompiledModel(pipeline)
        differing = int(np.sum(np.asarray(compiled(rows)) != np.asarray(plain(rows))))
    except (KeyError, ValueError, TypeError, xgboost.core.XGBoostError) as error:
        return plain, False, f"the compiled form cannot be made ({error!r}): the pipeline answers"
    if differing:
        return plain, False, f"the compiled form differs in {differing} of {len(rows)} rows: the pipeline answers"
    return compiled, True, f"the compiled form equals the pipeline on {len(reference)} reference rows"


def _probe_rows(reference: pd.DataFrame) -> list[list[str | float]]:
    """Give every distinct reference row, and the first of them with each category never seen in turn."""
    kinds = table.current().kinds.values()
    distinct: list[list[str | float]] = modeling.inputs(reference).drop_duplicates().to_numpy().tolist()
    first = distinct[0] if distinct else [_NEVER_SEEN if kind == "category" else 0.0 for kind in kinds]
    categories = [place for place, kind in enumerate(kinds) if kind == "category"]
    strange = [[*first[:place], _NEVER_SEEN, *first[place + 1 :]] for place in categories]
    return [*distinct, *strange]


def load(alias: str = CHAMPION, *, name: str | None = None) -> ServedModel:
    """Load the version that holds an alias, with all checks of `registry.load_version`, and compile it.

    Raises:
        RegistryError: As in `registry.load_model`; or its run logged no reference rows.
        UntrustedModelError: As in `registry.load_model`.
        MissingObjectError: The reference rows that the version's run logged are gone.
    """
    version = registry.require(alias, name=name)
    pipeline = registry.load_version(version)
    score, compiled, remark = compile_model(pipeline, _reference(str(version.run_id)))
    return ServedModel(version.name, int(version.version), table.current().service, score, compiled, remark)


def _reference(run_id: str) -> pd.DataFrame:
    logged = [entry.uri for entry in tracking.data_sets(mlflow.get_run(run_id)) if entry.context == "reference"]
    if len(logged) != 1:
        raise RegistryError(f"run {run_id} logged {len(logged)} reference data sets, not one; run notebook 02 again")
    return objectstore.read_frame(logged[0])
