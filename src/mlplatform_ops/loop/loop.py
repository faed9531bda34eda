"""The nine steps of the loop, told as they go.

Everything here is this loop's own: a registered model that starts with a copy of the champion, an endpoint, a folder in
the object store. The platform's champion, its endpoint and its logs are left alone.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import mlflow
import requests
from xgboost import XGBClassifier

from mlplatform import history, income, modeling, objectstore, registry, table, tracking
from mlplatform.errors import ServiceDownError
from mlplatform.monitoring import drift_watch
from mlplatform.promotion import alias, gate
from mlplatform.serving import releases
from mlplatform.settings import DATASETS_BUCKET, find_root
from mlplatform_ops.console import Notify
from mlplatform_ops.loop import evidence
from mlplatform_ops.loop.evidence import Record
from mlplatform_ops.loop.traffic import LoopError, Traffic, failed, flipped
from mlplatform_ops.loop.world import COLUMN, World
from mlplatform_ops.ports import HOST, free_port

FOLDER = f"s3://{DATASETS_BUCKET}/loop"
READY_TIMEOUT_S = 600.0  # far beyond what is needed, even where much else runs
ROUNDS = 3  # how often each user is asked, at least, while the canary answers


@dataclass(frozen=True)
class Sizes:
    """How much a loop does.

    Attributes:
        requests: How many questions are asked meanwhile, at least.
        batch_rows: Rows of each batch.
        users: How many users ask.
        share: The canary's share of them.
    """

    requests: int = 5_000
    batch_rows: int = 5_000
    users: int = 200
    share: float = 0.1


@dataclass
class Journal:
    """Tells each step as it begins and ends, and keeps when.

    Attributes:
        notify: Called with a line.
        steps: Name, beginning and end of each step so far, in seconds since 1970.
    """

    notify: Notify
    steps: list[tuple[str, float, float]] = field(default_factory=list)

    @contextmanager
    def step(self, name: str, title: str, traffic: Traffic | None = None) -> Iterator[Callable[[str], None]]:
        """Tell one step; what is yielded takes what it found."""
        if traffic is not None:
            traffic.step = name
        self.notify(f"{len(self.steps) + 1}. {title}")
        began = time.time()
        yield lambda line: self.notify(f"   {line}")
        self.steps.append((name, began, time.time()))
        self.notify(f"   {self.steps[-1][2] - began:.1f} s")


def run(seed: int, command: Callable[[Sequence[str]], int], *, sizes: Sizes = Sizes(), notify: Notify) -> str:
    """Go through the loop once.

    Args:
        seed: Decides whom it draws, and which occupation booms.
        command: Runs a command of `mlplatform_ops`, given as its words.
        sizes: How much it does.
        notify: Called with a line for each step and what it found.

    Returns:
        The folder with the evidence.

    Raises:
        RegistryError: There is no champion.
        LoopError: A step did not go as it must.
    """
    return _Loop(seed, command, sizes, notify).run()


class _Loop:
    def __init__(self, seed: int, command: Callable[[Sequence[str]], int], sizes: Sizes, notify: Notify) -> None:
        self.command, self.sizes, self.notify, self.seed = command, sizes, notify, seed
        table.current().only_census("make loop")
        self.origin = registry.require()
        self.name = f"income-loop-{datetime.now(UTC):%Y%m%dT%H%M%S}-{seed}"
        self.folder = f"{FOLDER}/{self.name}"
        frame = income.read_income()
        self.world = World(frame, seed)
        self.users = history.build_history(frame)[history.USER_ID].drop_duplicates().sample(
            sizes.users, random_state=seed % 2**32
        ).tolist()  # fmt: skip
        self.journal = Journal(notify)
        self.versions: dict[str, int] = {}
        self.batches: dict[str, str] = {}
        self.drift_runs: dict[str, str] = {}

    def run(self) -> str:
        journal = self.journal
        title = "The champion answers"
        with journal.step("champion", title) as say:
            version = registry.register(str(self.origin.run_id), name=self.name)
            self._must(registry.promote(version, name=self.name).promoted, "the champion's copy was not promoted")
            self.versions["champion"] = version
            endpoint = _Endpoint(self.name, f"{self.folder}/endpoint")
            say(f"version {self.origin.version} of {self.origin.name} is version {version} of {self.name}")
        with endpoint as url:
            traffic = Traffic(url, os.environ["MODEL_ENDPOINT_TOKEN"], self.users)
            traffic.step = "champion"
            traffic.start()
            try:
                self._steps(traffic, url)
            finally:
                traffic.stop()
        asked = traffic.frame()
        with journal.step("evidence", "The evidence") as say:
            record = Record(
                self.name, self.seed, self.sizes.share, self.versions, self.batches, self.drift_runs,
                self.window, list(journal.steps),
            )  # fmt: skip
            evidence.write(record, asked, self.folder)
            lost = failed(asked)
            first = lost[["status", "began_in"]].head(1).to_dict("records")
            self._must(
                lost.empty, f"{len(lost)} of {len(asked)} questions failed, the first one: {first}; see {self.folder}"
            )
            say(f"{len(asked):,} questions of {len(self.users)} users answered, none failed, nobody flipped")
            say(f"{self.folder}/{evidence.EVIDENCE}")
        return self.folder

    def _steps(self, traffic: Traffic, url: str) -> None:
        step = self.journal.step
        with step("equal", "An equal batch arrives", traffic) as say:
            watched = self._watch("equal", moved=False, report=False)
            say(str(watched.columns))
            self._must(not watched.alarm, f"an equal batch rang the alarm, by chance: {watched}")
        with step("shifted", "A shifted batch arrives, its labels some days later", traffic) as say:
            watched = self._watch("shifted", moved=True, report=True)
            say(str(watched.columns))
            say(str(watched.performance))
            self._must(COLUMN in watched.columns.drifted, f"the alarm does not name {COLUMN}: {watched.columns}")
        with step("retrain", "The retraining pipeline runs on the new window", traffic) as say:
            self.window = objectstore.write_frame(self.world.window(), f"{self.folder}/window.parquet")
            run_id = self._retrain(say)
        with step("gate", "The gate decides", traffic) as say:
            self.versions["retrained"] = version = registry.register(run_id, name=self.name)
            outcome = alias.ask_gate(version, name=self.name)
            say(f"version {version} {outcome.reason}")
            self._must(outcome.promoted, f"version {version} {outcome.reason}")
        with step("shadow", f"Version {version} answers in the shadow", traffic) as say:
            self._release("shadow", str(version))
            compared = self._wait_for_shadow(url)
            say(f"{compared:,.0f} answers compared, none of them sent")
        with step("canary starts", f"Version {version} answers {self.sizes.share:.0%} of the users", traffic) as say:
            self._release("canary", str(version), "--share", str(self.sizes.share))
            chosen = [user for user in self.users if releases.in_canary(user, self.sizes.share)]
            traffic.wait_for(version, users=chosen)
            traffic.step = "canary"
            self._ask(traffic, ROUNDS * len(self.users))
            traffic.step = "canary ends"
            self._must(flipped(traffic.frame(), "canary") == 0, "a user got answers of two versions")
            say(f"{len(chosen)} of {len(self.users)} users, nobody flipped")
        with step("promote", f"Version {version} is promoted", traffic) as say:
            self._release("promote")
            say(f"answers everybody after {traffic.wait_for(version):.1f} s")
        with step("rollback", "A worse model gets in by force, and is rolled back", traffic) as say:
            self._force_and_roll_back(traffic, run_id, say)
            traffic.pace_s = 0.0
            self._ask(traffic, max(0, self.sizes.requests - traffic.count))

    def _watch(self, name: str, *, moved: bool, report: bool) -> Any:
        batch = self.world.batch(self.sizes.batch_rows, moved=moved, stream=len(self.batches) + 1)
        uri = objectstore.write_frame(batch, f"{self.folder}/batch-{name}.parquet")
        truth = modeling.labels(batch).tolist()
        watched = drift_watch.watch(batch, source=uri, truth=truth, report=report, name=self.name)
        self.batches[name], self.drift_runs[name] = uri, watched.run_id
        return watched

    def _retrain(self, say: Callable[[str], None]) -> str:
        words = ["retrain", self.window, "--seed", str(self.seed), "--model", self.name]
        with subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "mlplatform_pipeline", *words],
            cwd=find_root(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            last = ""
            for line in process.stderr or ():
                last = line.strip()
                say(last)
            run_id = process.stdout.read().strip() if process.stdout else ""
        self._must(process.returncode == 0, f"the retraining failed: {last.removeprefix('error: ')}")
        return run_id

    def _force_and_roll_back(self, traffic: Traffic, run_id: str, say: Callable[[str], None]) -> None:
        frame = objectstore.read_frame(self.window)
        training, testing = income.split(frame, seed=self.seed)
        datasets = tracking.write_datasets(training, testing, frame)
        mlflow.set_experiment(experiment_id=mlflow.get_run(run_id).info.experiment_id)
        logged = tracking.fit_and_log(
            "worse", XGBClassifier(n_estimators=2, max_depth=1, n_jobs=1, random_state=self.seed % 2**31), datasets
        )
        with mlflow.start_run(run_id=logged.run_id):
            gate.log(gate.evaluate(logged.model, testing, frame))
        self.versions["worse"] = worse = registry.register(logged.run_id, name=self.name)
        outcome = registry.promote(worse, name=self.name)
        self._must(not outcome.promoted, "the gate let a worse model pass")
        say(f"version {worse} {outcome.reason}")
        # What somebody can do who has the platform's key and is in a hurry: past the gate, with nothing written down.
        client = mlflow.MlflowClient()
        alias.sign(client.get_model_version(self.name, str(worse)))
        client.set_registered_model_alias(self.name, registry.CHAMPION, str(worse))
        traffic.wait_for(worse)
        say(f"somebody moved the alias by hand: version {worse} answers everybody")
        self._release("roll-back", "it answers worse than the one before")
        seconds = traffic.wait_for(self.versions["retrained"])
        say(f"version {self.versions['retrained']} answers everybody again after {seconds:.1f} s")

    def _release(self, *words: str) -> None:
        said = ["release", *words, "--model", self.name]
        self._must(self.command(said) == 0, f"the command '{' '.join(said)}' failed")

    def _wait_for_shadow(self, url: str) -> float:
        deadline = time.monotonic() + READY_TIMEOUT_S
        while time.monotonic() < deadline:
            lines = requests.get(f"{url}/metrics", timeout=10).text.splitlines()
            compared = next(float(line.split()[1]) for line in lines if line.startswith("endpoint_shadow_compared "))
            if compared >= len(self.users):
                return compared
            time.sleep(0.2)
        raise LoopError("the shadow did not answer; see the endpoint's log")

    def _ask(self, traffic: Traffic, more: int) -> None:
        wanted, deadline = traffic.count + more, time.monotonic() + READY_TIMEOUT_S
        while traffic.count < wanted:
            self._must(time.monotonic() < deadline, "the endpoint answers too slowly; see its log")
            time.sleep(0.1)

    def _must(self, holds: bool, otherwise: str) -> None:
        if not holds:
            raise LoopError(otherwise)


class _Endpoint:
    """An endpoint of the loop's own, beside the platform's, for as long as the block runs, which gets its address.

    Args:
        name: The registered model that it serves.
        log: Where it logs what it saw.
    """

    def __init__(self, name: str, log: str) -> None:
        self._url = f"http://{HOST}:{(port := free_port())}"
        self._page: Path = find_root() / "build" / "loop-endpoint.log"
        self._page.parent.mkdir(exist_ok=True)
        with self._page.open("w") as page:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mlplatform_serving", "--port", str(port), "--model", name, "--log", log],
                cwd=find_root() / "feature_repo",
                stdout=page,
                stderr=subprocess.STDOUT,
                env={**os.environ, "MLPLATFORM_FEATURE_REPO": str(find_root() / "feature_repo")},
            )

    def __enter__(self) -> str:
        deadline = time.monotonic() + READY_TIMEOUT_S
        try:
            while self._process.poll() is None and time.monotonic() < deadline:
                with suppress(requests.RequestException):
                    if requests.get(f"{self._url}/readyz", timeout=10).ok:
                        return self._url
                time.sleep(0.1)
            raise ServiceDownError(f"the loop's endpoint does not come up; see {self._page}")
        except BaseException:  # a signal too must not leave it behind
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
