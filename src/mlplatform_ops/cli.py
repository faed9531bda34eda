"""The commands behind the Makefile: `python -m mlplatform_ops COMMAND`.

Each function with `@app.command` is a command; its arguments are the options and its docstring is the help. Heavy
packages are imported inside the functions, so that a command starts fast and a mistyped one is refused at once.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, CycloptsError, Parameter

from mlplatform.clients.hastening import hasten_feast
from mlplatform.clients.waiting import limit_waiting
from mlplatform.connection import UNSUPERVISED, check_services, connect
from mlplatform.engines import EngineName
from mlplatform.engines.cluster import VARIABLE
from mlplatform.errors import NotebookError, PlatformError
from mlplatform.settings import (
    CHAMPION,
    STATE_VARIABLE,
    Settings,
    find_root,
    find_settings,
    state_folder,
)
from mlplatform_ops.cluster import commands as on_cluster
from mlplatform_ops.cluster.commands import CURRENT, Target
from mlplatform_ops.console import say, wide_console

if TYPE_CHECKING:
    from mlplatform_ops.embedded.platform import EmbeddedPlatform
    from mlplatform_ops.runner import Execution

PROGRAM = "python -m mlplatform_ops"
PlatformName = Literal["embedded", "k8s", "env"]
ALARM_STATUS = 3  # so that a schedule tells an alarm from a failure

app = App(
    name="mlplatform",
    help=(__doc__ or "").splitlines()[0],
    help_format="plaintext",
    help_formatter="plain",
    version_flags=(),
    default_parameter=Parameter(negative=()),
    result_action="return_value",
    suppress_keyboard_interrupt=False,
)
app.register_install_completion_command()
backup = App(name="backup", help="Save the platform's data to a folder, or put it back.")
app.command(backup)
workshop = App(name="workshop", help="One platform for many users, each with a Lab, kept apart from one another.")
app.command(workshop)
release = App(
    name="release", help="Release a version of the model: in the shadow, for a share of users, for all, and back."
)
app.command(release)
for command in (on_cluster.secrets, on_cluster.up, on_cluster.forward, on_cluster.status, on_cluster.down):
    app.command(command, name=f"k8s-{command.__name__}", group="Commands for a cluster")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: The command line without the program's name, `sys.argv`'s by default.

    Returns:
        The exit status: 0, 1 after an error, 2 for a command line that can't be understood, 130 after Ctrl-C. An error
        is printed as one line.
    """
    tokens = list(sys.argv[1:] if arguments is None else arguments)
    # What a command writes, such as executed notebooks, is for nobody else on this machine.
    os.umask(0o077)
    try:
        if not tokens:
            raise CycloptsError(msg="No command is given.")
        return int(app(tokens, exit_on_error=False, print_error=False) or 0)
    except CycloptsError as error:
        words = " ".join(str(error).split()).rstrip(".")
        command = " ".join([PROGRAM, *(error.command_chain or ())])
        print(f"error: {words} ('{command} --help' explains)", file=sys.stderr)
        return 2
    except PlatformError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


@app.command
def up() -> None:
    """Start the platform on this machine."""
    _embedded().up(notify=say)


@app.command
def down() -> None:
    """Stop it; nothing is lost."""
    say("stopped" if _embedded().down() else "nothing was running")


@app.command
def status() -> None:
    """Show each service, its state, URL and how long it runs."""
    from rich.table import Table

    from mlplatform_ops.embedded.platform import NOT_SUPERVISED

    table = Table("service", "state", "url", "pid", "up for", "memory")
    services = _embedded().status()
    for service in services:
        runs = service.pid > 0
        table.add_row(
            service.name,
            service.state,
            service.url,
            str(service.pid) if runs else "",
            str(timedelta(seconds=service.uptime_s)) if runs else "",
            f"{service.memory_bytes / 2**20:.0f} MiB" if runs else "",
        )
    wide_console().print(table)
    if any(service.state == NOT_SUPERVISED for service in services):
        say(UNSUPERVISED)


@app.command
def env() -> None:
    """Print the connection settings as shell exports."""
    settings = _embedded().settings
    for name, value in (settings.to_env() | {"REDIS_URL": settings.redis_url}).items():
        print(f"export {name}={shlex.quote(value)}")


