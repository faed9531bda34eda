"""Where the platform is and how to log in to it.

A platform on a laptop and one on a cluster are named by the same standard variables. A notebook that calls `connect`
runs unchanged on both.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any
from urllib.parse import quote

from mlplatform.errors import SettingsError

DATASETS_BUCKET = "mlflow-datasets"
ARTIFACTS_BUCKET = "mlflow-artifacts"
FEATURES_BUCKET = "feature-data-sets"
REGISTRY_BUCKET = "feature-registry"
NOTEBOOKS_BUCKET = "executed-notebooks"
BUCKETS = (DATASETS_BUCKET, ARTIFACTS_BUCKET, FEATURES_BUCKET, REGISTRY_BUCKET, NOTEBOOKS_BUCKET)

CHAMPION = "champion"  # the alias of the version that answers

STATE_VARIABLE = "MLPLATFORM_STATE"
STATE_FOLDER = ".platform"
SETTINGS_FILE = "settings.json"
SETTINGS_COPY = "settings.json.copy"

# How long a client waits for a service, in seconds. A service that hangs is named within 10 s.
CONNECT_TIMEOUT_S = 3
ANSWER_TIMEOUT_S = 8
# The object store's client and the online store's each ask again by themselves.
S3_ANSWER_TIMEOUT_S = 4
REDIS_ANSWER_TIMEOUT_S = 1

# What every client of the platform is set to. No library sends usage data or asks a cloud for this machine's identity,
# which costs seconds on a closed network. MLflow prints no progress bar and no remark below a cell. Artifacts pass
# through MLflow's server: by default a client of 3.17 follows links to the object store, and in a cluster only pods
# can reach the address in such a link. Its client tries a refused connection again, and a late answer never.
CLIENT_DEFAULTS = {
    "AWS_EC2_METADATA_DISABLED": "true",
    "DO_NOT_TRACK": "1",
    "FEAST_USAGE": "False",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_ENABLE_PROXY_MULTIPART_DOWNLOAD": "false",
    "MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD": "false",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "5",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": str(ANSWER_TIMEOUT_S),
    "MLFLOW_LOGGING_LEVEL": "WARNING",
}

# Variables that lead boto3 and DuckDB to another store or give them another login, whatever the standard ones say, and
# those that name one user's part of a shared platform.
FOREIGN = (
    "AWS_ENDPOINT_URL_S3",
    "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS",
    "AWS_SECURITY_TOKEN",
    "AWS_SESSION_TOKEN",
    "BUCKET_PREFIX",
    "MLFLOW_WORKSPACE",
)


def _variable(name: str, *, secret: bool = False, optional: bool = False) -> str:
    # The return type is the field's, not dataclasses.Field's, as in the standard library's own stubs.
    default: dict[str, Any] = {"default": ""} if optional else {}
    return field(metadata={"variable": name, "optional": optional}, repr=not secret, **default)  # type: ignore[no-any-return]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Addresses and credentials of one platform; secrets stay out of its `repr`.

    Attributes:
        tracking_uri: The MLflow server, as `http://host:port`.
        tracking_username: MLflow's user name.
        tracking_password: MLflow's password.
        workspace: The part of MLflow that is this user's alone; empty where the server is not shared.
        s3_endpoint: The object store, as `http://host:port`.
        access_key: The object store's access key id.
        secret_key: The object store's secret access key.
        region: The object store's region; any name will do for a local one.
        s3_attempts: How often a client of the object store asks before it gives up; twice if empty.
        bucket_prefix: What the store's own names of buckets begin with; empty where the store is not shared.
        redis: The online store in Feast's form, `host:port,password=...`.
        feature_server: The Feast feature server, as `http://host:port`.
        feature_server_token: What a request to it carries as `Authorization: Bearer <token>`.
        feature_registry_key: What the feature registry's digest is made with.
        model_endpoint: The endpoint that serves the champion, as `http://host:port`; empty where there is none.
        model_endpoint_token: What a request to it carries as `Authorization: Bearer <token>`.
        dask_scheduler: The Dask scheduler for history and materialising, as `tls://host:port`; empty for this process.
        dask_config: The file with Dask's settings for it, which hold certificates; empty where Dask finds them itself.
        model_signing_key: Signs models at training and promotion, and verifies them before they are loaded.
    """

    tracking_uri: str = _variable("MLFLOW_TRACKING_URI")
    tracking_username: str = _variable("MLFLOW_TRACKING_USERNAME")
    tracking_password: str = _variable("MLFLOW_TRACKING_PASSWORD", secret=True)
    workspace: str = _variable("MLFLOW_WORKSPACE", optional=True)
    s3_endpoint: str = _variable("AWS_ENDPOINT_URL")
    access_key: str = _variable("AWS_ACCESS_KEY_ID")
    secret_key: str = _variable("AWS_SECRET_ACCESS_KEY", secret=True)
    region: str = _variable("AWS_DEFAULT_REGION")
    s3_attempts: str = _variable("AWS_MAX_ATTEMPTS", optional=True)
    bucket_prefix: str = _variable("BUCKET_PREFIX", optional=True)
    redis: str = _variable("REDIS_CONNECTION_STRING", secret=True)
    feature_server: str = _variable("FEATURE_SERVER_URL")
    feature_server_token: str = _variable("FEATURE_SERVER_TOKEN", secret=True)
    feature_registry_key: str = _variable("FEATURE_REGISTRY_KEY", secret=True)
    model_endpoint: str = _variable("MODEL_ENDPOINT_URL", optional=True)
    model_endpoint_token: str = _variable("MODEL_ENDPOINT_TOKEN", secret=True, optional=True)
    dask_scheduler: str = _variable("DASK_SCHEDULER_ADDRESS", optional=True)
    dask_config: str = _variable("DASK_CONFIG", optional=True)
    model_signing_key: str = _variable("MODEL_SIGNING_KEY", secret=True)

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> Settings:
        """Read the standard variables.

        Args:
            environ: Variables by name, such as `os.environ`.

        Raises:
            SettingsError: Variables are missing or empty, and the message names every one; or one is malformed.
        """
        if missing := missing_variables(environ):
            raise SettingsError(f"{', '.join(missing)} not set; run 'make up', or set them for a cluster")
        for name in ("MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL", "FEATURE_SERVER_URL", "MODEL_ENDPOINT_URL"):
            if environ.get(name) and not environ[name].startswith(("http://", "https://")):
                raise SettingsError(f"{name}={environ[name]} is no address; set it to http://host:port")
        if not _REDIS_FORM.fullmatch(environ["REDIS_CONNECTION_STRING"]):
            # The value is not shown, because it may hold a password.
            raise SettingsError("REDIS_CONNECTION_STRING is not in Feast's form; set it to host:port,password=...")
        return cls(**{key: environ.get(name, "") for key, name in VARIABLES.items()})

    def to_env(self) -> dict[str, str]:
        """Give the standard variables and `CLIENT_DEFAULTS`, for the environment of a process."""
        values = {name: str(getattr(self, key)) for key, name in VARIABLES.items()}
        return {name: value for name, value in values.items() if value} | CLIENT_DEFAULTS

    def put_into(self, environ: MutableMapping[str, str]) -> None:
        """Let every library of a process find this platform, and none meet another with its keys.

        Args:
            environ: The process's environment; the standard variables are written to it. Unless it named this platform
                before, variables that lead elsewhere are taken out. What it sets of `CLIENT_DEFAULTS` stays: many
                users of one small machine are patient.
        """
        own = self.to_env()
        if any(environ.get(name) != own[name] for name in REQUIRED):
            for name in FOREIGN:
                environ.pop(name, None)
        environ.update(own | {name: environ[name] for name in CLIENT_DEFAULTS if name in environ})

    @property
    def redis_url(self) -> str:
        """The online store as a URL, which redis-py and redis-cli read; Feast's form is its own."""
        address, *options = self.redis.split(",")
        values = dict(option.split("=", 1) for option in options)
        scheme = "rediss" if values.get("ssl", "").lower() == "true" else "redis"
        user, password = (quote(values.get(name, ""), safe="") for name in ("username", "password"))
        login = f"{user}:{password}@" if password else ""
        return f"{scheme}://{login}{address}{'/' + values['db'] if 'db' in values else ''}"


