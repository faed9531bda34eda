"""The secrets of a cluster: random values made once, and the files that the manifests' generators read.

`values.env` holds every value, and is the one file to edit. The other files arrange the values for MLflow, Redis,
SeaweedFS, Postgres and Dask, and are written again whenever the values or the overlay change. All of it lies in the
overlay's git-ignored folder `secrets`, readable by its owner alone.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Literal
from urllib.parse import quote

import yaml

from mlplatform.errors import ClusterError
from mlplatform_ops.certificates import certificates_of
from mlplatform_ops.cluster.overlay import FOLDER, read_env, wanted_files
from mlplatform_ops.console import Notify
from mlplatform_ops.files import write_private
from mlplatform_ops.service_files import Identity, mlflow_auth, object_store_identities

VALUES = "values.env"
PREVIOUS = "_PREVIOUS"
Group = Literal["endpoint", "feature-server", "mlflow", "object-store", "redis"]
# What `rotate` replaces together. A name and its password change as one, so that old and new can both be valid.
GROUPS: dict[str, tuple[str, ...]] = {
    "endpoint": ("MODEL_ENDPOINT_TOKEN",),
    "feature-server": ("FEATURE_SERVER_TOKEN",),
    "mlflow": ("MLFLOW_ADMIN_USERNAME", "MLFLOW_ADMIN_PASSWORD"),
    "object-store": ("S3_ACCESS_KEY", "S3_SECRET_KEY", "S3_READER_ACCESS_KEY", "S3_READER_SECRET_KEY"),
    "redis": ("REDIS_PASSWORD", "REDIS_READER_PASSWORD"),
}
# Values that no command replaces: only their own component holds them.
INNER = (
    "DASK_CERTIFICATE_SEED",
    "FEATURE_REGISTRY_KEY",
    "MLFLOW_FLASK_SERVER_SECRET_KEY",
    "MODEL_SIGNING_KEY",
    "POSTGRES_PASSWORD",
    "REDIS_OPERATOR_PASSWORD",
    "REDIS_PROBE_PASSWORD",
    "REDIS_REPLICA_PASSWORD",
    "REDIS_SENTINEL_PASSWORD",
    "WEED_JWT_SIGNING_KEY",
    "WEED_JWT_SIGNING_READ_KEY",
    "WEED_JWT_FILER_SIGNING_KEY",
    "WEED_JWT_FILER_SIGNING_READ_KEY",
)
_PREFIXES = {"MLFLOW_ADMIN_USERNAME": "admin-", "S3_ACCESS_KEY": "platform-", "S3_READER_ACCESS_KEY": "reader-"}


def write_secrets(
    overlay: Path, *, rotate: Collection[str] = (), retire: Collection[str] = (), notify: Notify = lambda _: None
) -> list[Path]:
    """Make the secrets that are missing, keep the others, and write every file from them.

    Args:
        overlay: The overlay's folder.
        rotate: Groups (`GROUPS`) that get new values; the old ones stay valid beside them until they are retired.
        retire: Groups whose old values end.
        notify: Called with a line for each file that is written.

    Returns:
        The files that were written.

    Raises:
        ClusterError: There is no such overlay or group, or a group is rotated twice without being retired.
    """
    _check_groups([*rotate, *retire])
    wanted = wanted_files(overlay)
    folder = overlay / FOLDER
    folder.mkdir(mode=0o700, exist_ok=True)
    old = read_env(folder / VALUES) if (folder / VALUES).exists() else {}
    values = changed_values(old, rotate=rotate, retire=retire)
    texts = {VALUES: _env(values)} | {
        name: text
        for name, text in derived_files(
            values, postgres="mlflow-database.env" in wanted, seaweedfs="s3.json" in wanted
        ).items()
        if name in wanted
    }
    return _write(folder, texts, notify=notify)


def changed_values(
    values: Mapping[str, str], *, rotate: Collection[str] = (), retire: Collection[str] = ()
) -> dict[str, str]:
    """Add what is missing, move rotated values aside, drop retired ones.

    Raises:
        ClusterError: A group is rotated while its previous values are still valid.
    """
    result = dict(values)
    for group in retire:
        for name in GROUPS[group]:
            result.pop(name + PREVIOUS, None)
    for group in rotate:
        if any(name + PREVIOUS in result for name in GROUPS[group]):
            raise ClusterError(
                f"{group} was rotated before and its old values are still valid; run 'make k8s-secrets RETIRE={group}'"
            )
        for name in GROUPS[group]:
            if name in result:
                result[name + PREVIOUS] = result.pop(name)
    for name in (*(name for names in GROUPS.values() for name in names), *INNER):
        if not result.get(name):
            result[name] = new_value(name)
    return dict(sorted(result.items()))


def new_value(name: str) -> str:
    """Make a random value that needs no quotes in a URL, an ini file, an ACL or Feast's connection string."""
    if name in _PREFIXES:
        return _PREFIXES[name] + secrets.token_hex(4)
    # A leading letter: Feast reads an all-digit password as a number, and redis-cli a leading dash as an option.
    return "p" + secrets.token_urlsafe(32)