@app.command
def attack() -> int:
    """Try the running platform's doors as a stranger would, and show which ones hold."""
    from rich.table import Table

    from mlplatform_ops.attack import attack

    platform = _embedded()
    listeners = platform.listeners()
    silent = {service.name: service.state for service in platform.status() if service.state != "ready"}
    authority = (platform.state / "certificates" / "ca.crt").read_text()
    attempts = attack(
        [listener for listener in listeners if listener.service not in silent],
        authority,
        Path(sys.executable).with_name("weed"),
    )
    table = Table("service", "what was tried", "answer", "holds")
    for attempt in attempts:
        table.add_row(attempt.service, attempt.door, attempt.answer, "yes" if attempt.held else "NO")
    for name, state in silent.items():
        table.add_row(name, "nothing", "not running" if state == "stopped" else state, "not tried")
    wide_console().print(table)
    if silent:
        say("what does not run was not tried; 'make serve', 'make serve-model' and 'make ui' start the rest")
    return int(not all(attempt.held for attempt in attempts))


@app.command
def clean() -> None:
    """Stop the platform and delete all of its state, and what was built."""
    import shutil

    state = state_folder()
    _embedded().clean()
    if state == state_folder(environ={}):
        shutil.rmtree(find_root() / "build", ignore_errors=True)
    say(f"deleted {state}")


@app.command
def reset() -> None:
    """Bring the platform back to the state after the last complete run; what came later is deleted."""
    from mlplatform_ops.embedded import after_run

    platform = _embedded()
    after_run.find_copy(platform.state)
    settings = platform.up(notify=say)
    say("deleting what came after the last complete run, your own experiments and data too")
    began = time.monotonic()
    try:
        say(f"{after_run.reset(platform.state, settings)}; this took {time.monotonic() - began:.1f} s")
    except KeyboardInterrupt:
        say("stopped half way; run 'make reset' again")
        raise


@app.command
def password() -> None:
    """Print MLflow's password, for the user that status and run name."""
    print(_embedded().settings.tracking_password)


@app.command
def lab() -> None:
    """Open JupyterLab on the clone at notebook 1, with what notebooks need."""
    import secrets

    from mlplatform_ops import runner
    from mlplatform_ops.ports import is_free

    root = find_root()
    chain = runner.find_notebooks(root / "notebooks")
    services = {name for path in chain for name in runner.services(path)}
    _embedded().up(also=services, notify=say).put_into(os.environ)
    os.chdir(root)
    port = next(port for port in range(8888, 8988) if is_free(port))
    token = secrets.token_urlsafe(24)
    os.environ["JUPYTER_TOKEN"] = token
    first = f"/lab/tree/notebooks/{chain[0].name}"
    say(f"JupyterLab: http://127.0.0.1:{port}{first}?token={token}")
    options = {
        "config": Path(__file__).with_name("lab_config.py"),
        "ServerApp.ip": "127.0.0.1",
        "ServerApp.port": port,
        "ServerApp.port_retries": 0,
        "ServerApp.root_dir": root,
        "LabApp.default_url": first,
    }
    flags = [f"--{name}={value}" for name, value in options.items()]
    os.execv(sys.executable, [sys.executable, "-m", "jupyterlab", *flags])  # noqa: S606


@app.command
def serve() -> None:
    """Start the Feast feature server."""
    _embedded().up(also=["feature-server"], notify=say)


@app.command
def ui() -> None:
    """Start the Feast UI, and the object store's pages beside it."""
    platform = _embedded()
    user = platform.up(also=["feast-ui"], notify=say).tracking_username
    say(f"object store: {platform.url('feast-ui')}/objects/  (user {user}; password: make password)")


@app.command
def serve_model() -> None:
    """Start the endpoint that serves the champion."""
    from mlplatform_ops.runner import require_group

    require_group("serving", what="the endpoint")
    from mlplatform.serving.model_client import readiness

    settings = _embedded().up(also=["model-endpoint"], notify=say)
    say(f"model-endpoint: {readiness(settings.to_env())}  (token: make env)")


@app.command
def features(*, platform: PlatformName = "embedded", target: Target = CURRENT, engine: EngineName = "local") -> None:
    """Register the features and materialise them to the online store.

    Args:
        platform: Where; env is the platform that the environment's variables name.
        target: Which cluster, for k8s.
        engine: Who computes; dask is the cluster that DASK_SCHEDULER_ADDRESS names, or else one of this machine.
    """
    with _platform(platform, target, ()), _workers(engine):
        from mlplatform.features import build

        build(notify=say)


