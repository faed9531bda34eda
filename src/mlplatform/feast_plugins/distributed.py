"""The as-of join and the bulk load on a Dask cluster, by hash of the key.

A worker reads a range of a file's rows and splits them by key into shares; another one, for each share, puts the
pieces into a parquet file of its own and does with it what a laptop does with the whole: `point_in_time.point_in_time`
or `PipelinedComputeEngine`. So the answers are the laptop's. The driver reads schemas and numbers of rows, hands out
the rows asked, and puts the answers in order.

Workers find the object store and the online store in their own environment: no address and no credential is in a
task's arguments, which a dashboard shows. Dask spills pieces that do not fit into memory to disk, and computes again
what a lost worker held.
"""

from __future__ import annotations

import operator
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from feast import Entity, FeatureView, FileSource, RepoConfig
from feast.data_format import ParquetFormat
from feast.infra.common.materialization_job import MaterializationTask
from feast.infra.compute_engines.local.compute import LocalComputeEngine
from feast.infra.registry.base_registry import BaseRegistry
from feast.utils import _get_column_names

from mlplatform.engines import cluster
from mlplatform.errors import PlatformError, SettingsError
from mlplatform.feast_plugins import point_in_time as one_machine
from mlplatform.feast_plugins.duckdb_s3 import connection, duckdb_errors, quote_name, quote_text
from mlplatform.feast_plugins.parquet_source import ParquetFile, family
from mlplatform.feast_plugins.point_in_time import Lookup

PLACE = "__place"


@dataclass(frozen=True)
class Span:
    """Rows of one parquet file: from `start` up to `stop`, which is not included."""

    uri: str
    start: int
    stop: int


def join_of(config: RepoConfig) -> Callable[..., pa.Table] | None:
    """Give the join on the cluster that `feature_store.yaml` names; `None` where none is named."""
    scheduler = scheduler_of(config)
    return partial(point_in_time, scheduler) if scheduler else None


def point_in_time(
    scheduler: str, entities: pa.Table, time_column: str, views: Sequence[Lookup], *, created_before: bool = False
) -> pa.Table:
    """Do what `point_in_time.point_in_time` does on the cluster; arguments, answer and errors are the same.

    Args:
        scheduler: The scheduler's address, `tls://host:port`.
        entities: The rows asked.
        time_column: The moment each row asks about.
        views: What to look up.
        created_before: Whether a value counts only if it was written before that moment.
    """
    keys = dict.fromkeys(column for view in views for column in view.keys.values())
    asked = entities.select([*keys, time_column]).append_column(PLACE, pa.array(np.arange(len(entities))))
    with connection() as duck:
        plans = [_plan(duck, view, asked) for view in views]
    found = cluster.on_cluster(scheduler, partial(_join, asked, time_column, views, plans, created_before))
    answer = entities
    for view, columns in zip(views, found, strict=True):
        for name in view.features:
            answer = answer.append_column(name, columns.column(name))
    return answer


def _join(
    asked: pa.Table,
    time_column: str,
    views: Sequence[Lookup],
    plans: Sequence[tuple[Sequence[Sequence[Span]], Mapping[str, str]]],
    created_before: bool,
    client: Any,
    gather: cluster.Gather,
) -> list[pa.Table]:
    """Give each view's features, in the order of the rows asked."""
    size = cluster.ROWS_PER_TASK
    slices = [asked.slice(start, size) for start in range(0, max(len(asked), 1), size)]
    questions = client.scatter(slices, hash=False)
    waiting = []
    for view, (spans, types) in zip(views, plans, strict=True):
        count = _shares(client, view.keys, spans, len(asked))
        known = [client.submit(read_and_split, view, part, types, count, pure=False) for part in spans]
        names = list(view.keys.values()), types, list(view.keys)
        posed = [client.submit(split, part, *names, count, pure=False) for part in questions]
        shares = zip(_turned(client, known, count), _turned(client, posed, count), strict=True)
        waiting.append(
            [
                client.submit(join_share, view, time_column, created_before, *share, pure=False, priority=1)
                for share in shares
            ]
        )
    answers = []
    for futures in waiting:
        found = pa.concat_tables(gather(futures))
        answers.append(found.take(pa.array(np.argsort(found.column(PLACE).to_numpy()))))
    return answers


