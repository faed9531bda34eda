"""The object store's refusals and silences as errors of ours, each with what to do next."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import format_datetime

import botocore.exceptions

from mlplatform.errors import CredentialsError, DataError, MissingObjectError, ServiceDownError

# What is answered to a request that was signed at another time than the store's own; minutes are forgiven.
CLOCK_CODES = frozenset({"RequestTimeTooSkewed", "RequestExpired"})

REFUSED_CODES = frozenset({"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "403"})
_ABSENT = {"NoSuchKey", "404"}


@contextmanager
def s3_errors(uri: str) -> Iterator[None]:
    """Turn boto3's errors into ours; those that mean nothing here pass unchanged.

    Args:
        uri: What is read or written, for the message.

    Raises:
        DataError: The name is longer than the store allows, such as 255 bytes between two slashes.
        MissingObjectError: The bucket or the object is not there.
        CredentialsError: The object store refuses the keys.
        ServiceDownError: The object store does not answer, or fails.
    """
    try:
        yield
    except botocore.exceptions.ClientError as error:
        code = error.response["Error"]["Code"]
        if code in CLOCK_CODES:
            raise clocks_differ(uri, error) from error
        if code in REFUSED_CODES:
            raise CredentialsError(
                f"the object store refuses the credentials for {uri}; check AWS_ACCESS_KEY_ID, or run 'make env' again"
            ) from error
        if code == "NoSuchBucket":
            bucket = uri.removeprefix("s3://").partition("/")[0]
            raise MissingObjectError(f"{uri}: there is no bucket {bucket}; run 'make up', which makes it") from error
        if code == "KeyTooLongError":
            raise DataError(f"the object store refuses {uri[:60]}... as too long a name; shorten it") from error
        if code in _ABSENT:
            raise MissingObjectError(f"{uri} is not there; run the notebook that writes it, or 'make run'") from error
        if error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0) >= 500:
            # SeaweedFS says no more than this of a disk that is full; MinIO answers 507.
            raise ServiceDownError(
                f"the object store fails on {uri} ({code}): no space left, if its disk is full; see 'make status'"
            ) from error
        raise
    except (botocore.exceptions.NoCredentialsError, botocore.exceptions.PartialCredentialsError) as error:
        raise CredentialsError(f"no credentials for {uri}; call connect(), or run 'make env'") from error
    except (botocore.exceptions.ConnectionError, botocore.exceptions.HTTPClientError) as error:
        raise ServiceDownError(
            f"the object store does not answer for {uri}; run 'make up', then 'make status'"
        ) from error


def clocks_differ(address: str, error: botocore.exceptions.ClientError) -> CredentialsError:
    """Make the error for a signature that is refused because the object store's clock says another time."""
    ours = format_datetime(datetime.now(UTC), usegmt=True)
    theirs = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("date") or "another time"
    return CredentialsError(
        f"the object store refuses {address} for the time in the signature: here it is {ours}, and there {theirs}; "
        "set the clock that is wrong, then do this again"
    )