@app.command
def with_dask(program: str, /, *arguments: Annotated[str, Parameter(allow_leading_hyphen=True)]) -> int:
    """Run a command with the platform and a Dask cluster of this machine, or the one that is named, in its environment.

    Args:
        program: The command; its status is returned.
        arguments: Its arguments.
    """
    with _platform("embedded", CURRENT, ()), _workers("dask"):
        return subprocess.run([program, *arguments], check=False).returncode


@app.command
def drift(
    *,
    batch: str | None = None,
    days: int | None = None,
    without_report: bool = False,
    platform: PlatformName = "embedded",
    target: Target = CURRENT,
) -> int:
    """Compare what the endpoint saw, or a batch, with the champion's training data; status 3 means an alarm.

    Args:
        batch: S3 address of a parquet file to judge; by default the endpoint's log, or else the newest batch.
        days: How far back the endpoint's log is read; all of it by default.
        without_report: Whether to do without Evidently's page, and so without Evidently.
        platform: Where; env is the platform that the environment's variables name.
        target: Which cluster, for k8s.
    """
    from mlplatform_ops.runner import require_group

    if not without_report:
        require_group("drift", what="Evidently's page")
    with _platform(platform, target, ()):
        from mlplatform.monitoring import drift_watch
        from mlplatform_ops.files import write_private

        source, rows = drift_watch.find_batch(batch, days=days)
        watched = drift_watch.watch(rows, source=source, report=not without_report)
    page = find_root() / "build" / "drift.prom"
    page.parent.mkdir(parents=True, exist_ok=True)
    write_private(page, drift_watch.prometheus_text(watched))
    say(str(watched))
    kept = drift_watch.VERDICT if without_report else drift_watch.REPORT
    say(f"run {watched.run_id} of MLflow's experiment {drift_watch.EXPERIMENT} has {kept}")
    return ALARM_STATUS if watched.alarm else 0


@app.command
def data() -> None:
    """Derive data/income_data.csv again from its source and check both checksums."""
    from mlplatform import table
    from mlplatform_ops.income_source import derive_from_package

    described = table.current()
    described.only_census("make data")
    path = described.folder / described.file
    derive_from_package(path)
    say(f"wrote {path}; both checksums are as they must be")


@app.command
def run(
    *notebooks: str,
    parameters: Annotated[Sequence[str], Parameter(name="-p", show_default=False)] = (),
    every: bool = False,
    fresh: bool = False,
    output: Path | None = None,
    platform: PlatformName = "embedded",
    target: Target = CURRENT,
    engine: EngineName = "local",
) -> int:
    """Run the notebooks in order, make the site of them, and say where to look.

    Args:
        notebooks: Names such as 02; those that they need run too. All of the core by default.
        parameters: NOTEBOOK:NAME=VALUE sets a parameter; may be repeated.
        every: Whether to run those too that need a group of packages of their own.
        fresh: Whether to run those too of which nothing has changed since they last ran.
        output: The folder for executed copies, build/notebooks by default; of another no site is made.
        platform: Where; env is the platform that the environment's variables name.
        target: Which cluster, for k8s.
        engine: Who computes history and materialises; as in features.
    """
    from mlplatform_ops import mlflow_rest, progress, runner, unchanged

    root = find_root()
    folder = root / "notebooks"
    chosen = runner.select(runner.find_notebooks(folder, groups=every or bool(notebooks)), notebooks)
    given = _parameters(parameters, [path.stem for path in chosen])
    for path in chosen:
        runner.check_group(path)
        runner.check_parameters(path, given.get(path.stem, {}))
    (root / "build").mkdir(exist_ok=True)
    # In a pod the folder is a volume, which belongs to the cluster.
    with suppress(PermissionError):
        (root / "build").chmod(0o700)
    services = {name for path in chosen for name in runner.services(path)}
    with runner.claim_folder((output or root / "build" / "notebooks").resolve()) as folder, ExitStack() as stack:
        stamped = not fresh and unchanged.any_stamped(chosen, folder)
        settings = stack.enter_context(_platform(platform, target, () if stamped else services))
        kept: list[Execution] = []
        if stamped:
            kept = unchanged.find_unchanged(chosen, folder, settings, root=root, parameters=given, notify=say)
            chosen = [path for path in chosen if path.stem not in {execution.name for execution in kept}]
            services = {name for path in chosen for name in runner.services(path)}
            if services and platform == "embedded":
                _embedded().up(also=services, notify=say)
        stack.enter_context(_workers(engine if chosen else "local"))
        name = os.environ[mlflow_rest.RUN_VARIABLE] = mlflow_rest.new_run()
        mlflow_rest.close_runs(settings, mlflow_rest.is_dead)
        try:
            with progress.shown(chosen, folder) as show:
                executions = runner.run_all(
                    chosen,
                    folder,
                    parameters={path.stem: given[path.stem] for path in chosen if path.stem in given},
                    notify=say,
                    progress=show,
                    diagnose=lambda: _diagnose(settings, platform),
                )
        finally:
            del os.environ[mlflow_rest.RUN_VARIABLE]
            killed = mlflow_rest.close_runs(settings, lambda made: made == name)
        if killed:
            say(f"{killed} MLflow runs did not end and are marked KILLED")
        if any(execution.stopped for execution in executions):
            _show_results(executions)
            done = sum(not execution.error and not execution.skipped for execution in executions)
            say(f"stopped after {done} of {len(executions)} notebooks; run 'make run' to start again")
            return 130
        ran, executions = executions, sorted([*executions, *kept], key=lambda execution: execution.name)
        _show_results(executions)
        # What the notebooks found is told whatever may fail after them.
        try:
            unchanged.stamp_all(ran, chosen, settings, root=root, parameters=given)
            if platform == "embedded" and not notebooks:
                _keep_state(ran, settings)
            _summarise(settings, platform)
        except (PlatformError, OSError) as error:
            if platform == "embedded":
                _embedded().check_space()
            say(f"the next 'make run' may run these again: {error}")
        if folder == root / "build" / "notebooks":
            _build_site(folder, root / "build" / "site")
    return int(any(execution.error or execution.skipped for execution in executions))


