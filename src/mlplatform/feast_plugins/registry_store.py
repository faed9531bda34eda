"""The feature registry in the object store: written by those who have the key, data and never code, no change lost.

Feast rewrites the whole registry with every change, so the slower of two writers would undo the other's work in
silence; and it executes the functions that a registry holds (CVE-2026-18948), so whoever can write the object would
run code wherever it is read. The class here writes only over the version that was read and joins what others changed
meanwhile, checks a keyed digest before it parses anything, and takes functions from `feature_repo` alone.

`python -m mlplatform.feast_plugins.registry_store FOLDER` adds the digest to a registry that has none.
"""

from __future__ import annotations

import hashlib
import hmac
import linecache
import os
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import chdir, contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import botocore.exceptions
import click
import dill  # type: ignore[import-untyped]
from feast.infra.registry.registry_store import RegistryStore
from feast.protos.feast.core.FeatureView_pb2 import FeatureView as FeatureViewProto
from feast.protos.feast.core.OnDemandFeatureView_pb2 import OnDemandFeatureView as OnDemandFeatureViewProto
from feast.protos.feast.core.Registry_pb2 import Registry as RegistryProto
from feast.protos.feast.core.StreamFeatureView_pb2 import StreamFeatureView as StreamFeatureViewProto
from feast.repo_config import RegistryConfig, load_repo_config
from feast.utils import _utc_now
from google.protobuf.message import DecodeError, Message  # type: ignore[import-untyped]

from mlplatform import objectstore
from mlplatform.connection import s3_client
from mlplatform.errors import PlatformError, RegistryError, SettingsError
from mlplatform.objectstore import s3_errors

KEY_VARIABLE = "FEATURE_REGISTRY_KEY"
ATTEMPTS = 20
_CONFLICTS = {"PreconditionFailed", "ConditionalRequestConflict", "412", "409"}
# The digest stands at the end as one more field of the message, with a number that Feast does not use: other readers
# skip it, and it goes wherever the object goes.
_TRAILER = b"\xfa\xff\x7f\x20"
_DIGEST_BYTES = 32
_VIEW_MESSAGES: dict[str, Any] = {
    "stream_feature_view": StreamFeatureViewProto,
    "on_demand_feature_view": OnDemandFeatureViewProto,
}

# What this process itself registered; its functions are known without a look into `feature_repo`.
_OWN_FUNCTIONS: set[bytes] = set()
_APPLYING: ContextVar[bool] = ContextVar("applying", default=False)
_AFTER_COMMIT: dict[tuple[str, str, str], Callable[[], None]] = {}


