"""The gate: which evaluation makes a version champion. The thresholds and their reasons are in gate.toml."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
from sklearn.pipeline import Pipeline

from mlplatform.errors import RegistryError
from mlplatform.modeling import labels, probabilities
from mlplatform.promotion.evaluation import (
    calibration_error,
    fitted_fold_scores,
    fold_scores,
    group_rates,
    paired_interval,
)

FILE = "evaluation.json"
RIVAL_FILE = "evaluation_of_champion.json"  # the same of the version that served when the model was trained
RULES: Mapping[str, Any] = tomllib.loads(Path(__file__).with_name("gate.toml").read_text())


@dataclass(frozen=True)
class Evaluation:
    """What the gate has to know about a model; kept as JSON in the model's run.

    Attributes:
        rows: Number of test rows.
        calibration_error: As in `evaluation.calibration_error`.
        groups: The rows of `evaluation.group_rates`.
        folds: What names the folds, `evaluation.fold_scores(...).attrs`; empty if there are no fold scores.
        fold_auc: Area under the ROC curve of each fold, in the folds' order.
    """

    rows: int
    calibration_error: float
    groups: list[dict[str, Any]]
    folds: dict[str, int]
    fold_auc: list[float]

    @property
    def worst_group(self) -> dict[str, Any]:
        """The group with the lowest true positive rate, of those with enough high earners to tell."""
        enough = [group for group in self.groups if group["positives"] >= RULES["worst_group"]["min_positives"]]
        return min(enough or self.groups, key=lambda group: float(group["true_positive_rate"]))


def evaluate(model: Pipeline, test: pd.DataFrame, frame: pd.DataFrame, *, seed: int = 42) -> Evaluation:
    """Evaluate a model as notebook 3 does, folds included, which takes seconds.

    Args:
        model: A pipeline of `modeling.make_pipeline`, fitted without the test rows.
        test: The rows held back, with the target.
        frame: All rows, with the target.
        seed: Number that fixes the folds; two models can be compared only if theirs is the same.
    """
    scores = fold_scores({"model": model.named_steps["estimator"]}, frame, seed=seed)
    folds = {str(key): int(value) for key, value in scores.attrs.items()}
    return _evaluation(model, test, folds, scores["model"].tolist())


def evaluate_serving(model: Pipeline, test: pd.DataFrame, frame: pd.DataFrame, *, like: Evaluation) -> Evaluation:
    """Evaluate the model that serves, as it is, on the rows and folds of a challenger of a later time.

    Args:
        model: The fitted pipeline that serves.
        test: The challenger's test rows.
        frame: All of the challenger's rows.
        like: The challenger's evaluation.
    """
    return _evaluation(model, test, like.folds, fitted_fold_scores(model, frame, like=like.folds))


def _evaluation(model: Pipeline, test: pd.DataFrame, folds: dict[str, int], fold_auc: list[float]) -> Evaluation:
    probability = probabilities(model, test)
    rates = group_rates(test, probability)
    return Evaluation(
        rows=len(test),
        calibration_error=calibration_error(labels(test), probability),
        groups=[{str(key): value for key, value in row.items()} for row in rates.to_dict("records")],
        folds=folds,
        fold_auc=fold_auc,
    )


def log(evaluation: Evaluation, *, champion: tuple[str, Evaluation] | None = None) -> None:
    """Write an evaluation to the active run: as JSON for the gate, its main figures as metrics for readers.

    Args:
        evaluation: The evaluation of the run's model.
        champion: The run of the version that serves and its evaluation on the same rows, where its own were others.
    """
    mlflow.log_dict(asdict(evaluation), FILE)
    if champion is not None:
        mlflow.log_dict({"run_id": champion[0], **asdict(champion[1])}, RIVAL_FILE)
    worst = evaluation.worst_group["true_positive_rate"]
    figures = {"calibration_error": evaluation.calibration_error, "worst_group_recall": worst}
    mlflow.log_metrics({f"evaluation_{name}": float(value) for name, value in figures.items()})


def read(run_id: str) -> Evaluation:
    """Read the evaluation of a run.

    Raises:
        RegistryError: The run was not evaluated.
    """
    try:
        return Evaluation(**load_json(run_id, FILE))
    except (TypeError, ValueError) as error:
        raise RegistryError(f"run {run_id} has no evaluation; run notebook 03_evaluate_models") from error


def read_champion(run_id: str, champion_run: str) -> Evaluation | None:
    """Read what a run says of the version that served when it was trained; none if it says nothing of that version."""
    try:
        found = load_json(run_id, RIVAL_FILE)
        return Evaluation(**found) if found.pop("run_id") == champion_run else None
    except (TypeError, ValueError, KeyError):
        return None


def load_json(run_id: str, file: str) -> dict[str, Any]:
    """Call `mlflow.artifacts.load_dict`, which asks for a file that is not there for half a minute: then give `{}`."""
    if file not in [entry.path for entry in mlflow.MlflowClient().list_artifacts(run_id)]:
        return {}
    return dict(mlflow.artifacts.load_dict(f"runs:/{run_id}/{file}"))


def check(challenger: Evaluation, champion: Evaluation | None) -> tuple[list[str], str]:
    """Hold an evaluation against the rules of gate.toml.

    Args:
        challenger: The evaluation of the version that wants to become champion.
        champion: The evaluation of the one that is, if any.

    Returns:
        One sentence for each rule that it breaks, none if it passes; and the figures that were compared.
    """
    worst, error = challenger.worst_group, challenger.calibration_error
    rate = float(worst["true_positive_rate"])
    figures = f"calibration error {error:.4f}, true positive rate of the worst group ({worst['group']}) {rate:.3f}"
    broken = []
    if error > (most := RULES["calibration"]["at_most"]):
        broken.append(f"calibration error {error:.4f} is above {most}")
    if rate < (least := RULES["worst_group"]["at_least"]):
        broken.append(f"true positive rate {rate:.3f} of {worst['group']} is below {least}")
    if champion is None:
        return broken, figures
    loss = float(champion.worst_group["true_positive_rate"]) - rate
    if loss > (most := RULES["worst_group_loss"]["at_most"]):
        broken.append(f"its worst group is {loss:.3f} below the champion's, more than {most}")
    if not challenger.folds or challenger.folds != champion.folds:
        return [*broken, "it was not scored on the champion's folds, so the two cannot be compared"], figures
    difference = np.array(challenger.fold_auc) - np.array(champion.fold_auc)
    mean, low, high = paired_interval(difference, folds=challenger.folds["folds"])
    lead = f"lead in AUC {mean:+.4f} ({low:+.4f} to {high:+.4f})"
    if low <= (bound := RULES["lead"]["above"]):
        broken.append(f"{lead} is not clearly above {bound}")
    return broken, f"{lead}, {figures}"
