"""The feature store: write the history, apply, materialise, ask the history, read online.

Each function calls Feast's own API. It adds clear errors, figures of what was done, and an explicit answer for a user
who is not stored. Feast reads the platform's addresses from the environment, so call `connect` first.
"""

from __future__ import annotations

import contextlib
import io
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path

import pandas as pd
import redis
from feast import FeatureService, FeatureStore
from feast.errors import FeastObjectNotFoundException
from feast.repo_config import load_repo_config
from feast.repo_operations import apply_total

from mlplatform import history, objectstore, table
from mlplatform.errors import (
    DataError,
    MissingObjectError,
    RegistryError,
    ServiceDownError,
    credentials_refused,
    service_down,
)
from mlplatform.feast_plugins.compute_engine import MaterialisedView, PipelinedComputeEngine
from mlplatform.feast_plugins.registry_store import LostRaceError, applying, importing_from
from mlplatform.feature_client import NEXT_STEP, checked_users, online_frame
from mlplatform.settings import FEATURES_BUCKET, find_root

__getattr__ = table.names(
    __name__,
    # One day past the window, so that its last moments are in.
    MATERIALISE_END=lambda described: pd.Timestamp(described.entity.end, tz="UTC") + pd.Timedelta(days=1),
)

Notify = Callable[[str], None]


def write_history(versions: pd.DataFrame, *, notify: Notify = lambda _: None) -> dict[str, str]:
    """Store the history as one parquet file per view, under the names in `feature_repo`, if its bytes have changed.

    Args:
        versions: The history, as `history.build_history` returns it.
        notify: Called with a line per file.

    Returns:
        Where each view's file is, by view.
    """
    return {
        view: _write(frame, f"s3://{FEATURES_BUCKET}/{view}.parquet", notify)
        for view, frame in history.split_views(versions).items()
    }


def _write(frame: pd.DataFrame, uri: str, notify: Notify) -> str:
    body = objectstore.encode(frame, uri)
    with contextlib.suppress(MissingObjectError):
        if objectstore.read_bytes(uri) == body:
            notify(f"{uri}: {len(frame):,} rows, there already")
            return uri
    notify(f"{uri}: {len(frame):,} rows written")
    return objectstore.write_bytes(body, uri)


def open_store(repo: Path | None = None) -> FeatureStore:
    """Open the feature store; unlike `FeatureStore(...)`, refuse if there is no registry, and write no empty one.

    Args:
        repo: The folder of `feature_store.yaml`, by default `feature_repo` of the clone around the working directory.

    Raises:
        RegistryError: There is no registry yet, it was written without the key, or it brings code.
        ServiceDownError: The object store does not answer.
    """
    folder = _folder(repo)
    uri = str(load_repo_config(folder, folder / "feature_store.yaml").registry.path)
    try:
        objectstore.read_bytes(uri)
    except MissingObjectError as error:
        # Feast would write an empty registry now, and say later that nothing is registered.
        raise RegistryError(f"there is no feature registry at {uri}; {NEXT_STEP}") from error
    store = FeatureStore(repo_path=str(folder))
    # Feast reads the registry when it is first needed; what is refused shall be refused here.
    store.refresh_registry()  # type: ignore[no-untyped-call]
    return store


def apply(repo: Path | None = None, *, notify: Notify = lambda _: None) -> FeatureStore:
    """Do what `feast apply` does, in this process: the command spends most of its time on importing Feast.

    Args:
        repo: As in `open_store`.
        notify: Called with each line that Feast prints.

    Raises:
        RegistryError: Another command kept changing the same definitions meanwhile; nothing was written.
        ServiceDownError: The object store or the online store does not answer.
    """
    folder = _folder(repo)
    config = load_repo_config(folder, folder / "feature_store.yaml")
    with importing_from(folder), _store_errors(config.online_store.connection_string), _captured(notify), applying():
        _retry_lost_races(lambda: apply_total(config, folder, skip_source_validation=True))
    return FeatureStore(repo_path=str(folder))


