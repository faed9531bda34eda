"""The errors this package raises on purpose.

Each message is one line: what was asked, what was found, and what to type next. The commands print it without
a stack trace. Every class also inherits the built-in error that fits, so that callers need not import this module.
"""

from __future__ import annotations


class PlatformError(Exception):
    """Base of every error raised on purpose."""


class SettingsError(PlatformError, ValueError):
    """A setting is missing or unusable."""


class ServiceDownError(PlatformError, ConnectionError):
    """A service does not answer."""


class CredentialsError(PlatformError, PermissionError):
    """A service answers, and refuses the credentials."""


def service_down(service: str, address: str) -> ServiceDownError:
    """Make the error for a service of the platform that does not answer."""
    return ServiceDownError(f"the {service} at {address} does not answer; run 'make up', then 'make status'")


def credentials_refused(service: str, address: str, variable: str) -> CredentialsError:
    """Make the error for a service of the platform that refuses what `variable` holds."""
    return CredentialsError(
        f"the {service} at {address} refuses the credentials; check {variable}, or run 'make env' again"
    )


class PortTakenError(PlatformError, OSError):
    """A port that was asked for is in use by another program."""


class MissingObjectError(PlatformError, FileNotFoundError):
    """A bucket, an object or a file is not there."""


class DataError(PlatformError, ValueError):
    """Data does not look as it must."""


class RegistryError(PlatformError, LookupError):
    """A run, a model, a version, an alias or a feature is not registered."""


class UntrustedModelError(PlatformError, PermissionError):
    """A model's files are not those that were signed, or are of a kind that we do not load."""


class NotebookError(PlatformError, RuntimeError):
    """A notebook failed, or was given parameters that it does not declare."""


class ClusterError(PlatformError, RuntimeError):
    """The cluster cannot be reached, is the wrong one, or did not reach the state asked for."""