# host:port, then name=value pairs; an IPv6 address stands in brackets.
_REDIS_FORM = re.compile(r"(\[[0-9a-fA-F:]+\]|[^:/,\[\]]+):\d+(,\w+=[^,]*)*")
VARIABLES = {entry.name: entry.metadata["variable"] for entry in fields(Settings)}
REQUIRED = tuple(entry.metadata["variable"] for entry in fields(Settings) if not entry.metadata["optional"])


def missing_variables(environ: Mapping[str, str]) -> list[str]:
    """List the standard variables that are missing or empty; those of the endpoint may be."""
    return [name for name in REQUIRED if not environ.get(name)]


def s3_attempts(environ: Mapping[str, str] = os.environ) -> int:
    """Read how often a client of the object store asks before it gives up.

    Raises:
        SettingsError: `AWS_MAX_ATTEMPTS` is no count.
    """
    wanted = environ.get("AWS_MAX_ATTEMPTS") or "2"
    if not wanted.isdigit() or not int(wanted):
        raise SettingsError(f"AWS_MAX_ATTEMPTS={wanted} is no count; set it to 1 or more")
    return int(wanted)


def find_root(start: Path | None = None) -> Path:
    """Find the clone's top folder: the nearest, from `start` upwards, that holds `feature_repo` and `notebooks`.

    Args:
        start: Where the search begins, the working directory by default.

    Raises:
        SettingsError: There is none.
    """
    start = (start or Path.cwd()).resolve()
    for folder in (start, *start.parents):
        if (folder / "feature_repo").is_dir() and (folder / "notebooks").is_dir():
            return folder
    raise SettingsError(f"{start} is not inside a clone of the repository; change to one, or set {STATE_VARIABLE}")