def materialise(
    store: FeatureStore,
    start: datetime | None = None,
    end: datetime | None = None,
    *,
    notify: Notify = lambda _: None,
) -> list[MaterialisedView]:
    """Call `FeatureStore.materialize` view by view; adds what each view wrote, and errors where Feast succeeds in vain.

    The latest value of each user in the time range goes to the online store. It replaces an earlier value and never a
    later one, so doing it twice changes nothing.

    Args:
        store: The feature store.
        start: The range's first moment, by default the history's; UTC if naive.
        end: Its last moment, included; by default a day past the history's window.
        notify: Called with a line per view, and one for all.

    Returns:
        What was done, view by view.

    Raises:
        DataError: The range is empty or inverted, or no feature has a value in it.
        RegistryError: Nothing is registered, or another command changed the registry meanwhile.
        ServiceDownError: The object store or the online store does not answer.
    """
    described = table.current().entity
    start, end = start or pd.Timestamp(described.start), end or pd.Timestamp(described.end) + pd.Timedelta(days=1)
    if not _utc(start) < _utc(end):
        raise DataError(f"no time lies between {start} and {end}; give a start before the end")
    views = [view.name for view in store.list_feature_views()]
    if not views:
        raise RegistryError(f"no feature view is registered; {NEXT_STEP}")
    engine: PipelinedComputeEngine = store._get_provider().batch_engine  # type: ignore[attr-defined]
    done: list[MaterialisedView] = []
    engine.listener = done.append
    try:
        for view in views:
            with _store_errors(store.config.online_store.connection_string, store), _captured():
                store.materialize(_utc(start).to_pydatetime(), _utc(end).to_pydatetime(), feature_views=[view])
            notify(f"{view}: {_figures(done[-1:])}")
    finally:
        engine.listener = None
    if not any(written.rows for written in done):
        raise DataError(f"no feature has a value between {start} and {end}; give a range within the history")
    notify(f"all: {_figures(done)}")
    return done


def build(data_path: Path | None = None, repo: Path | None = None, *, notify: Notify = print) -> list[MaterialisedView]:
    """Do all steps from the table's file to features online; doing them twice changes nothing.

    Args:
        data_path: The file, by default the described one.
        repo: As in `open_store`.
        notify: Called with a line for each step.

    Returns:
        What was materialised, view by view.
    """
    started = time.perf_counter()
    versions = history.build_history(table.read(data_path))
    write_history(versions, notify=notify)
    store = apply(repo, notify=notify)
    written = materialise(store, notify=notify)
    notify(f"done in {time.perf_counter() - started:.1f} s")
    return written


def point_in_time(
    store: FeatureStore, entity_df: pd.DataFrame, features: str | Sequence[str] | None = None
) -> pd.DataFrame:
    """Call `get_historical_features`: what was known of each user at each moment; misspelt names are named.

    Args:
        store: The feature store.
        entity_df: The key, `event_timestamp` (UTC if naive), and any other columns, which are kept.
        features: The name of a feature service, by default the model's, or `view:feature` for each feature.

    Returns:
        The same rows in the same order with a column per feature. A value is null if it did not exist yet, is older
        than the view's ttl, or if the user is unknown.

    Raises:
        DataError: The entity frame lacks a column, or `event_timestamp` holds no times.
        RegistryError: The service, a view or a feature is not registered.
        MissingObjectError: A feature file is not there.
        ServiceDownError: The object store does not answer.
    """
    with _store_errors(store.config.online_store.connection_string, store):
        job = store.get_historical_features(entity_df=entity_df, features=_resolve(store, features))
        frame: pd.DataFrame = job.to_df()
    return frame