class ConditionalS3RegistryStore(RegistryStore):
    """Keeps the registry in one object, authenticated by a key, and never overwrites a change it has not seen.

    `feature_store.yaml` names this class, so Feast's own commands are protected too. The endpoint and the keys come
    from the standard `AWS_*` variables, the registry's key from `FEATURE_REGISTRY_KEY`.

    Args:
        registry_config: Feast's configuration; `path` is `s3://bucket/key`.
        repo_path: The feature repository, whose functions a registry may name.
    """

    def __init__(self, registry_config: RegistryConfig, repo_path: Path | None) -> None:
        self._uri = str(registry_config.path)
        self._bucket, self._key = objectstore.split_uri(self._uri)
        self._repo = Path(repo_path) if repo_path else None
        self._client = s3_client()
        self._etag: str | None = None
        self._base = RegistryProto()
        self._handed_on: RegistryProto | None = None

    def get_registry_proto(self) -> RegistryProto:
        """Read the registry and remember which version of it that was.

        Feast's cache of it may expire in the middle of an apply. What was changed and not yet written is handed on
        again then, since reading anew would lose it.

        Raises:
            MissingObjectError: There is none yet. It is a `FileNotFoundError`, upon which Feast makes an empty one.
            RegistryError: It was written without the key, is damaged, or brings code that `feature_repo` does not.
        """
        if self._handed_on is not None and self._handed_on != self._base:
            return self._handed_on
        self._etag = None
        self._base, self._etag = self._read()
        self._handed_on = _copy(self._base)
        return self._handed_on

    def update_registry_proto(self, registry_proto: RegistryProto) -> None:
        """Write the registry; what others wrote since it was read is read again and joined with it.

        Raises:
            RegistryError: Another command changed the same object meanwhile; nothing is written, here or online.
        """
        registry_proto.version_id = str(uuid.uuid4())
        registry_proto.last_updated.FromDatetime(_utc_now())
        _OWN_FUNCTIONS.update(_fingerprint(function) for _, function in _functions(registry_proto))
        wanted = _copy(registry_proto)
        try:
            for _ in range(ATTEMPTS):
                if self._put(wanted):
                    break
                theirs, self._etag = self._read()
                wanted = merge(self._base, registry_proto, theirs, self._uri)
            else:
                raise LostRaceError(f"{self._uri} kept changing meanwhile; nothing was written, run it again")
        except BaseException:
            self._handed_on = None
            _drop_pending(self._uri)
            raise
        registry_proto.CopyFrom(wanted)
        self._base, self._handed_on = _copy(wanted), registry_proto
        _run_pending(self._uri, wanted)

    def teardown(self) -> None:
        """Delete the registry."""
        with s3_errors(self._uri):
            self._client.delete_object(Bucket=self._bucket, Key=self._key)
        self._etag, self._handed_on, self._base = None, None, RegistryProto()

    def sign(self) -> str:
        """Add the digest to a registry that has none, provided that it brings no code of its own.

        Returns:
            What was done.
        """
        body, etag = self._get()
        with suppress(RegistryError):
            verified(body, self._uri)
            return f"{self._uri} has its digest already"
        registry = _parsed(body, self._uri)
        check_functions(registry, self._repo, self._uri)
        self._etag = etag
        if not self._put(registry):
            raise RegistryError(f"{self._uri} was changed by another command meanwhile; nothing was written")
        return f"{self._uri} has a digest now"

    def _read(self) -> tuple[RegistryProto, str]:
        body, etag = self._get()
        with _one_line_for_commands():
            registry = _parsed(verified(body, self._uri), self._uri)
            check_functions(registry, self._repo, self._uri)
        return registry, etag

    def _get(self) -> tuple[bytes, str]:
        with s3_errors(self._uri):
            answer = self._client.get_object(Bucket=self._bucket, Key=self._key)
            return answer["Body"].read(), answer["ETag"]

    def _put(self, registry: RegistryProto) -> bool:
        condition: dict[str, Any] = {"IfMatch": self._etag} if self._etag else {"IfNoneMatch": "*"}
        body = signed(registry.SerializeToString())
        with s3_errors(self._uri):
            try:
                answer = self._client.put_object(Bucket=self._bucket, Key=self._key, Body=body, **condition)
            except botocore.exceptions.ClientError as error:
                if error.response["Error"]["Code"] not in _CONFLICTS:
                    raise
                return False
        self._etag = answer["ETag"]
        return True


class LostRaceError(RegistryError):
    """Another command changed the same object; nothing was written."""


@contextmanager
def _one_line_for_commands() -> Iterator[None]:
    try:
        yield
    except PlatformError as error:
        # Feast's commands print a traceback of every other error.
        if click.get_current_context(silent=True) is None:
            raise
        raise click.ClickException(str(error)) from error


def signed(body: bytes) -> bytes:
    """Append the digest to a serialised registry."""
    return body + _TRAILER + _digest(body)


def verified(body: bytes, uri: str) -> bytes:
    """Take the digest off again.

    Raises:
        RegistryError: It is missing or wrong.
    """
    content, trailer = body[: -len(_TRAILER) - _DIGEST_BYTES], body[-len(_TRAILER) - _DIGEST_BYTES :]
    if not trailer.startswith(_TRAILER):
        raise RegistryError(
            f"{uri} has no digest: it is cut short, or was written without {KEY_VARIABLE}; if you trust it, run "
            "'python -m mlplatform.feast_plugins.registry_store feature_repo'"
        )
    if not hmac.compare_digest(trailer[len(_TRAILER) :], _digest(content)):
        raise RegistryError(
            f"{uri} was written with another {KEY_VARIABLE} or changed since; restore it, or remove it and run "
            "'make features'"
        )
    return content


def _digest(body: bytes) -> bytes:
    key = os.environ.get(KEY_VARIABLE, "")
    if not key:
        raise SettingsError(f"{KEY_VARIABLE} is not set, and the feature registry is read with it; run 'make env'")
    return hmac.new(key.encode(), body, hashlib.sha256).digest()


def _parsed(body: bytes, uri: str) -> RegistryProto:
    try:
        registry: RegistryProto = RegistryProto.FromString(body)
    except DecodeError as error:
        raise RegistryError(f"{uri} is no feature registry; remove it and run 'make features'") from error
    return registry


# Functions


