"""What notebook 9 found when it asked the running endpoint, held against what the core notebooks made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlplatform import results
from mlplatform.settings import Settings
from mlplatform_ops import runner
from mlplatform_ops.embedded.platform import EmbeddedPlatform

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "09_serve_model.ipynb"


@pytest.fixture(scope="module")
def served(
    executed: dict[str, Path], embedded: EmbeddedPlatform, platform: Settings, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """The notebook's results; the platform's own endpoint runs, as `make run-all` starts it."""
    embedded.up(also=runner.services(NOTEBOOK))
    (execution,) = runner.run_all([NOTEBOOK], tmp_path_factory.mktemp("notebooks"))
    assert execution.error == ""
    return results.read_results(execution.executed)


def test_the_endpoint_answered_everybody_with_the_champion_of_notebook_4(
    served: dict[str, Any], executed: dict[str, Path]
) -> None:
    assert served["model_version"] == results.read_results(executed["04_register_model"])["champion"]
    assert (served["compared_people"], served["compared_users"]) == (500, 2_000)


def test_the_endpoint_refused_what_it_must_refuse(served: dict[str, Any]) -> None:
    assert served["statuses"] == {"no token": 401, "a pickle": 415, "a null": 400, "too much": 413}


def test_the_compiled_model_is_used_and_costs_less_than_the_pipeline(served: dict[str, Any]) -> None:
    assert served["compiled"]
    assert served["cpu_ms"]["compiled"] < served["cpu_ms"]["pipeline"]


def test_an_endpoint_that_is_down_is_named_in_the_notebook_with_what_starts_it(
    executed: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODEL_ENDPOINT_URL", "http://127.0.0.1:9")
    (execution,) = runner.run_all([NOTEBOOK], tmp_path)
    assert (
        "ServiceDownError: the endpoint at http://127.0.0.1:9 does not answer; run 'make serve-model'"
        in execution.error
    )
