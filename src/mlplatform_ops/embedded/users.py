"""Who shares a platform in a workshop, and what each server is told about them.

Each user has a workspace of MLflow, buckets of their own names, a database of the online store, and keys that nobody
else knows. The servers hold them apart, so it does not matter what a user's own programs try.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mlplatform.settings import SETTINGS_FILE, read_state
from mlplatform_ops.files import write_private
from mlplatform_ops.ports import free_port
from mlplatform_ops.service_files import Identity

FOLDER = "users"
MOST = 99  # names have two digits
# How long a user's clients wait for an answer: all of them may train at once on a few cores.
PATIENCE_S = 60
LAB_PORT, LAB_TOKEN = "MLPLATFORM_LAB_PORT", "JUPYTER_TOKEN"
FEATURE_PORT = "MLPLATFORM_FEATURE_SERVER_PORT"
_PORTS = (LAB_PORT, FEATURE_PORT)
PROGRAMS = ("lab", "features")
_SECRETS = (
    "AWS_SECRET_ACCESS_KEY",
    "FEATURE_REGISTRY_KEY",
    "FEATURE_SERVER_TOKEN",
    "MLFLOW_TRACKING_PASSWORD",
    "MLPLATFORM_REDIS_PASSWORD",
    "MODEL_SIGNING_KEY",
    LAB_TOKEN,
)
# What reads, writes and runs scripts on keys, in the user's own database. Scripts are held to the same rules.
_COMMANDS = (
    "-@all +@read +@write +@connection +@scripting +command|info "
    "-@admin -@dangerous -function -script|flush -script|kill"
)


@dataclass(frozen=True)
class User:
    """Somebody who takes part.

    Attributes:
        number: From 1; also the number of their database in the online store.
        own: Secrets and ports by variable.
    """

    number: int
    own: Mapping[str, str]

    @property
    def name(self) -> str:
        """Such as `user03`: the name in MLflow, in the object store and in the online store."""
        return f"user{self.number:02d}"

    @property
    def prefix(self) -> str:
        """What the names of their buckets begin with."""
        return f"{self.name}-"

    def identity(self) -> Identity:
        """Give the user as the object store knows them: nothing but their own buckets, which they can't make."""
        actions = [f"{action}:{self.prefix}*" for action in ("Read", "Write", "List", "Tagging")]
        return Identity(self.name, [(self.name, self.own["AWS_SECRET_ACCESS_KEY"])], actions)

    def acl(self) -> str:
        """Give the user as Valkey's configuration names them."""
        password = self.own["MLPLATFORM_REDIS_PASSWORD"]
        return f"user {self.name} on >{password} resetchannels ~* {_COMMANDS} resetdbs db={self.number}\n"

    def environment(self, platform: Mapping[str, str]) -> dict[str, str]:
        """Give all variables of the user, from those of the platform."""
        redis = platform["REDIS_CONNECTION_STRING"].partition(",")[0]
        login = [f"username={self.name}", f"password={self.own['MLPLATFORM_REDIS_PASSWORD']}", f"db={self.number}"]
        limits = [f"socket_connect_timeout={PATIENCE_S}", f"socket_timeout={PATIENCE_S}"]
        return {
            **self.own,
            **{name: platform[name] for name in ("MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION")},
            "MLFLOW_TRACKING_USERNAME": self.name,
            "MLFLOW_WORKSPACE": self.name,
            "AWS_ACCESS_KEY_ID": self.name,
            "BUCKET_PREFIX": self.prefix,
            "REDIS_CONNECTION_STRING": ",".join([redis, *login, *limits]),
            "MLFLOW_HTTP_REQUEST_TIMEOUT": str(PATIENCE_S),
            "FEATURE_SERVER_URL": f"http://127.0.0.1:{self.own[FEATURE_PORT]}",
        }

    def private(self, state: Path) -> Path:
        """The folder of the user's `settings.json`, which no program of theirs can see."""
        return state / FOLDER / f"{self.name}.private"

    def folder(self, state: Path) -> Path:
        """The only folder of this machine that programs of the user can change, beside their /tmp."""
        return state / FOLDER / self.name

    def temporary(self, state: Path) -> Path:
        """What programs of the user see as /tmp; they can't put a link in its place."""
        return state / FOLDER / f"{self.name}.tmp"


def make_users(state: Path, count: int) -> list[User]:
    """Make users 1 to `count` who are not there yet, for the platform's next start.

    Returns:
        The new ones.
    """
    known = read_users(state)
    taken = {user.own[variable] for user in known for variable in _PORTS}
    made = []
    for number in sorted({*range(1, count + 1)} - {user.number for user in known}):
        own = {name: secrets.token_urlsafe(24) for name in _SECRETS}
        for variable in _PORTS:
            own[variable] = str(free_port(avoid=taken))
            taken.add(own[variable])
        made.append(User(number, own))
    write_users(state, made)
    return made


def read_users(state: Path) -> list[User]:
    """Read who shares the platform of a state folder: nobody, outside a workshop."""
    found = []
    for folder in sorted((state / FOLDER).glob("user[0-9][0-9].private")):
        known = read_state(folder)
        found.append(User(int(folder.name[4:6]), {name: known[name] for name in (*_SECRETS, *_PORTS)}))
    return found


def write_users(state: Path, users: Iterable[User], platform: Mapping[str, str] | None = None) -> None:
    """Write the settings of users, with the platform's addresses where they are known."""
    for user in users:
        user.private(state).mkdir(mode=0o700, parents=True, exist_ok=True)
        environment = user.environment(platform) if platform else dict(user.own)
        write_private(user.private(state) / SETTINGS_FILE, json.dumps({"environment": environment}, indent=2))


def programs(users: Iterable[User]) -> str:
    """Write the part of `supervisord.conf` that starts the users' programs."""
    return "".join(
        f"\n[program:{user.name}-{program}]\n"
        f"command = python -m mlplatform_ops.enclosure {user.name} {program}\n"
        "autostart = false\nautorestart = true\nstartsecs = 1\nstartretries = 3\nstopsignal = KILL\n"
        f"redirect_stderr = true\nstdout_logfile = logs/{user.name}-{program}.log\n"
        "stdout_logfile_maxbytes = 1MB\nstdout_logfile_backups = 0\n"
        for user in users
        for program in PROGRAMS
    )