@app.command
def site() -> None:
    """Make the site again, from the executed notebooks of the last run."""
    build = find_root() / "build"
    _build_site(build / "notebooks", build / "site")


@app.command
def loop(*, seed: int = 1, requests: int = 5_000) -> int:
    """Go through the whole loop once: drift, retraining, gate, shadow, canary, promotion, roll-back, evidence.

    Args:
        seed: Decides which people are drawn, and how the world moves.
        requests: How many questions the endpoint answers meanwhile, at least.
    """
    from mlplatform_ops.runner import require_group

    for group in ("pipelines", "serving", "drift"):
        require_group(group, what="the loop")
    from mlplatform_ops.loop import loop as loops

    began = time.monotonic()
    # The endpoint that it starts must end with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with _platform("embedded", CURRENT, ()):
        folder = loops.run(seed, main, sizes=loops.Sizes(requests=requests), notify=say)
    print(folder)
    say(f"the loop took {time.monotonic() - began:.0f} s")
    return 0


@app.command
def reproduce(run_id: str, /) -> int:
    """Train a run again from nothing but its id, and compare data, answers, metrics, code and environment.

    Args:
        run_id: MLflow's id of a training run.
    """
    from rich.table import Table

    from mlplatform_ops import reproduce as again

    connect()
    compared = again.reproduce(run_id)
    table = Table("what", "then", "now", "")
    for entry in compared:
        table.add_row(entry.what, entry.then[:20], entry.now[:20], entry.verdict)
    wide_console().print(table)
    return int(not all(entry.agrees for entry in compared))


@release.command(name="shadow")
def release_shadow(version: int, /, *, model: str | None = None) -> None:
    """Let a version answer every request beside the champion, whose answers alone are sent.

    Args:
        version: The challenger's number.
        model: The registered model, by default the table's.
    """
    from mlplatform.serving import releases

    connect()
    releases.shadow(version, name=model)
    say(f"version {version} answers in the shadow; the endpoint logs both answers")


@release.command(name="canary")
def release_canary(version: int, /, *, share: float = 0.1, model: str | None = None) -> None:
    """Let a version answer a share of the users.

    Args:
        version: The challenger's number.
        share: From 0 to 1.
        model: The registered model, by default the table's.
    """
    from mlplatform.serving import releases

    connect()
    releases.canary(version, share, name=model)
    say(f"version {version} answers {share:.0%} of the users")


@release.command(name="promote")
def release_promote(*, model: str | None = None) -> int:
    """Make the version that is being released the champion, if the gate lets it pass.

    Args:
        model: The registered model, by default the table's.
    """
    from mlplatform.serving import releases

    connect()
    outcome = releases.promote(name=model)
    say(f"version {outcome.version} {outcome.reason}")
    return int(not outcome.promoted)


@release.command(name="roll-back")
def release_roll_back(reason: str, /, *, model: str | None = None) -> None:
    """Give the alias back to the version that was champion before.

    Args:
        reason: Why, in a few words; the registry records it.
        model: The registered model, by default the table's.
    """
    from mlplatform.serving import releases

    connect()
    say(f"version {releases.roll_back(reason, name=model)} is the champion again")


