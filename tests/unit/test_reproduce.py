from __future__ import annotations

import pytest
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from xgboost import XGBClassifier

from mlplatform_ops.reproduce import make_estimator


@pytest.mark.parametrize(
    "estimator",
    [
        RandomForestClassifier(max_features=None, n_estimators=5, max_depth=3),
        RandomForestClassifier(),
        LogisticRegression(C=0.5, class_weight=None),
        XGBClassifier(n_estimators=7, learning_rate=0.1),
    ],
)
def test_an_estimator_is_made_again_from_the_texts_that_mlflow_keeps(estimator: object) -> None:
    texts = {name: str(value) for name, value in estimator.get_params().items()}
    made = make_estimator({**texts, "estimator": type(estimator).__name__})
    assert str(made.get_params()) == str(estimator.get_params())
