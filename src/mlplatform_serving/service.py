"""The BentoML service: what is asked and answered, and nothing of how.

Its name is what BentoML's own tools take: `mlplatform_serving.service:IncomeEndpoint`.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from functools import cache
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any

import bentoml
from pydantic import BaseModel, ConfigDict, Field, create_model
from starlette.responses import JSONResponse, Response

from mlplatform import table
from mlplatform.errors import PlatformError
from mlplatform.serving import endpoint_log
from mlplatform.serving.endpoint_log import EndpointLog
from mlplatform.serving.online_reader import OnlineReader
from mlplatform.serving.predictor import Follower, Prediction, Predictor
from mlplatform.serving.served_model import ServedModel
from mlplatform_serving import metrics

TABLE = table.current()
MODEL = TABLE.model  # the registered model that is served; set before the application is made
LOG = endpoint_log.FOLDER  # where rows and scores are logged; the shadow's beside it
MOST_ROWS = 1_000
Category = Annotated[str, Field(min_length=1, max_length=100)]
KINDS = {"category": Category, "number": Annotated[float, Field(allow_inf_nan=False)]}
_fields: dict[str, Any] = {
    TABLE.features[column]: (KINDS[kind], Field(alias=column)) for column, kind in TABLE.kinds.items()
}
_PERSON = "The raw columns of one person, under the names that the table's file gives them."
Person: Any = create_model("Person", __config__=ConfigDict(extra="forbid"), __doc__=_PERSON, **_fields)
_POSITIVE = f"{TABLE.target.column} is {TABLE.target.positive}"
_row = attrgetter(*_fields)


class Score(BaseModel):
    """The answer for one person or user."""

    score: float | None = Field(description=f"Probability that {_POSITIVE}; null when not known")
    reason: str | None = Field(description="Why there is no score")
    model_version: int = Field(description="The version of the model that answered")


class Answer(BaseModel):
    """The answer to one request, in the order asked."""

    model: str
    model_version: int = Field(description="The version that holds the alias")
    feature_service: str = Field(description="The feature service whose features the model takes")
    predictions: list[Score]


@bentoml.service(name="income", workers=1, metrics={"enabled": False}, logging={"access": {"enabled": False}})
class IncomeEndpoint:
    """Probability of the positive class, as data/table.toml names it."""

    def __init__(self) -> None:
        self._predictor = predictor()
        metrics.follow(self._predictor)
        self._predictor.start()

    @bentoml.on_shutdown
    def stop(self) -> None:
        """Write what is left of the logs."""
        self._predictor.stop()

    @bentoml.api
    async def predict(self, people: Annotated[list[Person], Field(min_length=1, max_length=MOST_ROWS)]) -> Answer:
        """Score people by their raw columns."""
        answer: Answer = self._answer(lambda: self._predictor.people([_row(person) for person in people]))
        return answer

    @bentoml.api
    async def predict_users(
        self, users: Annotated[list[Category], Field(min_length=1, max_length=MOST_ROWS)]
    ) -> Answer:
        """Score users by their online features; one who is not known gets null, and the reason."""
        answer: Answer = await asyncio.to_thread(self._answer, lambda: self._predictor.users(users))
        return answer

    def _answer(self, ask: Any) -> Any:
        try:
            model, predictions = ask()
        except PlatformError as error:
            return JSONResponse({"detail": str(error)}, 503)
        metrics.count(predictions)
        return _encode(model, predictions)


def _encode(model: ServedModel, predictions: Sequence[Prediction]) -> Response:
    # A dictionary is written in a fifth of the time that a model of pydantic takes to be made, checked and written.
    return JSONResponse(
        {
            "model": model.name,
            "model_version": model.version,
            "feature_service": model.service,
            "predictions": [
                {"score": entry.score, "reason": entry.reason, "model_version": entry.version} for entry in predictions
            ],
        }
    )


@cache
def predictor() -> Predictor:
    """Give the one predictor of this process."""

    def say(line: str) -> None:
        print(line, flush=True)  # noqa: T201 - the server's log

    return Predictor(
        Follower(name=MODEL, notify=say),
        _open_reader,
        EndpointLog(LOG, notify=say) if LOG else None,
        EndpointLog(f"{LOG}-shadow", endpoint_log.shadowed(), notify=say) if LOG else None,
    )


def _open_reader() -> OnlineReader:
    from mlplatform.features import open_store
    from mlplatform.settings import find_settings

    repo = os.environ.get("MLPLATFORM_FEATURE_REPO")
    return OnlineReader(open_store(Path(repo) if repo else None), TABLE.service, find_settings().redis_url)


def application() -> Any:
    """Make the service's ASGI application."""
    service: Any = IncomeEndpoint  # the decorator made a bentoml.Service of it
    return service.to_asgi()