@release.command(name="end")
def release_end(*, model: str | None = None) -> None:
    """End a release; the champion answers everybody.

    Args:
        model: The registered model, by default the table's.
    """
    from mlplatform.serving import releases

    connect()
    releases.end(name=model)
    say("the champion answers everybody")


@release.command(name="status")
def release_status(*, model: str | None = None) -> None:
    """Show which versions answer, and how.

    Args:
        model: The registered model, by default the table's.
    """
    from mlplatform.serving import releases

    connect()
    record = releases.read(name=model)
    how = f", challenger {record.challenger} as {record.mode} {record.share or ''}" if record.challenger else ""
    say(f"champion {record.champion}{how}".rstrip())


@release.default
def _release() -> None:
    raise CycloptsError(msg="No command is given to release.", command_chain=("release",))


@workshop.command(name="up")
def workshop_up(*, users: int = 12) -> None:
    """Start the platform, let the users in, and show where each one's Lab is and what it takes.

    Args:
        users: How many; those who are in already keep what they have.
    """
    from rich.table import Table

    from mlplatform_ops import workshop as room

    state = _workshop_state()
    room.start(state, users, notify=say)
    table = Table("user", "Lab", "answers", "memory")
    for seat in room.seats(state):
        answers = ", ".join(program for program, answer in seat.answers.items() if answer)
        table.add_row(seat.name, seat.lab, answers, f"{seat.memory_bytes / 2**20:.0f} MiB")
    wide_console().print(table)


@workshop.command(name="reset")
def workshop_reset(user: str, /) -> None:
    """Give one user a fresh start: no runs, models, objects and online values, and notebooks as they were.

    Args:
        user: The name, such as user03.
    """
    from mlplatform_ops import workshop as room

    began = time.monotonic()
    room.reset(_workshop_state(), user, notify=say)
    say(f"that took {time.monotonic() - began:.1f} s")


@workshop.command(name="down")
def workshop_down() -> None:
    """Stop the workshop; nothing is lost."""
    from mlplatform_ops.embedded.platform import EmbeddedPlatform

    say("stopped" if EmbeddedPlatform(_workshop_state()).down() else "nothing was running")


@workshop.command(name="clean")
def workshop_clean() -> None:
    """Stop the workshop and delete all of its state."""
    from mlplatform_ops.embedded.platform import EmbeddedPlatform

    state = _workshop_state()
    EmbeddedPlatform(state).clean()
    say(f"deleted {state}")


@workshop.default
def _workshop() -> None:
    raise CycloptsError(msg="No command is given to workshop.", command_chain=("workshop",))


def _workshop_state() -> Path:
    # Beside the platform of whoever gives it, which goes on undisturbed.
    if os.environ.get(STATE_VARIABLE):
        return (own := state_folder()).with_name(f"{own.name}.workshop")
    return find_root() / ".workshop"


@backup.default
def _backup() -> None:
    # Or the help would be printed, and a script that forgot the word would believe that something was saved.
    raise CycloptsError(msg="No command is given to backup.", command_chain=("backup",))


@backup.command(name="save")
def backup_save(
    folder: Path, /, *, databases: Annotated[Sequence[Path], Parameter(name="--database", show_default=False)] = ()
) -> None:
    """Copy the buckets, and databases that are named, to a new folder.

    Args:
        folder: Where to; it must not be there yet.
        databases: A SQLite file to save too; may be repeated.
    """
    from mlplatform_ops.backup import save

    say(f"saved {save(_object_store(), folder, databases=databases)} objects")


@backup.command(name="restore")
def backup_restore(folder: Path, /) -> None:
    """Copy every saved object back to its bucket.

    Args:
        folder: What `backup save` filled.
    """
    from mlplatform_ops.backup import restore

    say(f"restored {restore(_object_store(), folder)} objects")


def _object_store() -> Any:
    from mlplatform.connection import s3_client

    # Its address is shown and nothing else is asked: MLflow's server is best stopped during a restore.
    settings = find_settings(os.environ)
    say(f"the object store at {settings.s3_endpoint}")
    return s3_client(settings)


