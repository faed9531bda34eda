"""What an endpoint needs: the champion compiled for one row, one fast read of online features, a watch on the alias.

It knows no web framework; `mlplatform_serving` puts a BentoML service in front of it.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import redis
import xgboost
from sklearn.pipeline import Pipeline

from mlplatform import modeling, objectstore, registry, releases, tracking
from mlplatform.endpoint_log import EndpointLog
from mlplatform.errors import CredentialsError, PlatformError, RegistryError, ServiceDownError
from mlplatform.feature_client import SERVICE, checked_users
from mlplatform.history import RENAMED, USER_ID
from mlplatform.income import COLUMNS
from mlplatform.registry import CHAMPION, MODEL_NAME
from mlplatform.releases import Release

# Eight raw categories, in the order of `COLUMNS`.
Row = Sequence[str]
Scorer = Callable[[Sequence[Row]], list[float]]
Notify = Callable[[str], None]

# A category that no training row has: the encoder sets no column for it, and so must the table.
_NEVER_SEEN = "never seen"


class CompiledModel:
    """A pipeline of encoder and XGBoost as a table from category to column and the booster on an array.

    The pipeline takes 15 to 20 ms for one row, nearly all of it in pandas. This takes a fraction of a millisecond.

    Args:
        pipeline: A fitted pipeline of `modeling.make_pipeline` whose estimator is an `XGBClassifier`.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        described = modeling.describe_encoder(pipeline)
        column = {name: index for index, name in enumerate(described["columns"])}
        self._width = len(column)
        self._tables = [
            {category: column[f"{name}_{category}"] for category in described["categories"][name]} for name in COLUMNS
        ]
        self._booster: xgboost.Booster = pipeline.named_steps["estimator"].get_booster().copy()
        # For one row, starting threads costs more than they save.
        self._booster.set_param({"nthread": 1})

    def __call__(self, rows: Sequence[Row]) -> list[float]:
        """Give each row's probability."""
        encoded = np.zeros((len(rows), self._width), dtype=np.float32)
        for index, row in enumerate(rows):
            for table, category in zip(self._tables, row, strict=True):
                place = table.get(category)
                if place is not None:
                    encoded[index, place] = 1.0
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
        frame = pd.DataFrame(list(rows), columns=list(COLUMNS))
        answers: list[float] = modeling.probabilities(self._pipeline, frame).tolist()
        return answers


