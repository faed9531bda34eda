"""The pipeline from raw categories to a probability: no server needed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import Pipeline
from sklearn.tree import DecisionTreeClassifier
from xgboost import XGBClassifier

from mlplatform import income, modeling, tracking
from mlplatform.errors import DataError

CSV = Path(__file__).parents[2] / "data" / "income_data.csv"


@pytest.fixture(scope="module")
def parts() -> tuple[pd.DataFrame, pd.DataFrame]:
    return income.split(income.read_income(CSV), seed=42)


@pytest.fixture(scope="module")
def tree(parts: tuple[pd.DataFrame, pd.DataFrame]) -> Pipeline:
    train, _ = parts
    model = modeling.make_pipeline(DecisionTreeClassifier(random_state=42))
    return model.fit(modeling.inputs(train), modeling.labels(train))


def test_the_encoder_is_fitted_on_the_training_rows_only(parts: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    train, _ = parts
    without = train[train["Native_country"] != "Holand-Netherlands"]
    encoded = modeling.make_encoder().fit(without).transform(train)
    assert not any("Holand" in column for column in encoded.columns)


def test_an_unseen_category_sets_no_column_and_is_no_error(
    tree: Pipeline, parts: tuple[pd.DataFrame, pd.DataFrame]
) -> None:
    stranger = parts[1].head(1).assign(Native_country="Atlantis")
    assert tree.named_steps["encoder"].transform(stranger).to_numpy().sum() == len(income.COLUMNS) - 1
    assert 0 <= modeling.probabilities(tree, stranger).item() <= 1


def test_one_row_is_answered_like_the_same_row_in_a_batch(
    tree: Pipeline, parts: tuple[pd.DataFrame, pd.DataFrame]
) -> None:
    batch = parts[1].head(50)
    alone = [modeling.probabilities(tree, batch.iloc[[row]]).item() for row in range(len(batch))]
    assert alone == modeling.probabilities(tree, batch).tolist()
    assert len(set(alone)) > 10


def test_the_order_of_columns_and_other_columns_do_not_matter(
    tree: Pipeline, parts: tuple[pd.DataFrame, pd.DataFrame]
) -> None:
    batch = parts[1].head(50)
    shuffled = batch[batch.columns[::-1]].assign(user_id="x")
    assert modeling.probabilities(tree, shuffled).tolist() == modeling.probabilities(tree, batch).tolist()


def test_the_encoder_is_described_in_plain_lists(tree: Pipeline) -> None:
    described = modeling.describe_encoder(tree)
    assert len(described["columns"]) == 98
    assert described["columns"][0] == "Workclass_Federal-gov"


def test_null_features_are_refused_and_not_guessed_about(
    tree: Pipeline, parts: tuple[pd.DataFrame, pd.DataFrame]
) -> None:
    unknown_user = parts[1].head(3).assign(Sex=["Male", None, None])
    with pytest.raises(DataError, match="2 of 3 rows have null features"):
        modeling.probabilities(tree, unknown_user)


def test_a_missing_column_is_named(tree: Pipeline, parts: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    with pytest.raises(DataError, match="lacks Marital-Status, Sex"):
        modeling.probabilities(tree, parts[1].drop(columns=["Marital-Status", "Sex"]))


def test_the_feature_stores_name_of_the_hyphenated_column_is_accepted(
    tree: Pipeline, parts: tuple[pd.DataFrame, pd.DataFrame]
) -> None:
    named_as_features = parts[1].rename(columns={"Marital-Status": "Marital_Status"})
    assert modeling.inputs(named_as_features).columns.tolist() == list(income.COLUMNS)
    pd.testing.assert_frame_equal(modeling.inputs(named_as_features), modeling.inputs(parts[1]))
    both = parts[1].assign(Marital_Status="ignored: the model's own name counts")
    pd.testing.assert_frame_equal(modeling.inputs(both), modeling.inputs(parts[1]))


def test_scores_are_taken_on_probabilities(tree: Pipeline, parts: tuple[pd.DataFrame, pd.DataFrame]) -> None:
    train, test = parts
    measured = modeling.scores(tree, train, test)
    assert tuple(measured) == modeling.SCORES
    answers = tree.predict_proba(test[list(income.COLUMNS)])[:, 1]
    truth = (test[income.TARGET] == ">50K").to_numpy()
    assert measured["roc_auc_score_test"] == pytest.approx(roc_auc_score(truth, answers))
    assert measured["test_accuracy"] == pytest.approx(np.mean(tree.predict(test[list(income.COLUMNS)]) == truth))
    assert measured["roc_auc_score_train"] > 0.92 > 0.85 > measured["roc_auc_score_test"]


@pytest.mark.parametrize(("version", "uri"), [(None, "models:/m"), (3, "models:/m/3")])
def test_the_address_of_a_model_names_its_version(version: int | None, uri: str) -> None:
    assert tracking.model_uri("m", version=version) == uri


def test_requirements_name_the_installed_versions_and_xgboost_only_where_it_is_used() -> None:
    plain = tracking.requirements(modeling.make_pipeline(LogisticRegression()))
    boosted = tracking.requirements(modeling.make_pipeline(XGBClassifier()))
    assert all("==" in requirement for requirement in plain)
    assert [requirement.split("==")[0] for requirement in set(boosted) - set(plain)] == ["xgboost"]