def derived_files(values: Mapping[str, str], *, postgres: bool, seaweedfs: bool) -> dict[str, str]:
    """Write the values in the form that each server and client reads.

    Args:
        values: Every value by name, and during a rotation the previous ones too.
        postgres: Whether MLflow keeps its data in Postgres and not in SQLite files.
        seaweedfs: Whether the object store is SeaweedFS, which knows several identities, and not MinIO.

    Returns:
        File contents by name.
    """
    s3 = {"AWS_ACCESS_KEY_ID": values["S3_ACCESS_KEY"], "AWS_SECRET_ACCESS_KEY": values["S3_SECRET_KEY"]}
    s3_reader = {
        "AWS_ACCESS_KEY_ID": values["S3_READER_ACCESS_KEY"],
        "AWS_SECRET_ACCESS_KEY": values["S3_READER_SECRET_KEY"],
    }
    # The driver by name, since what SQLAlchemy takes for a bare `postgresql:` changed, and the image has this one.
    login = values.get("POSTGRES_LOGIN") or f"mlflow:{values['POSTGRES_PASSWORD']}"
    login = ":".join(quote(part, safe="") for part in login.split(":", 1))
    database = f"postgresql+psycopg2://{login}@{values.get('POSTGRES_ADDRESS') or 'postgres:5432'}"
    users = f"{database}/mlflow_auth" if postgres else "sqlite:////var/lib/mlflow/basic_auth.db"
    inner = {name: value for name, value in values.items() if name in INNER}
    return {
        "object-store.env": _env(s3),
        "s3.json": _identities(values),
        "seaweedfs.env": _env({name: value for name, value in inner.items() if name.startswith("WEED_")}),
        "users.acl": _acl(values),
        "redis.env": _env(
            {name: v for name, v in values.items() if name.startswith("REDIS_") and PREVIOUS not in name}
        ),
        "mlflow-server.env": _env({"MLFLOW_FLASK_SERVER_SECRET_KEY": inner["MLFLOW_FLASK_SERVER_SECRET_KEY"]}),
        "basic_auth.ini": mlflow_auth(
            username=values["MLFLOW_ADMIN_USERNAME"], password=values["MLFLOW_ADMIN_PASSWORD"], database_uri=users
        ),
        "postgres.env": _env({"POSTGRES_PASSWORD": inner["POSTGRES_PASSWORD"]}),
        "mlflow-database.env": _env(
            {"MLFLOW_BACKEND_STORE_URI": f"{database}/mlflow", "MLFLOW_AUTH_DATABASE_URI": users}
        ),
        "feature-server.env": _env(
            {
                # MinIO knows one identity, the platform's; SeaweedFS knows one that can only read the registry.
                **(s3_reader if seaweedfs else s3),
                "REDIS_CONNECTION_STRING": f"redis:6379,username=reader,password={values['REDIS_READER_PASSWORD']}",
                **{name: value for name, value in values.items() if name.startswith("FEATURE_SERVER_TOKEN")},
                "FEATURE_REGISTRY_KEY": values["FEATURE_REGISTRY_KEY"],
            }
        ),
        "dask.yaml": _dask(values["DASK_CERTIFICATE_SEED"]),
        "client.env": _env(
            {
                **s3,
                "MLFLOW_TRACKING_USERNAME": values["MLFLOW_ADMIN_USERNAME"],
                "MLFLOW_TRACKING_PASSWORD": values["MLFLOW_ADMIN_PASSWORD"],
                "REDIS_CONNECTION_STRING": f"redis:6379,password={values['REDIS_PASSWORD']}",
                "FEATURE_SERVER_TOKEN": values["FEATURE_SERVER_TOKEN"],
                "FEATURE_REGISTRY_KEY": values["FEATURE_REGISTRY_KEY"],
                # The endpoint takes both until the old one is retired.
                **{name: value for name, value in values.items() if name.startswith("MODEL_ENDPOINT_TOKEN")},
                "MODEL_SIGNING_KEY": values["MODEL_SIGNING_KEY"],
            }
        ),
    }