def load(engine: LocalComputeEngine, registry: BaseRegistry, task: MaterializationTask) -> tuple[int, int] | None:
    """Write the latest row of each key in a view's time range to the online store, each worker its share of the keys.

    Args:
        engine: The engine, whose `load` the workers call.
        registry: Feast's registry.
        task: What to materialise.

    Returns:
        `None` where no cluster is named. Else how many keys had a value, and how many of them were new or newer than
        what was stored. What a lost worker had written already is not new when its share is done again.
    """
    config = engine.repo_config
    scheduler = scheduler_of(config)
    if not scheduler:
        return None
    view, source = task.feature_view, task.feature_view.batch_source
    assert source is not None  # noqa: S101
    entities = [registry.get_entity(name, task.project, allow_cache=True) for name in view.entities]
    keys, features, timestamp_field, created = _get_column_names(view, entities)
    lookup = Lookup(
        view=view.name,
        file=ParquetFile.of(source, config),
        keys={key: key for key in keys},
        features={name: name for name in features},
        types={},
        timestamp_field=timestamp_field,
        created_column=created or None,
        ttl=None,
    )
    with connection() as duck:
        spans, types = _plan(duck, lookup, None)
    known_config = {
        "project": config.project,
        "entity_key_serialization_version": config.entity_key_serialization_version,
        "online_store": config.online_store.model_dump(exclude={"connection_string"}),
        "materialization": config.materialization_config.model_dump(),
        "versioned": config.registry.enable_online_feature_view_versioning,
        "classes": [type(part) for part in (engine, engine.offline_store, engine.online_store)],
    }

    def write(client: Any, gather: cluster.Gather) -> list[Any]:
        count = _shares(client, keys, spans, 0)
        known = [client.submit(read_and_split, lookup, part, types, count, pure=False) for part in spans]
        loaded = [
            client.submit(
                load_share,
                lookup,
                view,
                entities,
                (task.start_time, task.end_time),
                known_config,
                pieces,
                pure=False,
                priority=1,
            )
            for pieces in _turned(client, known, count)
        ]
        return gather(loaded)

    # Writing a row again changes nothing.
    done = cluster.on_cluster(scheduler, write)
    return sum(rows for rows, _ in done), sum(changed for _, changed in done)


def scheduler_of(config: RepoConfig) -> str:
    """Give the address of the scheduler that `feature_store.yaml` names; empty where the variable in it is not set."""
    address = str(getattr(config.offline_store, "scheduler", ""))
    return "" if address.startswith("$") else address


# What the driver does


def _plan(
    duck: duckdb.DuckDBPyConnection, view: Lookup, asked: pa.Table | None
) -> tuple[list[list[Span]], dict[str, str]]:
    """Read a file's schema and its numbers of rows, and divide the rows into spans, several of them to a task."""
    if asked is None:
        types = view.file.describe(duck, view.columns, view.timestamp_field)
    else:
        duck.register("asked", asked)
        types = one_machine.check_keys(duck, view, asked)
    query = f"SELECT file_name, num_rows FROM parquet_file_metadata({quote_text(view.file.pattern)})"  # noqa: S608
    with duckdb_errors(view.file.described):
        files = duck.sql(query).fetchall()
    tasks: list[list[Span]] = [[]]
    size = room = cluster.ROWS_PER_TASK
    for uri, rows in files:
        for start in range(0, max(rows, 1), size):
            span = Span(uri, start, min(start + size, rows))
            if tasks[-1] and span.stop - span.start > room:
                tasks.append([])
                room = size
            tasks[-1].append(span)
            room -= span.stop - span.start
    return tasks, {column: types[column] for column in view.columns}


def _shares(client: Any, keys: Mapping[str, str] | Sequence[str], spans: Sequence[Sequence[Span]], asked: int) -> int:
    """Say how many shares to make; rows without a key stay together."""
    rows = asked + sum(span.stop - span.start for part in spans for span in part)
    return cluster.count_tasks(client, rows) if keys else 1


def _turned(client: Any, splits: Sequence[Any], count: int) -> list[list[Any]]:
    """From tasks that give one piece per share, make for each share the list of its pieces."""
    return [
        [client.submit(operator.getitem, pieces, share, pure=False, priority=1) for pieces in splits]
        for share in range(count)
    ]


# What a worker does


def dask_setup(worker: Any) -> None:
    """Let DuckDB keep to a worker's threads, and spill beside Dask; Dask calls this where it preloads this module."""
    threads = worker.state.nthreads
    with connection() as duck:
        duck.execute(f"SET threads = {threads}")
        duck.execute(f"SET temp_directory = {quote_text(str(Path(worker.local_directory) / 'duckdb'))}")
        if worker.memory_manager.memory_limit:
            # Half for DuckDB, half for the pieces that Dask holds.
            duck.execute(f"SET memory_limit = '{worker.memory_manager.memory_limit // 2 // 2**20}MiB'")


def read_and_split(view: Lookup, spans: Sequence[Span], types: Mapping[str, str], count: int) -> list[pa.Table]:
    """Read rows of a view's files, and split them by key into shares."""
    with connection() as duck, duckdb_errors(view.file.described):
        table = pa.concat_tables([duck.sql(_select(duck, span, types)).to_arrow_table() for span in spans])
    return split(table, list(view.keys), types, list(view.keys), count)


def _select(duck: duckdb.DuckDBPyConnection, span: Span, types: Mapping[str, str]) -> str:
    scan = f"read_parquet({quote_text(span.uri)}, file_row_number = true)"
    found = {name for name, *_ in duck.execute(f"DESCRIBE SELECT * FROM {scan}").fetchall()}  # noqa: S608
    # Of several files one may lack a column or have a narrower type.
    columns = ", ".join(
        f"CAST({quote_name(name) if name in found else 'NULL'} AS {kind}) AS {quote_name(name)}"
        for name, kind in types.items()
    )
    return f"SELECT {columns} FROM {scan} WHERE file_row_number >= {span.start} AND file_row_number < {span.stop}"  # noqa: S608