@contextmanager
def _platform(platform: PlatformName, target: Target, services: Collection[str]) -> Iterator[Settings]:
    """Reach the platform asked for, and let every library in this process find it, for as long as the block runs."""
    if platform == "env":
        yield connect()
        return
    with (
        on_cluster.forwarded(target) if platform == "k8s" else nullcontext(_embedded().up(also=services, notify=say))
    ) as settings:
        settings.put_into(os.environ)
        hasten_feast()
        limit_waiting()
        try:
            yield settings
        except Exception:
            if platform == "embedded":
                _embedded().check_space()
            raise


def _diagnose(settings: Settings, platform: PlatformName) -> None:
    """Raise an error that says why a notebook may have failed, if the platform is to blame."""
    if platform == "embedded":
        _embedded().check_space()
    check_services(settings)


def _workers(engine: EngineName) -> AbstractContextManager[Any]:
    """Start a Dask cluster of this machine where one is asked for and none is named."""
    if engine == "local" or os.environ.get(VARIABLE):
        return nullcontext()
    from mlplatform_ops.dask_cluster import dask_cluster

    return dask_cluster()


def _embedded() -> EmbeddedPlatform:
    from mlplatform_ops.embedded.platform import EmbeddedPlatform

    return EmbeddedPlatform(state_folder())


def _parameters(given: Sequence[str], names: Sequence[str]) -> dict[str, dict[str, object]]:
    """Read `NOTEBOOK:NAME=VALUE`; a value is read as YAML, as papermill's own command does."""
    import yaml

    from mlplatform_ops.runner import complete

    parameters: dict[str, dict[str, object]] = {}
    for entry in given:
        notebook, colon, assignment = entry.partition(":")
        name, equals, value = assignment.partition("=")
        if not colon or not equals:
            raise NotebookError(f"-p {entry!r} is not NOTEBOOK:NAME=VALUE for one of: {', '.join(names)}")
        try:
            parameters.setdefault(complete(notebook, names), {})[name] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise NotebookError(
                f"-p {entry!r}: {value!r} is not YAML; a text with such signs stands in quotes, as {name}='\"...\"'"
            ) from error
    return parameters


def _show_results(executions: Sequence[Execution]) -> None:
    from rich.table import Table

    table = Table("notebook", "seconds", "result")
    for execution in executions:
        done = "kept, unchanged" if execution.unchanged else "ok"
        result = "not run" if execution.skipped else execution.error or done
        table.add_row(execution.name, f"{execution.seconds:.1f}", result)
    # The terminal may be closed, which is one way to stop a run.
    with suppress(OSError):
        wide_console().print(table)


def _keep_state(executions: Sequence[Execution], settings: Settings) -> None:
    """Keep the state for `make reset` after a complete run; one that ran nothing anew has changed nothing."""
    import sqlite3

    import redis

    from mlplatform_ops.embedded import after_run

    state = state_folder()
    if any(execution.error or execution.skipped for execution in executions):
        return
    if executions or not after_run.is_kept(state):
        try:
            after_run.keep(state, settings)
        except (PlatformError, OSError, redis.RedisError, sqlite3.Error) as error:
            _embedded().check_space()
            say(f"'make reset' will know nothing of this run: {error}")


def _build_site(executed: Path, site: Path) -> None:
    from mlplatform_ops.site.build import build

    for warning in build(find_root(), executed, site):
        say(f"site: {warning}")
    wide_console().print(f"Read on     {site / 'index.html'}")


def _summarise(settings: Settings, platform: PlatformName) -> None:
    """Say who is champion and where to look."""
    from mlplatform import table
    from mlplatform.modeling import SCORES
    from mlplatform_ops import mlflow_rest

    console = wide_console()
    model = table.current().model
    version = mlflow_rest.find_version(settings, model, CHAMPION)
    run = mlflow_rest.look_up(settings, "runs/get", run_id=version["run_id"]) if version else None
    if version and run:
        metrics = {entry["key"]: entry["value"] for entry in run["run"]["data"]["metrics"]}
        scores = ", ".join(f"{name} {metrics[name]:.4f}" for name in sorted(metrics.keys() & set(SCORES)))
        name = run["run"]["info"]["run_name"]
        console.print(f"Champion    {model} version {version['version']} ({name}): {scores}")
    if platform == "k8s":
        console.print("MLflow, S3  make k8s-forward  (their addresses and credentials, until Ctrl-C)")
    else:
        source = ": make env" if platform == "embedded" else " as in the environment"
        password = ": make password" if platform == "embedded" else source
        console.print(f"MLflow      {settings.tracking_uri}  (user {settings.tracking_username}; password{password})")
        console.print(f"S3          {settings.s3_endpoint}  (keys{source})")