def state_folder(start: Path | None = None, environ: Mapping[str, str] = os.environ) -> Path:
    """Find the folder that holds the embedded platform's state.

    Args:
        start: Where the search begins, the working directory by default.
        environ: Variables by name; `MLPLATFORM_STATE` names the folder outright.

    Returns:
        `MLPLATFORM_STATE` if set, else `.platform` in the clone's top folder.

    Raises:
        SettingsError: The variable is not set, and the start is outside a clone.
    """
    if environ.get(STATE_VARIABLE):
        return Path(environ[STATE_VARIABLE]).resolve()
    return find_root(start) / STATE_FOLDER


def find_settings(environ: Mapping[str, str] = os.environ) -> Settings:
    """Find the platform as `connect` does, without asking whether it answers.

    Raises:
        SettingsError: As for `connect`.
    """
    return read_settings(state_folder(environ=environ)) if missing_variables(environ) else Settings.from_env(environ)


def read_state(state: Path) -> dict[str, str]:
    """Read the variables that the embedded platform keeps in its state folder, or in the copy beside them.

    Raises:
        SettingsError: Both files are missing or damaged.
    """
    problems = []
    for name in (SETTINGS_FILE, SETTINGS_COPY):
        try:
            environment = json.loads((state / name).read_text())["environment"]
            if all(isinstance(value, str) for value in environment.values()):
                return dict(environment)
            problems.append(f"{name}: a value is no text")
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            problems.append(f"{name}: {type(error).__name__}")
    if problems:
        raise SettingsError(
            f"the settings in {state} are damaged ({'; '.join(problems)}); run 'make up', which makes them again and "
            "keeps the data"
        )
    raise SettingsError(f"no platform was started here ({state / SETTINGS_FILE} is missing); run 'make up'")


def read_settings(state: Path, *, also: Iterable[str] = ()) -> Settings:
    """Read the settings of the embedded platform from its state folder.

    Args:
        state: The state folder.
        also: Names of further variables that must be there.

    Raises:
        SettingsError: The file is missing or damaged, or an earlier version of this package wrote it.
    """
    environment = read_state(state)
    if missing := [*missing_variables(environment), *(name for name in also if not environment.get(name))]:
        raise SettingsError(
            f"the platform was started by an earlier version ({', '.join(missing)} missing); "
            "run 'make down', then 'make up'"
        )
    return Settings.from_env(environment)
