"""Train a run again from nothing but its id, and say what is equal and what is not. MLflow is read and not written."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlflow
import numpy as np
from mlflow.data.pandas_dataset import from_pandas
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from sklearn.base import BaseEstimator
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.tree import DecisionTreeClassifier
from xgboost import XGBClassifier

from mlplatform import modeling, objectstore, table, tracking
from mlplatform.engines.training import fitting
from mlplatform.errors import MissingObjectError, RegistryError
from mlplatform.promotion import gate
from mlplatform.promotion.alias import mlflow_errors
from mlplatform_ops import provenance

ESTIMATORS = (DecisionTreeClassifier, LogisticRegression, RandomForestClassifier, XGBClassifier)
# XGBoost's autologging names this one as its own library does.
OTHER_NAMES = {"n_estimators": "num_boost_round"}
UNSET = {"deprecated"}
# A forest adds its trees' answers in the order in which threads end, and a matrix product depends on the processor.
TOLERANCE = 1e-6


@dataclass(frozen=True)
class Comparison:
    """One thing that was compared.

    Attributes:
        what: What it is.
        then: As the run recorded it; empty if it recorded nothing.
        now: As it is now.
        difference: How far numbers are apart, if both sides have them.
        decides: Whether the run counts as reproduced only if the two agree.
    """

    what: str
    then: str
    now: str
    difference: float | None = None
    decides: bool = True

    @property
    def verdict(self) -> str:
        """Say whether the two are the same."""
        if self.then == self.now:
            return "equal"
        if not self.then:
            return "not recorded"
        if self.difference is not None and self.difference <= TOLERANCE:
            return f"within {TOLERANCE:g}"
        return "DIFFERS"

    @property
    def agrees(self) -> bool:
        """Whether the run can count as reproduced."""
        return self.verdict in {"equal", f"within {TOLERANCE:g}"} or not self.decides


def reproduce(run_id: str) -> list[Comparison]:
    """Train a run again with its data sets and parameters, and compare the result with what it logged.

    Args:
        run_id: MLflow's id of a training run.

    Returns:
        What was compared: data sets by MLflow's digest, the answers for the test rows by a digest, the metrics; and for
        the record, code and environment.

    Raises:
        RegistryError: There is no such run, or it trained no model that can be made from its parameters.
        MissingObjectError: One of its data sets is gone.
        DataError: A data set holds other bytes than its name says.
    """
    with mlflow_errors():
        run = mlflow.get_run(run_id)
    data = {entry.context: entry for entry in tracking.data_sets(run)}
    if not {"training", "testing"} <= data.keys() or "estimator" not in run.data.params:
        raise RegistryError(
            f"run {run_id} ({run.info.run_name}) trained no model of ours; give a run of notebook 02 or of a retraining"
        )
    frames = {context: _read(run, entry) for context, entry in data.items() if context in tracking.CONTEXTS}
    compared = [
        Comparison(
            f"{context} data", data[context].digest, from_pandas(frame, targets=table.current().target.column).digest
        )
        for context, frame in frames.items()
    ]
    estimator = make_estimator(run.data.params)
    train, test = frames["training"], frames["testing"]
    with fitting(run.data.params.get("engine", "local"), estimator) as fit:
        model = fit(modeling.make_pipeline(estimator), train, data["training"].uri)
    answers, logged = modeling.probabilities(model, test).tolist(), _answers(run)
    apart = float(np.abs(np.subtract(answers, logged)).max()) if len(logged) == len(answers) else None
    digests = provenance.digest(logged) if logged else "", provenance.digest(answers)
    compared.append(Comparison("answers for the test rows", *digests, difference=apart))
    for name, value in modeling.scores(model, train, test).items():
        then = run.data.metrics.get(name)
        known = ("", None) if then is None else (repr(then), abs(then - value))
        compared.append(Comparison(name, known[0], repr(value), difference=known[1]))
    tags = provenance.tags()
    for what, tag in (("code", provenance.CODE_TAG), ("environment", provenance.ENVIRONMENT_TAG)):
        compared.append(Comparison(what, run.data.tags.get(tag, ""), tags[tag], decides=False))
    return compared


def make_estimator(params: Mapping[str, str]) -> BaseEstimator:
    """Make the estimator that a run's parameters describe.

    Args:
        params: The parameters as MLflow keeps them, all of them text; `estimator` names the class.

    Raises:
        RegistryError: It is of another class than `ESTIMATORS`.
    """
    kinds: dict[str, Any] = {kind.__name__: kind for kind in ESTIMATORS}
    if params["estimator"] not in kinds:
        raise RegistryError(f"a {params['estimator']} cannot be made again; there are: {', '.join(kinds)}")
    made = kinds[params["estimator"]]()
    named = {name: params.get(name, params.get(OTHER_NAMES.get(name, ""))) for name in made.get_params()}
    known = {name: text for name, text in named.items() if text is not None and text not in UNSET}
    estimator: BaseEstimator = made.set_params(**{name: _value(text) for name, text in known.items()})
    return estimator


def _value(text: str) -> object:
    if text == "nan":
        return float("nan")
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text  # such as the name of a criterion


def _read(run: Run, entry: tracking.DataSet) -> Any:
    try:
        return objectstore.read_frame(entry.uri)
    except MissingObjectError as error:
        raise MissingObjectError(
            f"the {entry.context} data of run {run.info.run_id} is gone ({entry.uri}); restore it from a backup"
        ) from error


def _answers(run: Run) -> list[float]:
    try:
        return list(gate.load_json(run.info.run_id, tracking.ANSWERS_FILE)["probability"])
    except (MlflowException, OSError, KeyError, TypeError):
        return []
