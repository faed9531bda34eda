"""The rule by which a challenger becomes champion: no server needed."""

from __future__ import annotations

import pytest
from mlflow.entities.model_registry import ModelVersion, ModelVersionTag

from mlplatform import registry


def version(number: int, test_data: str = "s3://b/testing-1.parquet") -> ModelVersion:
    return ModelVersion("m", str(number), 0, run_id=str(number), tags=[ModelVersionTag(registry.TEST_DATA, test_data)])


@pytest.fixture(autouse=True)
def scores(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"1": 0.880, "2": 0.8805, "3": 0.884, "4": 0.870}
    monkeypatch.setattr(registry, "_score", lambda entry, metric: known[entry.version])


def judge(challenger: ModelVersion, champion: ModelVersion | None) -> registry.Promotion:
    return registry._judge(challenger, champion, metric=registry.METRIC, margin=0.001)


def test_the_first_version_becomes_champion() -> None:
    assert judge(version(4), None).promoted


def test_a_lead_beyond_the_margin_is_promoted() -> None:
    outcome = judge(version(3), version(1))
    assert outcome.promoted
    assert outcome.over == 1
    assert "+0.0040" in outcome.reason


@pytest.mark.parametrize("challenger", [2, 4])
def test_a_lead_within_the_margin_or_none_is_not_promoted(challenger: int) -> None:
    assert not judge(version(challenger), version(1)).promoted


def test_a_better_score_on_other_test_rows_is_not_promoted() -> None:
    outcome = judge(version(3, "s3://b/testing-2.parquet"), version(1))
    assert not outcome.promoted
    assert "other rows" in outcome.reason


def test_the_champion_does_not_challenge_itself() -> None:
    outcome = judge(version(1), version(1))
    assert not outcome.promoted
    assert "champion already" in outcome.reason