def check_functions(registry: RegistryProto, repo: Path | None, uri: str) -> None:
    """Refuse code that the feature repository does not bring, and replace what is stored by what it brings.

    Feast stores a function as source and as a pickle. Equal sources say nothing about the pickle, so Feast gets the
    repository's own.

    Raises:
        RegistryError: A function, or an older version of a view with one, is not in the repository.
    """
    found = list(_functions(registry))
    unknown = [(path, function) for path, function in found if _fingerprint(function) not in _OWN_FUNCTIONS]
    records = registry.feature_view_version_history.records
    if not unknown and not records:
        return
    known = _repository_functions(repo) if repo and unknown else {}
    for path, function in unknown:
        own = known.get(_source(function))
        if own is not None:
            function.CopyFrom(own)
        elif _is_applying():
            # Apply replaces or removes the view; until then a function that does nothing stands in.
            _disarm(function)
        else:
            raise RegistryError(
                f"{uri} brings code that feature_repo does not have, in {path}; it was not run. Restore the registry, "
                "or bring it in line with 'make features'"
            )
    for record in records:
        _disarm_record(record, known)


def _disarm(function: Message) -> None:
    for field, _ in function.ListFields():
        if field.type == field.TYPE_BYTES:
            setattr(function, field.name, dill.dumps(_unchanged))
        elif field.name == "body_text":
            function.body_text = "def unchanged(values):\n    return values\n"


def _disarm_record(record: Message, known: Mapping[tuple[str, ...], Message]) -> None:
    """Take code out of a view's earlier versions, which Feast keeps in serialised form."""
    view: Any = _VIEW_MESSAGES.get(record.feature_view_type, FeatureViewProto).FromString(record.feature_view_proto)
    functions = [function for _, function in _functions(view) if _fingerprint(function) not in _OWN_FUNCTIONS]
    for function in functions:
        own = known.get(_source(function))
        if own is not None:
            function.CopyFrom(own)
        else:
            _disarm(function)
    if functions:
        record.feature_view_proto = view.SerializeToString()


def _unchanged(values: Any) -> Any:
    return values


@contextmanager
def applying() -> Iterator[None]:
    """Mark that definitions are being applied, which replaces those in the registry that are outdated."""
    token = _APPLYING.set(True)
    try:
        yield
    finally:
        _APPLYING.reset(token)


def _is_applying() -> bool:
    command = click.get_current_context(silent=True)
    return _APPLYING.get() or (command is not None and command.info_name in {"apply", "plan"})


def _functions(message: Message, path: str = "registry") -> Iterator[tuple[str, Message]]:
    """Find every part that Feast would execute, wherever it stands."""
    if type(message).__name__.startswith(("UserDefinedFunction", "SubstraitTransformation", "UserDefinedProfiler")):
        yield path, message
        return
    for field, value in message.ListFields():
        if field.type != field.TYPE_MESSAGE:
            continue
        if field.message_type.GetOptions().map_entry:
            parts = [part for part in value.values() if isinstance(part, Message)]
        else:
            parts = [value] if isinstance(value, Message) else list(value)
        for part in parts:
            name = getattr(getattr(part, "spec", part), "name", "")
            yield from _functions(part, f"{path}/{name}" if name else path)


@contextmanager
def importing_from(folder: Path) -> Iterator[None]:
    """Let Feast import a repository's files as top-level modules, and forget them afterwards."""
    before, bytecode = set(sys.modules), sys.dont_write_bytecode
    sys.path.insert(0, str(folder))
    try:
        with chdir(folder):
            yield
    finally:
        sys.path.remove(str(folder))
        sys.dont_write_bytecode = bytecode
        for name in {path.stem for path in folder.glob("*.py")} - before:
            sys.modules.pop(name, None)


def _repository_functions(repo: Path) -> dict[tuple[str, ...], Message]:
    from feast.repo_operations import _get_repo_contents

    config = load_repo_config(repo, repo / "feature_store.yaml")
    linecache.checkcache()  # a function's source is looked up there, and a file may have changed since
    with importing_from(repo):
        contents = _get_repo_contents(repo, config.project, config)
    views = [*contents.feature_views, *contents.on_demand_feature_views, *contents.stream_feature_views]
    return {_source(function): function for view in views for _, function in _functions(view.to_proto())}


def _source(function: Message) -> tuple[str, ...]:
    if type(function).__name__.startswith("UserDefinedFunction"):
        return function.name, function.body_text, getattr(function, "mode", "")
    return ("", hashlib.sha256(function.SerializeToString()).hexdigest())


def _fingerprint(function: Message) -> bytes:
    return hashlib.sha256(function.SerializeToString()).digest()


# Two writers


