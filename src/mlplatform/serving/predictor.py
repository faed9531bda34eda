"""Answers for people and users with the model that holds the alias now, and follows the alias."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from mlplatform import table
from mlplatform.errors import PlatformError, RegistryError, ServiceDownError
from mlplatform.registry import CHAMPION
from mlplatform.serving import releases
from mlplatform.serving.endpoint_log import EndpointLog
from mlplatform.serving.online_reader import OnlineReader
from mlplatform.serving.releases import Release
from mlplatform.serving.served_model import Row, ServedModel, load

Notify = Callable[[str], None]


@dataclass
class Follower:
    """Keeps the models that answer in step with the registry, in a thread of its own.

    A version is loaded, checked and compiled beside the one that answers, and one reference is swapped; so no
    request waits. When the registry does not answer, or the new version cannot be loaded, the old one goes on.

    Attributes:
        name: The registered model, by default the table's.
        every_s: How often to look, in seconds.
        notify: Called with a line when something changes.
        current: The model that answers; none until there is one.
        challenger: The model that is being released; none if there is none.
        release: Which versions answer, and how.
        problem: Why there is none, or why a newer version is not used; empty when all is well.
    """

    name: str = field(default_factory=lambda: table.current().model)
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
        except Exception as error:
            # Whatever a damaged registry answers: a watch that ended here would follow nothing any more.
            self._say(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")

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
        score: The probability of the positive class; none for a user who is not known.
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
        """How many rows the log and the shadow's log had no room for."""
        return sum(log.dropped for log in (self._log, self._shadow_log) if log is not None)

    @property
    def problem(self) -> str:
        """Why no model answers yet; empty when one does."""
        return "" if self._follower.current else self._follower.problem or "the model is being loaded"

    @property
    def version(self) -> int:
        """The version of the champion that is loaded; 0 while there is none."""
        return self._follower.current.version if self._follower.current else 0

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
        """Answer for people, each given by the raw columns in the order of the description.

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
