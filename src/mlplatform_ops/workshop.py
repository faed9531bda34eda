"""A workshop: one platform and many users, of whom none can read, overwrite or promote what another one has.

What keeps them apart is told to the servers by `embedded/users.py`, and to the system by `enclosure.py`. Here users are
admitted, given notebooks and a Lab, and given a fresh start.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import psutil
import redis
import requests

from mlplatform.connection import s3_client
from mlplatform.errors import ServiceDownError, SettingsError
from mlplatform.settings import ARTIFACTS_BUCKET, BUCKETS, Settings, find_root
from mlplatform.storage.refusals import s3_errors
from mlplatform_ops.backup import delete
from mlplatform_ops.console import Notify
from mlplatform_ops.embedded.platform import EmbeddedPlatform
from mlplatform_ops.embedded.supervisor import processes_of
from mlplatform_ops.embedded.users import (
    FEATURE_PORT,
    LAB_PORT,
    LAB_TOKEN,
    MOST,
    PROGRAMS,
    User,
    make_users,
    read_users,
)
from mlplatform_ops.enclosure import WORK, check_enclosure

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

COPIED = ("data", "feature_repo", "notebooks")
ROLE = "participant"
START_TIMEOUT_S = 300.0
TIMEOUT_S = 20.0


@dataclass(frozen=True)
class Seat:
    """What the teacher sees of one user.

    Attributes:
        name: The user's name.
        lab: The address of their Lab, token included.
        answers: Whether Lab and feature server answer, by program.
        memory_bytes: Proportional memory of their processes: what several share is divided among them.
    """

    name: str
    lab: str
    answers: dict[str, bool]
    memory_bytes: int


def start(state: Path, count: int, *, notify: Notify = lambda _: None) -> list[User]:
    """Start the platform and let users 1 to `count` in; those who are in already keep what they have.

    Raises:
        SettingsError: The number makes no sense, or this machine can't keep Labs apart.
        ServiceDownError: Something does not come up; the message names its log.
    """
    if not 1 <= count <= MOST:
        raise SettingsError(f"a workshop of {count} users is not possible; give USERS= from 1 to {MOST}")
    check_enclosure()
    platform = EmbeddedPlatform(state)
    if count > len(read_users(state)) and platform.down():
        notify("stopped the platform, to let more users in")
    make_users(state, count)
    settings = platform.up(notify=notify)
    users = read_users(state)
    for user in users:
        if not _is_admitted(settings, user):
            _admit(settings, user)
        if not (user.folder(state) / WORK).exists():
            _hand_out(state, user)
    for program in PROGRAMS:
        platform.start(*(f"{user.name}-{program}" for user in users))
        for user in users:
            _wait(platform, user, program)
        notify(f"{len(users)} users have a {program} that answers")
    return users


def reset(state: Path, name: str, *, notify: Notify = lambda _: None) -> None:
    """Give a user a fresh start: no runs, models, objects and online values, and notebooks as they were.

    What programs keep in the user's home, such as Lab's layout, stays.

    Raises:
        SettingsError: There is no such user.
        ServiceDownError: Something does not answer.
    """
    users = read_users(state)
    user = next((user for user in users if user.name == name), None)
    if user is None:
        known = f"{users[0].name} to {users[-1].name}" if users else "none; run 'make workshop'"
        raise SettingsError(f"there is no user {name!r}; known: {known}")
    platform = EmbeddedPlatform(state)
    if not platform.running():
        raise ServiceDownError("the workshop does not run; run 'make workshop', then this again")
    settings = platform.settings
    _end_programs(platform, user)
    steps: Sequence[Callable[[], None]] = (
        lambda: _admit(settings, user),
        lambda: _empty_buckets(settings, user),
        lambda: _forget_online(settings, user),
        lambda: _hand_out(state, user),
    )
    with ThreadPoolExecutor(len(steps)) as pool:
        for done in [pool.submit(step) for step in steps]:
            done.result()
    platform.start(*(f"{name}-{program}" for program in PROGRAMS))
    _wait(platform, user, "lab")
    notify(f"{name} starts anew")


def seats(state: Path) -> list[Seat]:
    """Look at every user."""
    memory: dict[str, int] = {}
    for process in processes_of(state):
        with suppress(psutil.Error):
            name = process.environ().get("MLFLOW_TRACKING_USERNAME", "")
            memory[name] = memory.get(name, 0) + process.memory_full_info().pss
    return [
        Seat(
            user.name,
            f"http://127.0.0.1:{user.own[LAB_PORT]}/lab/tree/notebooks?token={user.own[LAB_TOKEN]}",
            {program: _answers(user, program) for program in PROGRAMS},
            memory.get(user.name, 0),
        )
        for user in read_users(state)
    ]


def _mlflow(settings: Settings, verb: str, path: str, **body: Any) -> Any:
    """Ask MLflow as its administrator, `within` a workspace or in none; what is there already is no error.

    Raises:
        ServiceDownError: It refuses, or does not answer.
    """
    within = str(body.pop("within", ""))
    try:
        answer = requests.request(
            verb,
            f"{settings.tracking_uri}/api/{path}",
            json=body,
            params=body if verb == "DELETE" else None,
            auth=(settings.tracking_username, settings.tracking_password),
            headers={"X-MLFLOW-WORKSPACE": within} if within else {},
            timeout=TIMEOUT_S,
        )
    except requests.RequestException as error:
        raise ServiceDownError(f"MLflow does not answer ({error}); run 'make workshop' again") from error
    if answer.ok:
        return answer.json() if answer.content else {}
    code = answer.json().get("error_code", "") if answer.content.startswith(b"{") else ""
    if code in {"RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST"}:
        return {}
    raise ServiceDownError(f"MLflow answers {answer.status_code} to {verb} {path}: {answer.text[:200]}")


def _is_admitted(settings: Settings, user: User) -> bool:
    """Say whether a user can log in to MLflow and belongs to their workspace, which is the last that is set."""
    try:
        answer = requests.get(
            f"{settings.tracking_uri}/api/3.0/mlflow/workspaces",
            auth=(user.name, user.own["MLFLOW_TRACKING_PASSWORD"]),
            timeout=TIMEOUT_S,
        )
    except requests.RequestException as error:
        raise ServiceDownError(f"MLflow does not answer ({error}); run 'make workshop' again") from error
    return answer.ok and user.name in {entry["name"] for entry in answer.json().get("workspaces", ())}


def _admit(settings: Settings, user: User) -> None:
    """Give a user an empty workspace of MLflow, in which they may make whatever they like, and no other."""
    name, password = user.name, user.own["MLFLOW_TRACKING_PASSWORD"]
    _mlflow(settings, "DELETE", f"3.0/mlflow/workspaces/{name}", mode="CASCADE")
    _mlflow(settings, "POST", "3.0/mlflow/workspaces", name=name)
    _mlflow(settings, "POST", "2.0/mlflow/users/create", username=name, password=password)
    role = _mlflow(settings, "POST", "3.0/mlflow/roles/create", within=name, workspace=name, name=ROLE)["role"]["id"]
    grant = {"role_id": role, "resource_type": "workspace", "resource_pattern": "*", "permission": "USE"}
    _mlflow(settings, "POST", "3.0/mlflow/roles/permissions/add", within=name, **grant)
    _mlflow(settings, "POST", "3.0/mlflow/roles/assign", within=name, username=name, role_id=role)


def _empty_buckets(settings: Settings, user: User) -> None:
    """Delete every object of a user, and what MLflow's server has stored for them."""
    store = s3_client(settings)
    for bucket in BUCKETS:
        _delete_objects(store, user.prefix + bucket, "")
    _delete_objects(store, ARTIFACTS_BUCKET, f"workspaces/{user.name}/")