@dataclass(frozen=True)
class ServedModel:
    """One version of the registered model, ready to answer.

    Attributes:
        name: The registered model.
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
        reference: All rows that the model's run logged as its reference, with the columns `COLUMNS`.

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


def _probe_rows(reference: pd.DataFrame) -> list[list[str]]:
    """Give every distinct reference row, and the first of them with each column never seen in turn."""
    distinct: list[list[str]] = modeling.inputs(reference).drop_duplicates().to_numpy().tolist()
    first = distinct[0] if distinct else [_NEVER_SEEN] * len(COLUMNS)
    strange = [[*first[:place], _NEVER_SEEN, *first[place + 1 :]] for place in range(len(COLUMNS))]
    return [*distinct, *strange]


def load(alias: str = CHAMPION, *, name: str = MODEL_NAME) -> ServedModel:
    """Load the version that holds an alias by `registry.load_model`, with all checks of it, and compile it.

    Raises:
        RegistryError: As in `registry.load_model`; or the alias moved again and again meanwhile.
        MissingObjectError: The reference rows that the version's run logged are gone.
    """
    for _ in range(3):
        before = registry.find(alias, name=name)
        pipeline = registry.load_model(alias, name=name)
        after = registry.find(alias, name=name)
        # `load_model` does not say which version it loaded.
        if before is not None and after is not None and before.version == after.version:
            reference = _reference(str(after.run_id))
            score, compiled, remark = compile_model(pipeline, reference)
            return ServedModel(name, int(after.version), SERVICE, score, compiled, remark)
    raise RegistryError(f"alias {alias!r} of {name!r} moves faster than a version loads; wait, and try again")


def _reference(run_id: str) -> pd.DataFrame:
    logged = [entry.uri for entry in tracking.data_sets(mlflow.get_run(run_id)) if entry.context == "reference"]
    if len(logged) != 1:
        raise RegistryError(f"run {run_id} logged {len(logged)} reference data sets, not one; run notebook 02 again")
    return objectstore.read_frame(logged[0])


@dataclass(frozen=True)
class OnlineRow:
    """What the online store holds of one user.

    Attributes:
        row: The eight raw categories in the order of `COLUMNS`; none when the store does not hold all of them.
        oldest: The event time of the oldest of its features, in seconds since 1970; 0 when there is none.
    """

    row: Row | None
    oldest: float


class OnlineReader:
    """Reads the features of a service for several users in one round trip.

    Feast's `get_online_features` takes 20 ms of CPU. This sends the same `HMGET`s in one pipeline, without Feast's
    registry, frames and protobuf answers in between; a test holds it equal to Feast's own answer for every user.

    Args:
        store: Feast's store, which says where the values lie.
        service: The name of the feature service.
        url: The online store as a URL.
        timeout_s: How long the store may take, in seconds.

    Raises:
        RegistryError: There is no such service, or it lacks one of the columns.
    """

    def __init__(self, store: Any, service: str, url: str, *, timeout_s: float = 2.0) -> None:
        from feast.errors import FeastObjectNotFoundException
        from feast.infra.online_stores.helpers import _mmh3
        from feast.protos.feast.types.Value_pb2 import Value

        self._value: Any = Value
        self._project = store.project
        try:
            projections = store.get_feature_service(service).feature_view_projections
        except FeastObjectNotFoundException as error:
            raise RegistryError(f"{error}; run 'make features'") from error
        where = {entry.name: view.name_to_use() for view in projections for entry in view.features}
        missing = [column for column in COLUMNS if RENAMED.get(column, column) not in where]
        if missing:
            raise RegistryError(f"the feature service {service!r} lacks {', '.join(missing)}; run 'make features'")
        names = [RENAMED.get(column, column) for column in COLUMNS]
        views = sorted({where[name] for name in names})
        self._fields: list[Any] = [_mmh3(f"{where[name]}:{name}") for name in names]
        self._fields += [f"_ts:{view}" for view in views]
        self._client = redis.Redis.from_url(url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s)
        self._address = url.rpartition("@")[2]

    def read(self, users: Sequence[str]) -> list[OnlineRow]:
        """Read what the store holds of some users, in the order asked.

        Raises:
            DataError: No user was asked about, or an id is no text.
            ServiceDownError: The online store does not answer.
            CredentialsError: It refuses the password.
        """
        pipe = self._client.pipeline(transaction=False)
        for user in checked_users(users):
            pipe.execute_command("HMGET", _key(user, self._project), *self._fields)  # type: ignore[no-untyped-call]
        try:
            return [self._decode(values) for values in pipe.execute()]
        except redis.AuthenticationError as error:
            raise CredentialsError(
                f"the online store at {self._address} refuses the credentials; check REDIS_CONNECTION_STRING"
            ) from error
        except redis.RedisError as error:
            raise ServiceDownError(
                f"the online store at {self._address} does not answer; run 'make up', then 'make status'"
            ) from error

    def _decode(self, values: Sequence[bytes | None]) -> OnlineRow:
        from google.protobuf.timestamp_pb2 import Timestamp  # type: ignore[import-untyped]

        stored, moments = values[: len(COLUMNS)], values[len(COLUMNS) :]
        if any(moment is None for moment in moments) or any(value is None for value in stored):
            return OnlineRow(None, 0.0)
        row = [self._value.FromString(value).string_val for value in stored]
        seconds = [Timestamp.FromString(moment) for moment in moments if moment is not None]
        return OnlineRow(row, min(moment.seconds + moment.nanos / 1e9 for moment in seconds))


def _key(user: str, project: str) -> bytes:
    """Give the key of a user's hash, as Feast's `serialize_entity_key` of version 3 makes it for one text key."""
    name, value = USER_ID.encode(), user.encode()
    head = b"".join(number.to_bytes(4, "little") for number in (1, _STRING, len(name)))
    return b"".join(
        (head, name, _STRING.to_bytes(4, "little"), len(value).to_bytes(4, "little"), value, project.encode())
    )


_STRING = 2  # feast.protos.feast.types.Value_pb2.ValueType.STRING


@dataclass
class Follower:
    """Keeps the models that answer in step with the registry, in a thread of its own.

    A version is loaded, checked and compiled beside the one that answers, and one reference is swapped; so no
    request waits. When the registry does not answer, or the new version cannot be loaded, the old one goes on.

    Attributes:
        name: The registered model.
        every_s: How often to look, in seconds.
        notify: Called with a line when something changes.
        current: The model that answers; none until there is one.
        challenger: The model that is being released; none if there is none.
        release: Which versions answer, and how.
        problem: Why there is none, or why a newer version is not used; empty when all is well.
    """

    name: str = MODEL_NAME
    every_s: float = 0.5
    notify: Notify = lambda _: None
    current: ServedModel | None = None
    challenger: ServedModel | None = None
    release: Release = field(default_factory=lambda: Release(None))
    problem: str = ""
    _stop: threading.Event = field(default_factory=threading.Event, repr=False)
    _loaded: dict[int, ServedModel] = field(default_factory=dict, repr=False)

    def look(self) -> None:
        """Look once which versions are to answer, and follow."""
        try:
            release = releases.read(name=self.name)
            if release.champion is None:
                raise RegistryError(f"no alias {CHAMPION!r} on {self.name!r}; run 'make run'")
            self.current = self._model(CHAMPION, release.champion, self.current)
            # First the model and then the way: a request in between is answered by the champion.
            if release.challenger is None:
                self.release, self.challenger = release, None
            else:
                self.challenger = self._model(releases.CHALLENGER, release.challenger, self.challenger)
                self.release = release
            self._say("")
        except PlatformError as error:
            self._say(str(error))

    def _model(self, alias: str, version: int, held: ServedModel | None) -> ServedModel:
        if held is not None and held.version == version:
            return held
        model = self._loaded.get(version) or load(alias, name=self.name)
        # The last few stay, so that a promotion or a roll-back takes no time.
        self._loaded = dict(
            [*((key, known) for key, known in self._loaded.items() if known is not model), (model.version, model)][-4:]
        )
        self.notify(f"version {model.version} of {model.name} answers as {alias}: {model.remark}")
        return model

    def _say(self, problem: str) -> None:
        if problem and problem != self.problem:
            self.notify(f"waiting: {problem}")
        self.problem = problem

    def watch(self) -> None:
        """Look again and again, until `stop`."""
        while not self._stop.is_set():
            started = time.monotonic()
            self.look()
            self._stop.wait(max(0.0, self.every_s - (time.monotonic() - started)))

    def start(self) -> None:
        """Look once, then watch in a thread."""
        self.look()
        threading.Thread(target=self.watch, name="follower", daemon=True).start()

    def stop(self) -> None:
        """End the watch."""
        self._stop.set()


@dataclass(frozen=True)
class Prediction:
    """One answer.

    Attributes:
        score: The probability of an income above 50,000 dollars; none for a user who is not known.
        reason: Why there is no score.
        version: The version of the model that answered, or would have.
        oldest: The event time of the oldest feature used, in seconds since 1970; 0 when none came from the store.
    """

    score: float | None
    reason: str | None
    version: int
    oldest: float = 0.0


UNKNOWN_USER = "the online store holds no features of this user"


class Predictor:
    """Answers for people and for users with the model that holds the alias now.

    Args:
        follower: Gives the models.
        open_reader: Opens the reader of online features; tried again after it failed.
        log: Takes what was asked and answered.
        shadow_log: Takes what the challenger would have answered.
    """

    def __init__(
        self,
        follower: Follower,
        open_reader: Callable[[], OnlineReader],
        log: EndpointLog | None = None,
        shadow_log: EndpointLog | None = None,
    ) -> None:
        self._follower = follower
        self._open_reader = open_reader
        self._reader: OnlineReader | None = None
        self._log, self._shadow_log = log, shadow_log
        self._shadows: queue.Queue[tuple[Sequence[Row], list[float], int]] = queue.Queue(maxsize=1_000)
        self.compared, self.greatest_difference, self.not_mirrored = 0, 0.0, 0

    def start(self) -> None:
        """Load the models, follow the registry from now on, and write the logs."""
        self._follower.start()
        for log in (self._log, self._shadow_log):
            if log is not None:
                log.start()
        threading.Thread(target=self._mirror, name="shadow", daemon=True).start()

    def stop(self) -> None:
        """End the watch, and write what is left of the logs."""
        self._follower.stop()
        for log in (self._log, self._shadow_log):
            if log is not None:
                log.stop()

    @property
    def not_logged(self) -> int:
        """How many rows the log had no room for."""
        return self._log.dropped if self._log is not None else 0

    @property
    def problem(self) -> str:
        """Why no model answers yet; empty when one does."""
        return "" if self._follower.current else self._follower.problem or "the model is being loaded"

    @property
    def model(self) -> ServedModel:
        """The model that answers now.

        Raises:
            ServiceDownError: There is none yet.
        """
        if self._follower.current is None:
            raise ServiceDownError(f"no model answers yet: {self.problem}")
        return self._follower.current

    def reader(self) -> OnlineReader:
        """Give the reader, and open it the first time.

        Raises:
            PlatformError: It cannot be opened; the message says why.
        """
        if self._reader is None:
            self._reader = self._open_reader()
        return self._reader

    def people(self, rows: Sequence[Row]) -> tuple[ServedModel, list[Prediction]]:
        """Answer for people, each given by the eight raw categories in the order of `COLUMNS`.

        Raises:
            ServiceDownError: There is no model yet.
        """
        model = self.model
        scores = model.score(rows)
        self._note(rows, scores, model)
        return model, [Prediction(score, None, model.version) for score in scores]

    def users(self, users: Sequence[str]) -> tuple[ServedModel, list[Prediction]]:
        """Answer for users by their online features; an unknown user gets no score, and the reason.

        Raises:
            ServiceDownError: There is no model yet, or the online store does not answer.
            RegistryError: There are no features yet.
        """
        model = self.model
        found = self.reader().read(users)
        release, challenger = self._follower.release, self._follower.challenger
        share = release.share if challenger is not None and release.mode == releases.CANARY else 0.0
        predictions = [Prediction(None, UNKNOWN_USER, model.version)] * len(users)
        for answering, mine in ((model, False), (challenger, True)):
            places = [
                (place, entry.row)
                for place, (user, entry) in enumerate(zip(users, found, strict=True))
                if entry.row is not None and releases.in_canary(user, share) is mine
            ]
            if answering is None or not places:
                continue
            rows = [row for _, row in places]
            scores = answering.score(rows)
            self._note(rows, scores, answering)
            for (place, _), score in zip(places, scores, strict=True):
                predictions[place] = Prediction(score, None, answering.version, found[place].oldest)
        return model, predictions

    def _note(self, rows: Sequence[Row], scores: list[float], model: ServedModel) -> None:
        if self._log is not None:
            for row, score in zip(rows, scores, strict=True):
                self._log.add((*row, model.version, score))
        if self._follower.release.mode == releases.SHADOW:
            try:
                self._shadows.put_nowait((rows, scores, model.version))
            except queue.Full:
                # Requests are never held up by their shadow.
                self.not_mirrored += 1

    def _mirror(self) -> None:
        while True:
            self._compare(*self._shadows.get())

    def _compare(self, rows: Sequence[Row], scores: list[float], version: int) -> None:
        """Ask the challenger what the champion was asked, and log both answers."""
        challenger = self._follower.challenger
        if challenger is None:
            return
        others = challenger.score(rows)
        for row, score, other in zip(rows, scores, others, strict=True):
            self.compared += 1
            self.greatest_difference = max(self.greatest_difference, abs(score - other))
            if self._shadow_log is not None:
                self._shadow_log.add((*row, version, score, challenger.version, other))
