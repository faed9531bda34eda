"""Connect this process to the platform: probe its services and let every library find them."""

from __future__ import annotations

import os
from collections.abc import Callable, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from mlplatform.errors import CredentialsError, ServiceDownError
from mlplatform.settings import Settings, find_settings

if TYPE_CHECKING:
    from botocore.config import Config
    from mypy_boto3_s3 import S3Client


def connect(environ: MutableMapping[str, str] = os.environ) -> Settings:
    """Find the platform, make sure that it answers, and let every library in this process find it too.

    A complete set of standard variables wins, as on a cluster. An incomplete one is ignored, so that a stray
    `AWS_ACCESS_KEY_ID` of somebody's cloud account is never mixed with a local endpoint: then the embedded
    platform's own settings are used whole.

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
    environ.update(settings.to_env())
    hasten_feast()
    return settings


def hasten_feast() -> None:
    """Let Feast be imported in a third of its time, in this process; call it before.

    Feast 0.67 has typeguard compile 260 functions again as they are imported, to check the types of their arguments:
    2.5 of 3.9 s. MLflow's first request imports Feast too, since Feast adds a header to it, so every notebook pays.
    """
    import typeguard

    def typechecked(target: Any = None, **_: object) -> Any:
        return target if target is not None else typechecked

    typeguard.typechecked = typechecked


def check_services(settings: Settings, *, timeout_s: float = 3.0) -> None:
    """Ask each service for an authenticated answer, all at once.

    Args:
        settings: The platform to ask.
        timeout_s: How long a service may take, in seconds.

    Raises:
        ServiceDownError: One does not answer.
        CredentialsError: One refuses the credentials.
    """
    # Imported before the threads start: as they are imported, two of them change the filter of warnings.

    probes: tuple[Callable[[Settings, float], None], ...] = (probe_object_store, probe_online_store, probe_mlflow)
    with ThreadPoolExecutor(len(probes)) as pool:
        for result in [pool.submit(probe, settings, timeout_s) for probe in probes]:
            result.result()


def s3_client(settings: Settings, config: Config | None = None) -> S3Client:
    """Give a client of the platform's object store.

    Args:
        settings: The platform.
        config: Time limits and retries; botocore's own by default.
    """
    import boto3

    client: S3Client = boto3.session.Session().client(
        "s3",
        endpoint_url=settings.s3_endpoint,
        aws_access_key_id=settings.access_key,
        aws_secret_access_key=settings.secret_key,
        region_name=settings.region,
        config=config,
    )
    return client


def probe_object_store(settings: Settings, timeout_s: float) -> None:
    """List the buckets.

    Raises:
        ServiceDownError: The object store does not answer.
        CredentialsError: It refuses the keys.
    """
    import botocore.exceptions
    from botocore.config import Config

    config = Config(connect_timeout=timeout_s, read_timeout=timeout_s, retries={"total_max_attempts": 1})
    client = s3_client(settings, config)
    try:
        client.list_buckets()
    except botocore.exceptions.ClientError as error:
        code = error.response["Error"]["Code"]
        if code in {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch"}:
            raise CredentialsError(_refused("object store", settings.s3_endpoint, "AWS_ACCESS_KEY_ID")) from error
        raise ServiceDownError(_down("object store", settings.s3_endpoint)) from error
    except botocore.exceptions.BotoCoreError as error:
        raise ServiceDownError(_down("object store", settings.s3_endpoint)) from error


def probe_online_store(settings: Settings, timeout_s: float) -> None:
    """Send `PING`.

    Raises:
        ServiceDownError: The online store does not answer.
        CredentialsError: It refuses the password.
    """
    import redis

    address = settings.redis.split(",", 1)[0]
    try:
        with redis.Redis.from_url(
            settings.redis_url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s
        ) as client:
            client.ping()
    except redis.AuthenticationError as error:
        raise CredentialsError(_refused("online store", address, "REDIS_CONNECTION_STRING")) from error
    except (redis.RedisError, OSError) as error:
        raise ServiceDownError(_down("online store", address)) from error


def probe_mlflow(settings: Settings, timeout_s: float) -> None:
    """Ask for an experiment by id, which needs the database and the credentials; `/health` needs neither.

    Raises:
        ServiceDownError: The MLflow server does not answer.
        CredentialsError: It refuses the user.
    """
    import requests

    try:
        answer = requests.get(
            f"{settings.tracking_uri}/api/2.0/mlflow/experiments/get",
            params={"experiment_id": "0"},
            auth=(settings.tracking_username, settings.tracking_password),
            timeout=timeout_s,
        )
    except requests.RequestException as error:
        raise ServiceDownError(_down("MLflow server", settings.tracking_uri)) from error
    if answer.status_code in {401, 403}:
        raise CredentialsError(_refused("MLflow server", settings.tracking_uri, "MLFLOW_TRACKING_USERNAME"))
    if not answer.ok:
        raise ServiceDownError(
            f"the MLflow server at {settings.tracking_uri} answers {answer.status_code}; see its log"
        )


def _down(service: str, address: str) -> str:
    return f"the {service} at {address} does not answer; run 'make up', then 'make status'"


def _refused(service: str, address: str, variable: str) -> str:
    return f"the {service} at {address} refuses the credentials; check {variable}, or run 'make env' again"