def read_online(store: FeatureStore, users: Sequence[str], features: str | Sequence[str] | None = None) -> pd.DataFrame:
    """Call `get_online_features`; adds a column that tells a user without a stored value from one whose value is null.

    A value past its ttl is gone if `expire_online` is on in `feature_store.yaml`. Ours is off: it stays, however old.

    Args:
        store: The feature store.
        users: User ids.
        features: As in `point_in_time`.

    Returns:
        One row per user, in the order asked: the key, `found` (bool: every feature asked for is stored), and the
        features, which are null for a user who is not found.

    Raises:
        DataError: No user was asked about, or an id is no text.
        RegistryError: As in `point_in_time`.
        ServiceDownError: The online store does not answer.
    """
    key = table.current().entity.key
    rows = [{key: user} for user in checked_users(users)]
    with _store_errors(store.config.online_store.connection_string, store):
        answer = store.get_online_features(features=_resolve(store, features), entity_rows=rows)
    columns = answer.to_dict(include_event_timestamps=True)
    names = [name for name in columns if name != key and not name.endswith("__ts")]
    return online_frame(
        users,
        {name: columns[name] for name in names},
        [[moment > 0 for moment in columns[f"{name}__ts"]] for name in names],
    )


def _resolve(store: FeatureStore, features: str | Sequence[str] | None) -> FeatureService | list[str]:
    """Look the names up in the registry, so that the error for a misspelt one lists those that exist."""
    features = features or table.current().service
    if isinstance(features, str):
        service: FeatureService = store.get_feature_service(features)
        return service
    for reference in features:
        view, _, feature = reference.partition(":")
        known = [field.name for field in store.get_feature_view(view).features]
        if feature not in known:
            raise RegistryError(f"view {view!r} has no feature {feature!r}; it has {', '.join(known)}")
    return list(features)


def _retry_lost_races(act: Callable[[], None]) -> None:
    """Do again, on the registry as it is now, what another command's change of the same object prevented."""
    for _ in range(2):
        with contextlib.suppress(LostRaceError):
            return act()
    return act()


@contextlib.contextmanager
def _store_errors(online_store: str, store: FeatureStore | None = None) -> Iterator[None]:
    """Turn the errors of Feast and Redis into ours; those that mean nothing here pass unchanged."""
    address = online_store.partition(",")[0]
    try:
        yield
    except FeastObjectNotFoundException as error:
        known = _registered(store) if store else ""
        raise RegistryError(f"{error}; {known}check the name, or {NEXT_STEP}") from error
    except redis.AuthenticationError as error:
        raise credentials_refused("online store", address, "REDIS_CONNECTION_STRING") from error
    except redis.RedisError as error:
        if "MISCONF" in str(error):  # Redis' word for a file of its own that it cannot write
            raise ServiceDownError(
                f"no space left where the online store at {address} keeps its data, or its disk fails; free some, then "
                "do this again: what is stored can be read meanwhile"
            ) from error
        raise service_down("online store", address) from error


def _registered(store: FeatureStore) -> str:
    names = [view.name for view in store.list_feature_views()]
    names += [service.name for service in store.list_feature_services()]
    return f"registered are {', '.join(names)}; " if names else "nothing is registered; "


@contextlib.contextmanager
def _captured(notify: Notify = lambda _: None) -> Iterator[None]:
    """Catch what Feast prints, and call `notify` with each line."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        yield
    for line in said.getvalue().splitlines():
        if line.strip():
            notify(line.strip())


def _folder(repo: Path | None) -> Path:
    folder = (repo or find_root() / "feature_repo").resolve()
    if not (folder / "feature_store.yaml").is_file():
        raise MissingObjectError(f"{folder} holds no feature_store.yaml; give the feature repository's folder")
    return folder


def _utc(moment: datetime) -> pd.Timestamp:
    stamp = pd.Timestamp(moment)
    return stamp.tz_localize("UTC") if stamp.tzinfo is None else stamp.tz_convert("UTC")


def _figures(done: Sequence[MaterialisedView]) -> str:
    rows, changed = sum(entry.rows for entry in done), sum(entry.changed for entry in done)
    seconds = sum(entry.seconds for entry in done)
    return f"{rows:,} rows, {changed:,} new or newer, {seconds:.1f} s, {rows / seconds:,.0f} rows/s"