def merge(base: RegistryProto, mine: RegistryProto, theirs: RegistryProto, uri: str) -> RegistryProto:
    """Join two changes of one registry, object by object.

    An object that one side changed is that side's. Where both changed one, its definition and its history of
    materialising are taken apart: definitions must not differ, histories are united.

    Raises:
        RegistryError: Both changed one definition.
    """
    joined: RegistryProto = _copy(theirs)
    for field in mine.DESCRIPTOR.fields:
        if field.type != field.TYPE_MESSAGE or not field.is_repeated:
            continue
        old, ours, others = (_by_name(getattr(registry, field.name)) for registry in (base, mine, theirs))
        kept = []
        for name in dict.fromkeys([*others, *ours]):
            chosen = _choose(old.get(name), ours.get(name), others.get(name), f"{name[1]} in {uri}")
            kept += [chosen] if chosen is not None else []
        joined.ClearField(field.name)
        getattr(joined, field.name).extend(kept)
    records = joined.feature_view_version_history.records
    records.extend(record for record in mine.feature_view_version_history.records if record not in records)
    if mine.infra != base.infra:
        joined.infra.CopyFrom(mine.infra)
    joined.version_id = mine.version_id
    joined.last_updated.CopyFrom(mine.last_updated)
    return joined


def _choose(old: Message | None, ours: Message | None, others: Message | None, what: str) -> Message | None:
    if ours == others or _same(ours, old):
        return others
    if _same(others, old):
        return ours
    if old is None or ours is None or others is None:
        if ours is not None and others is not None and _same(ours, others):
            return ours
        raise _lost(what)
    if not hasattr(ours, "spec") or not hasattr(ours.meta, "materialization_intervals"):
        raise _lost(what)
    joined = _copy(ours if ours.spec != old.spec else others)
    if ours.spec != old.spec and others.spec not in (old.spec, ours.spec):
        raise _lost(what)
    intervals = {
        interval.SerializeToString(deterministic=True): interval
        for message in (others, ours)
        for interval in message.meta.materialization_intervals
    }
    del joined.meta.materialization_intervals[:]
    joined.meta.materialization_intervals.extend(intervals.values())
    return joined


def _same(one: Message | None, other: Message | None) -> bool:
    """Compare without the time of the last change, which Feast renews when nothing else is new."""
    if one is None or other is None:
        return one is other
    plain = [_copy(one), _copy(other)]
    for message in plain:
        for owner in (message, getattr(message, "meta", None)):
            if owner is not None and "last_updated_timestamp" in owner.DESCRIPTOR.fields_by_name:
                owner.ClearField("last_updated_timestamp")
    return bool(plain[0] == plain[1])


def _lost(what: str) -> LostRaceError:
    return LostRaceError(
        f"{what} was changed by another command meanwhile; nothing was written, in the registry or online, run it again"
    )


def _by_name(objects: Any) -> dict[tuple[str, str], Message]:
    named = {}
    for place, entry in enumerate(objects):
        owner = entry.spec if "spec" in entry.DESCRIPTOR.fields_by_name else entry
        name = getattr(owner, "name", "") or getattr(owner, "project", "") or str(place)
        named[(getattr(owner, "project", ""), str(name))] = entry
    return named


def _copy(message: Any) -> Any:
    fresh = type(message)()
    fresh.CopyFrom(message)
    return fresh


# What waits for the commit


def after_commit(registry: RegistryConfig, project: str, view: str, action: Callable[[], None]) -> None:
    """Do something about a view that is gone once the registry without it is written; at once for other stores."""
    if not str(registry.registry_store_type or "").endswith(ConditionalS3RegistryStore.__name__):
        action()
        return
    _AFTER_COMMIT[str(registry.path), project, view] = action


def _run_pending(uri: str, registry: RegistryProto) -> None:
    views = [*registry.feature_views, *registry.stream_feature_views, *registry.on_demand_feature_views]
    kept = {(view.spec.project, view.spec.name) for view in views}
    for key in [key for key in _AFTER_COMMIT if key[0] == uri]:
        action = _AFTER_COMMIT.pop(key)
        if key[1:] not in kept:
            action()


def _drop_pending(uri: str) -> None:
    for key in [key for key in _AFTER_COMMIT if key[0] == uri]:
        del _AFTER_COMMIT[key]


def main() -> None:
    """Add the digest to the registry of the feature repository that the command line names."""
    from mlplatform.connection import connect

    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "feature_repo").resolve()
    try:
        connect()
        config = load_repo_config(folder, folder / "feature_store.yaml")
        sys.stdout.write(ConditionalS3RegistryStore(config.registry, folder).sign() + "\n")
    except PlatformError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