def _check_groups(groups: Iterable[str]) -> None:
    for group in groups:
        if group not in GROUPS:
            raise ClusterError(f"no secrets are called {group!r}; choose from {', '.join(GROUPS)}")


def _env(values: Mapping[str, str]) -> str:
    return "".join(f"{name}={value}\n" for name, value in values.items())


def _both(values: Mapping[str, str], name: str) -> list[str]:
    return [values[key] for key in (name, name + PREVIOUS) if values.get(key)]


def _identities(values: Mapping[str, str]) -> str:
    """The object store's identities: the platform may do everything, the feature server may read the registry."""

    def keys(prefix: str) -> list[tuple[str, str]]:
        names = _both(values, f"{prefix}ACCESS_KEY"), _both(values, f"{prefix}SECRET_KEY")
        return list(zip(*names, strict=True))

    reads = ["Read:feature-registry", "List:feature-registry"]
    return object_store_identities(
        Identity("platform", keys("S3_")), Identity("feature-server", keys("S3_READER_"), reads)
    )


def _acl(values: Mapping[str, str]) -> str:
    """Redis's users; each may do what its holder needs."""

    def user(name: str, variable: str, rights: str) -> str:
        return f"user {name} on {' '.join('>' + value for value in _both(values, variable))} {rights}\n"

    return (
        # `info`, since clients ask for the server's version; the rest of @dangerous is for operators.
        user("default", "REDIS_PASSWORD", "~* &* +@all -@admin -@dangerous +info")
        + user("reader", "REDIS_READER_PASSWORD", "~* +@read +@connection -@dangerous +info")
        + user("operator", "REDIS_OPERATOR_PASSWORD", "resetkeys +ping +acl|load +acl|list +info +role")
        + user("probe", "REDIS_PROBE_PASSWORD", "resetkeys +ping +info +auth")
        + user("replica", "REDIS_REPLICA_PASSWORD", "resetkeys +psync +replconf +ping")
        + user(
            "sentinel",
            "REDIS_SENTINEL_PASSWORD",
            "resetkeys allchannels +multi +slaveof +ping +exec +subscribe +config|rewrite +role +publish +info"
            " +client|setname +client|kill +script|kill",
        )
    )


def _dask(seed: str) -> str:
    """Dask's settings for who takes part: scheduler, workers and clients show a certificate, and ask for one."""
    made = certificates_of(seed, name="dask")
    pair = {"cert": made.certificate, "key": made.key}
    roles = {"ca-file": made.authority, "client": pair, "scheduler": pair, "worker": pair}
    return yaml.safe_dump({"distributed": {"comm": {"require-encryption": True, "tls": roles}}})


def _write(folder: Path, texts: Mapping[str, str], *, notify: Notify) -> list[Path]:
    """Write the files whose text changed."""
    written = []
    for name, text in texts.items():
        path = folder / name
        if path.exists() and path.read_text() == text:
            path.chmod(0o600)
            continue
        write_private(path, text)
        written.append(path)
        notify(f"wrote {path}")
    return written