def _delete_objects(store: S3Client, bucket: str, prefix: str) -> None:
    with s3_errors(f"s3://{bucket}"):
        pages = list(store.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix))
    delete(store, bucket, [entry["Key"] for page in pages for entry in page.get("Contents", ())])


def _forget_online(settings: Settings, user: User) -> None:
    """Empty a user's database of the online store."""
    try:
        with redis.Redis.from_url(f"{settings.redis_url}/{user.number}") as client:
            client.flushdb()
    except redis.RedisError as error:
        raise ServiceDownError(f"the online store does not answer ({error}); run 'make workshop' again") from error


def _hand_out(state: Path, user: User) -> None:
    """Give a user notebooks, feature repository and data as the clone has them, in place of what they have."""
    root, work = find_root(), user.folder(state) / WORK
    for folder in (user.folder(state), user.temporary(state)):
        folder.mkdir(mode=0o700, exist_ok=True)
    # Made where the user's programs cannot put links in the way, and moved at once.
    with TemporaryDirectory(dir=user.private(state)) as made:
        for name in COPIED:
            ignored = shutil.ignore_patterns("__pycache__", ".*")
            shutil.copytree(root / name, Path(made) / WORK / name, ignore=ignored)
        # Whatever the user has put in its place, a link too, goes with the folder that is made here.
        if work.is_dir() and not work.is_symlink():
            work.chmod(0o700)
        if work.exists() or work.is_symlink():
            work.rename(Path(made) / "before")
        (Path(made) / WORK).rename(work)


def _end_programs(platform: EmbeddedPlatform, user: User) -> None:
    """End whatever runs in a user's Lab, kernels and terminals, and the feature server; the Lab itself goes on."""
    platform.stop(f"{user.name}-features")
    pid = platform.entry(f"{user.name}-lab")["pid"]
    if not pid:
        return
    with suppress(psutil.Error, IndexError, ValueError):
        enclosure = psutil.Process(pid)
        # The first process there is bubblewrap's: all others are below it, and the oldest of them is the Lab.
        inside = enclosure.children()[0]
        lab = min(inside.children(), key=psutil.Process.create_time)
        for process in inside.children(recursive=True):
            if process != lab:
                process.kill()


def _answers(user: User, program: str) -> bool:
    port, path = (user.own[LAB_PORT], "api") if program == "lab" else (user.own[FEATURE_PORT], "health")
    with suppress(requests.RequestException):
        return requests.get(f"http://127.0.0.1:{port}/{path}", timeout=TIMEOUT_S).ok
    return False


def _wait(platform: EmbeddedPlatform, user: User, program: str) -> None:
    name, deadline = f"{user.name}-{program}", time.monotonic() + START_TIMEOUT_S
    while not _answers(user, program):
        if platform.entry(name)["statename"] == "FATAL" or time.monotonic() > deadline:
            log = platform.state / "logs" / f"{name}.log"
            raise ServiceDownError(f"the {program} of {user.name} does not answer; see {log}")
        time.sleep(0.2)