def split(
    table: pa.Table, keys: Sequence[str], types: Mapping[str, str], columns: Sequence[str], count: int
) -> list[pa.Table]:
    """Split rows by key, so that a key's rows are in one share, whichever side of the join they come from.

    Args:
        table: The rows.
        keys: Their key columns.
        types: DuckDB's type by column of the file.
        columns: The file's key columns, in the order of `keys`.
        count: How many shares to make.

    Returns:
        The rows of each share, in their order.
    """
    if count == 1:
        return [table]
    # Both sides have types of one family; what is equal in it must have one hash.
    same = ["DOUBLE" if family(types[column]) == "number" else "VARCHAR" for column in columns]
    hashed = ", ".join(f"CAST({quote_name(key)} AS {kind})" for key, kind in zip(keys, same, strict=True))
    with connection() as duck:
        duck.register("rows_to_split", table)
        # DuckDB keeps the order of rows where nothing asks for another.
        found = duck.sql(f"SELECT (hash({hashed}) % {count})::USMALLINT AS share FROM rows_to_split")  # noqa: S608
        share = found.to_arrow_table().column("share").to_numpy()
    order = np.argsort(share, kind="stable")
    ends = np.cumsum(np.bincount(share, minlength=count))
    # Each piece is a copy, so that it can be spilled by itself.
    return [table.take(order[end - size : end]) for end, size in zip(ends, np.diff(ends, prepend=0), strict=True)]


def join_share(
    view: Lookup, time_column: str, created_before: bool, known: Sequence[pa.Table], asked: Sequence[pa.Table]
) -> pa.Table:
    """Join one share as a laptop joins the whole.

    Returns:
        The features of each row asked, and its place among all of them.
    """
    with _local_file(view.file, known) as file:
        answer = one_machine.point_in_time(
            pa.concat_tables(asked), time_column, [replace(view, file=file)], created_before=created_before
        )
    return answer.select([PLACE, *view.features])


def load_share(
    lookup: Lookup,
    view: FeatureView,
    entities: Sequence[Entity],
    time_range: tuple[datetime, datetime],
    known_config: Mapping[str, Any],
    known: Sequence[pa.Table],
) -> tuple[int, int]:
    """Materialise one share as a laptop materialises the whole.

    Returns:
        How many keys had a value, and how many of them were new or newer.
    """
    if "REDIS_CONNECTION_STRING" not in os.environ:
        raise SettingsError(
            "REDIS_CONNECTION_STRING is not set on a Dask worker; start it in the platform's environment"
        )
    source: Any = view.batch_source
    engine_class, offline_class, online_class = known_config["classes"]
    with _local_file(lookup.file, known) as file, tempfile.TemporaryDirectory() as folder:
        config = RepoConfig(
            project=known_config["project"],
            provider="local",
            registry={
                "path": str(Path(folder) / "registry.db"),
                "enable_online_feature_view_versioning": known_config["versioned"],
            },
            offline_store={"type": f"{offline_class.__module__}.{offline_class.__name__}"},
            online_store={
                **known_config["online_store"],
                "connection_string": os.environ["REDIS_CONNECTION_STRING"],
            },
            materialization=known_config["materialization"],
            entity_key_serialization_version=known_config["entity_key_serialization_version"],
        )
        view.batch_source = FileSource(
            name=source.name,
            path=file.uri,
            file_format=ParquetFormat(),
            timestamp_field=source.timestamp_field,
            created_timestamp_column=source.created_timestamp_column,
            field_mapping=dict(source.field_mapping),
        )
        engine = engine_class(repo_config=config, offline_store=offline_class(), online_store=online_class())
        task = MaterializationTask(
            project=config.project,
            feature_view=view,
            start_time=time_range[0],
            end_time=time_range[1],
            tqdm_builder=lambda *_: None,
        )
        # The engine asks its registry for the view's entities and for nothing else.
        named = {entity.name: entity for entity in entities}
        registry: Any = SimpleNamespace(get_entity=lambda name, *_, **__: named[name])
        rows, changed = engine.load(registry, task)
        return rows, changed


@contextmanager
def _local_file(file: ParquetFile, pieces: Sequence[pa.Table]) -> Iterator[ParquetFile]:
    """Write pieces to one parquet file; errors name the file that they came from."""
    from distributed import get_worker

    with tempfile.TemporaryDirectory(dir=get_worker().local_directory) as folder:
        path = str(Path(folder) / "share.parquet")
        with pq.ParquetWriter(path, pieces[0].schema, compression="lz4") as writer:
            for piece in pieces:
                writer.write_table(piece)
        try:
            yield ParquetFile(file.name, path)
        except PlatformError as error:
            raise type(error)(str(error).replace(path, file.uri)) from error
