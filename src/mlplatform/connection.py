"""Connect this process to the platform: ask whether its services answer, and tell every library where they are."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from mlplatform.clients.hastening import hasten_feast
from mlplatform.clients.sharing import name_buckets
from mlplatform.clients.waiting import limit_waiting, s3_limits
from mlplatform.errors import ServiceDownError, credentials_refused, service_down
from mlplatform.settings import (
    CONNECT_TIMEOUT_S,
    Settings,
    find_settings,
    missing_variables,
    state_folder,
)

if TYPE_CHECKING:
    from botocore.config import Config
    from mypy_boto3_s3 import S3Client

UNSUPERVISED = (
    "the supervisor has ended and its services run on without it: one that dies stays dead; run 'make up', which "
    "starts all of them again"
)


def connect(environ: MutableMapping[str, str] = os.environ) -> Settings:
    """Find the platform, check that it answers, and write its addresses and credentials to this process's environment.

    MLflow, Feast, boto3 and redis-py read them there. If all standard variables are set, as on a cluster, they are
    used. If only some are set, they are ignored and the embedded platform's settings are used: the
    `AWS_ACCESS_KEY_ID` of somebody's cloud account must never meet a local address, nor the platform's own the cloud.
    Warns if that platform runs without its supervisor.

    Args:
        environ: Variables by name; the standard ones are written back to it.

    Returns:
        The settings in use.

    Raises:
        SettingsError: No platform was ever started here and the variables do not name one, or one is malformed.
        ServiceDownError: A service does not answer within seconds.
        CredentialsError: A service refuses the credentials.
    """
    settings = find_settings(environ)
    check_services(settings)
    if missing_variables(environ) and _supervisor_was_killed(state_folder(environ=environ)):
        warnings.warn(UNSUPERVISED, RuntimeWarning, stacklevel=2)
    settings.put_into(environ)
    hasten_feast()
    limit_waiting()
    name_buckets()
    return settings


def _supervisor_was_killed(state: Path) -> bool:
    """Look whether the process that wrote its number there is gone; when it ends by itself it removes the file."""
    try:
        os.kill(int((state / "supervisord.pid").read_text()), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError):
        return False
    return False


def check_services(settings: Settings) -> None:
    """Send each service one request that needs the credentials, all at the same time.

    Args:
        settings: The platform to ask.

    Raises:
        ServiceDownError: One does not answer.
        CredentialsError: One refuses the credentials.
    """
    # Two of these change the warning filters while they are imported, which two threads must not do at once.
    for library in ("boto3", "redis", "requests"):
        import_module(library)
    probes: tuple[Callable[[Settings, float], None], ...] = (probe_object_store, probe_online_store, probe_mlflow)
    with ThreadPoolExecutor(len(probes)) as pool:
        for result in [pool.submit(probe, settings, CONNECT_TIMEOUT_S) for probe in probes]:
            result.result()


def s3_client(settings: Settings | None = None, *, config: Config | None = None) -> S3Client:
    """Make an S3 client that gives up within seconds when the store is down; boto3's own tries for minutes.

    Args:
        settings: The platform; by default the standard `AWS_*` variables decide, as for any other tool.
        config: Other time limits and retries.
    """
    import boto3
    from botocore.config import Config

    name_buckets()
    named: dict[str, str] = {}
    if settings is not None:
        named = {
            "endpoint_url": settings.s3_endpoint,
            "aws_access_key_id": settings.access_key,
            "aws_secret_access_key": settings.secret_key,
            "region_name": settings.region,
        }
    client: S3Client = boto3.session.Session().client("s3", config=config or Config(**s3_limits()), **named)  # type: ignore[call-overload]
    return client


def probe_object_store(settings: Settings, timeout_s: float) -> None:
    """List the buckets.

    Raises:
        ServiceDownError: The object store does not answer.
        CredentialsError: It refuses the keys, or the time in the signature.
    """
    import botocore.exceptions
    from botocore.config import Config

    from mlplatform.storage.refusals import CLOCK_CODES, REFUSED_CODES, clocks_differ

    config = Config(connect_timeout=timeout_s, read_timeout=timeout_s, retries={"total_max_attempts": 1})
    client = s3_client(settings, config=config)
    try:
        client.list_buckets()
    except botocore.exceptions.ClientError as error:
        code = error.response["Error"]["Code"]
        if code in CLOCK_CODES:
            raise clocks_differ(settings.s3_endpoint, error) from error
        if code in REFUSED_CODES:
            raise credentials_refused("object store", settings.s3_endpoint, "AWS_ACCESS_KEY_ID") from error
        raise service_down("object store", settings.s3_endpoint) from error
    except botocore.exceptions.BotoCoreError as error:
        raise service_down("object store", settings.s3_endpoint) from error


def probe_online_store(settings: Settings, timeout_s: float) -> None:
    """Ask for a key. `PING` would be refused while the disk is full, and reading goes on then.

    Raises:
        ServiceDownError: The online store does not answer.
        CredentialsError: It refuses the password.
    """
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    address = settings.redis.split(",", 1)[0]
    try:
        with redis.Redis.from_url(
            settings.redis_url,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            retry=Retry(NoBackoff(), 0),
        ) as client:
            client.exists("-")
    except redis.AuthenticationError as error:
        raise credentials_refused("online store", address, "REDIS_CONNECTION_STRING") from error
    except (redis.RedisError, OSError) as error:
        raise service_down("online store", address) from error


def probe_mlflow(settings: Settings, timeout_s: float) -> None:
    """Search for an experiment. That needs the database and the credentials, and `/health` needs neither.

    Raises:
        ServiceDownError: The MLflow server does not answer.
        CredentialsError: It refuses the user.
    """
    import requests

    try:
        answer = requests.get(
            f"{settings.tracking_uri}/api/2.0/mlflow/experiments/search",
            params={"max_results": "1"},
            auth=(settings.tracking_username, settings.tracking_password),
            timeout=timeout_s,
        )
    except requests.RequestException as error:
        raise service_down("MLflow server", settings.tracking_uri) from error
    if answer.status_code in {401, 403}:
        raise credentials_refused("MLflow server", settings.tracking_uri, "MLFLOW_TRACKING_USERNAME")
    if not answer.ok:
        raise ServiceDownError(
            f"the MLflow server at {settings.tracking_uri} answers {answer.status_code}; run 'make up', which says why "
            "where it can, or see its log"
        )
