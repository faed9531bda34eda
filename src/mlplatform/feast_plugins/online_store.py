"""Feast's Redis store, with writes that the server decides and values that end with their ttl.

Feast reads the stored event times and then writes what is newer: of two commands that load one key at the same time,
the older may win. Here a script on the server compares and writes in one step. It can also let a view's fields expire
at event time plus ttl, so that a value that history no longer offers is gone online too, for every client.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from itertools import groupby
from typing import Any, Literal

from feast import Entity, FeatureService, FeatureView, RepoConfig
from feast.infra.online_stores.helpers import _mmh3, _redis_key, compute_versioned_name
from feast.infra.online_stores.redis import RedisOnlineStore, RedisOnlineStoreConfig, RedisType
from feast.infra.registry.base_registry import BaseRegistry
from feast.online_response import OnlineResponse
from google.protobuf.timestamp_pb2 import Timestamp  # type: ignore[import-untyped]
from pydantic import StrictStr

from mlplatform.feast_plugins.moments import microseconds
from mlplatform.feast_plugins.online_read import OnlinePlans, ids_of
from mlplatform.feast_plugins.registry_store import after_commit

_LOG = logging.getLogger(__name__)
# Rows per call of the script: the server answers nobody else meanwhile, so a call stays below a few milliseconds.
ROWS_PER_CALL = 250
# Rows per round trip.
ROWS_PER_BATCH = 2_500
# Rows that a load tries to add per round trip: a load of nothing new tries as many in vain.
ROWS_PER_ADD = 500
# Setting and expiring in one command takes a third less of a first load than two.
EXPIRING = ("HSETEX", "HPEXPIREAT")

# Stored times are protobuf messages: tag 8, seconds as a varint; tag 16, nanoseconds.
_FUNCTIONS = """
local function varint(text, at)
  local value, complement, scale = 0, 0, 1
  for i = at, at + 9 do
    local byte = string.byte(text, i)
    local low = byte % 128
    if i < at + 9 then
      value = value + low * scale
      complement = complement + (127 - low) * scale
      scale = scale * 128
    end
    if byte < 128 then
      -- Ten bytes mean a negative number, in two's complement.
      if i == at + 9 then return -complement - 1, i + 1 end
      return value, i + 1
    end
  end
end
local function moment(text)
  local seconds, nanos, at = 0, 0, 1
  if string.byte(text, at) == 8 then seconds, at = varint(text, at + 1) end
  if string.byte(text, at) == 16 then nanos, at = varint(text, at + 1) end
  return seconds, nanos
end
local function is_later(new, old)
  if new == old then return false end
  local new_s, new_n = moment(new)
  local old_s, old_n = moment(old)
  return new_s > old_s or (new_s == old_s and new_n > old_n)
end
"""
# Names the rows whose time is later than the stored one.
_FIND_NEWER = f"""{_FUNCTIONS}
local found = {{}}
for i, key in ipairs(KEYS) do
  local old = redis.call('HGET', key, ARGV[1])
  if not old or is_later(ARGV[1 + i], old) then found[#found + 1] = i end
end
return found
"""
_WRITE_IF_NEWER = f"""{_FUNCTIONS}
local count, expire = tonumber(ARGV[1]), ARGV[2]
local names, pairs = {{}}, {{}}
for i = 1, count do
  names[i] = ARGV[2 + i]
  pairs[2 * i - 1] = names[i]
end
local at, changed = 3 + count, 0
for _, key in ipairs(KEYS) do
  local time = ARGV[at + 1]
  local old = redis.call('HGET', key, names[1])
  if not old or is_later(time, old) then
    for i = 1, count do pairs[2 * i] = ARGV[at + i] end
    if expire == 'HSETEX' then
      redis.call('HSETEX', key, 'PXAT', ARGV[at], 'FIELDS', count, unpack(pairs))
    else
      redis.call('HSET', key, unpack(pairs))
      if expire ~= '' then redis.call(expire, key, ARGV[at], 'FIELDS', count, unpack(names)) end
    end
    changed = changed + 1
  end
  at = at + 1 + count
end
return changed
"""


class ExpiringRedisOnlineStoreConfig(RedisOnlineStoreConfig):
    """The store's part of `feature_store.yaml`: Feast's own settings of Redis, and one more.

    Attributes:
        expire_online: Whether values end online at event time plus ttl, as they do in history.
    """

    type: StrictStr = "mlplatform.feast_plugins.online_store.ExpiringRedisOnlineStore"  # type: ignore[assignment]
    expire_online: bool = True


class ExpiringRedisOnlineStore(RedisOnlineStore):
    """Never replaces a later value by an earlier one, and lets values expire by their view's ttl."""

    _expiring: str | None = None
    # How the next rows go, by what became of the last: those that the server has no field of are added without the
    # script, in half the time; where few were newer it is asked first which are; else the script takes all.
    _first: Literal["add", "ask", "write"] = "add"
    _warned: bool = False

    def __init__(self) -> None:
        super().__init__()
        self._plans = OnlinePlans()

    def get_online_features(
        self,
        config: RepoConfig,
        features: list[str] | FeatureService,
        entity_rows: Any,
        registry: BaseRegistry,
        project: str,
        full_feature_names: bool = False,
        include_feature_view_version_metadata: bool = False,
    ) -> OnlineResponse:
        """Read plain views in one round trip, and everything else as Feast does."""
        asked = (config, features, entity_rows, registry, project, full_feature_names)
        found = None if include_feature_view_version_metadata else self.read_plain(*asked)
        return found or super().get_online_features(*asked, include_feature_view_version_metadata)

    def read_plain(
        self,
        config: RepoConfig,
        features: list[str] | FeatureService,
        entity_rows: Any,
        registry: BaseRegistry,
        project: str,
        full_feature_names: bool,
    ) -> OnlineResponse | None:
        """Read features in one round trip, or say `None` where Feast's own code must."""
        plan = self._plans.plan(config, features, registry, project, full_feature_names)
        ids = ids_of(entity_rows, plan.key) if plan else None
        return plan.read(self._get_client(config.online_store), ids) if plan and ids else None

    def online_write_batch(
        self, config: RepoConfig, table: FeatureView, data: list[Any], progress: Callable[[int], Any] | None
    ) -> None:
        """Store rows, each if its event time is later than the one stored for its key."""
        online: Any = config.online_store
        if online.skip_dedup or online.key_ttl_seconds or online.redis_type == RedisType.redis_cluster:
            # What was asked for there is another rule, and a script needs all of its keys on one server.
            super().online_write_batch(config, table, data, progress)
            return
        for names, group in groupby(data, key=lambda row: tuple(row[1])):
            rows = list(group)
            version = config.entity_key_serialization_version
            keys = [_redis_key(config.project, row[0], entity_key_serialization_version=version) for row in rows]
            values = [[row[1][name].SerializeToString() for name in names] for row in rows]
            self.write_rows(config, table, keys, [microseconds(row[2]) for row in rows], names, values)
            if progress:
                progress(len(rows))

    async def online_write_batch_async(
        self, config: RepoConfig, table: FeatureView, data: list[Any], progress: Callable[[int], Any] | None
    ) -> None:
        """Store rows, as `online_write_batch` does."""
        await asyncio.to_thread(self.online_write_batch, config, table, data, progress)

    def write_rows(
        self,
        config: RepoConfig,
        view: Any,
        keys: Sequence[bytes],
        moments: Sequence[int],
        features: Sequence[str],
        values: Iterable[Sequence[bytes]],
    ) -> int:
        """Store rows whose event time is later than the one stored for their key, decided by the server.

        Args:
            config: Feast's configuration.
            view: The view that the features belong to.
            keys: Feast's key of each row.
            moments: Event time of each row, in microseconds since 1970.
            features: Names of the features.
            values: Serialised values of each row, in the features' order.

        Returns:
            How many rows were stored.
        """
        client: Any = self._get_client(config.online_store)
        name = compute_versioned_name(view, config.registry.enable_online_feature_view_versioning)
        fields = [f"_ts:{name}".encode(), *(_mmh3(f"{name}:{feature}") for feature in features)]
        ttl: timedelta = getattr(view, "ttl", None) or timedelta(0)
        command = self._expiring_command(client)
        expires = bool(ttl) and config.online_store.expire_online
        expire = command if expires else ""
        if expires and not command and not self._warned:
            self._warned = True
            _LOG.warning(
                "this online store can't expire single fields (Valkey 9 and Redis 7.4 can): "
                "values stay online after their ttl"
            )
        lifetime = ttl // timedelta(microseconds=1)
        # A value's last microsecond still counts, so it ends with the first millisecond after that.
        ends = [(moment + lifetime) // 1_000 + 1 if expire else 0 for moment in moments]
        rows = list(zip(keys, ends, _serialised(moments), values, strict=True))
        count = len(rows)
        first = self._first if count > ROWS_PER_CALL else "write"  # a single call asks and writes at once
        added = 0
        if first == "ask":
            rows = _newer(client, fields[0], rows)
        elif first == "add" and command == "HSETEX":
            rows = _add(client, fields, bool(expire), rows)
            added = count - len(rows)
        script = client.register_script(_WRITE_IF_NEWER)
        sent: list[Future[list[int]]] = []
        # The server stores one batch while the next is made.
        with ThreadPoolExecutor(1) as sender:
            for batch in _slices(rows, ROWS_PER_BATCH):
                pipeline = client.pipeline(transaction=False)
                for call in _slices(batch, ROWS_PER_CALL):
                    arguments: list[Any] = [len(fields), expire, *fields]
                    for _, end, time, row in call:
                        arguments += (end, time, *row)
                    script(keys=[key for key, *_ in call], args=arguments, client=pipeline)
                sent.append(sender.submit(pipeline.execute))
        changed = added + sum(stored for answers in sent for stored in answers.result())
        if changed < count / 4:
            self._first = "ask"
        elif self._first == "ask":
            self._first = "add"
        elif first == "add" and added < count / 2:
            self._first = "write"
        return changed

    def update(
        self,
        config: RepoConfig,
        tables_to_delete: Sequence[FeatureView],
        tables_to_keep: Sequence[FeatureView],
        entities_to_delete: Sequence[Entity],
        entities_to_keep: Sequence[Entity],
        partial: bool,
    ) -> None:
        """Delete what views that are gone left behind, once the registry without them is written."""
        for view in tables_to_delete:

            def delete(view: FeatureView = view) -> None:
                RedisOnlineStore.update(self, config, [view], [], [], [], partial)

            after_commit(config.registry, config.project, view.name, delete)

    def _expiring_command(self, client: Any) -> str:
        """Find the command that lets fields expire: Valkey 9's and Redis 8's, Redis 7.4's, or none."""
        if self._expiring is None:
            # One empty answer for a command that the server does not know.
            known = (name for name in EXPIRING if any(client.execute_command("COMMAND", "INFO", name) or []))
            self._expiring = next(known, "")
        return self._expiring


# Key, end in milliseconds, event time and values, the last two serialised.
_Row = tuple[bytes, int, bytes, Sequence[bytes]]


def _newer(client: Any, field: bytes, rows: Sequence[_Row]) -> list[_Row]:
    """Give the rows whose event time is later than the one stored, as the server says it is now."""
    script, pipeline = client.register_script(_FIND_NEWER), client.pipeline(transaction=False)
    calls = list(_slices(rows, ROWS_PER_CALL))
    for call in calls:
        script(keys=[key for key, *_ in call], args=[field, *(time for _, _, time, _ in call)], client=pipeline)
    return [call[place - 1] for call, places in zip(calls, pipeline.execute(), strict=True) for place in places]


def _add(client: Any, fields: Sequence[bytes], expires: bool, rows: Sequence[_Row]) -> list[_Row]:
    """Store rows of whose fields the server has none, while most are such, and give the others.

    The commands are packed here: redis-py takes longer to pack them than the server to store the rows.
    """
    words = [b"HSETEX", None, b"FNX", *([b"PXAT", None] if expires else []), b"FIELDS", b"%d" % len(fields)]
    words += [word for name in fields for word in (name, None)]
    slot = b"$%d\r\n%b\r\n"
    parts = [slot if word is None else (slot % (len(word), word)).replace(b"%", b"%%") for word in words]
    command = b"".join([b"*%d\r\n" % len(words), *parts])
    left: list[_Row] = []
    for start in range(0, len(rows), ROWS_PER_ADD):
        batch, packed = rows[start : start + ROWS_PER_ADD], []
        for key, end, time, values in batch:
            given: list[Any] = []
            for word in (key, *([b"%d" % end] if expires else []), time, *values):
                given += (len(word), word)
            packed.append(command % tuple(given))
        added = _exchange(client, b"".join(packed), len(batch))
        left += [row for row, new in zip(batch, added, strict=True) if not new]
        if sum(added) < len(batch) / 2:
            return left + list(rows[start + ROWS_PER_ADD :])
    return left


def _exchange(client: Any, packed: bytes, count: int) -> list[int]:
    """Send packed commands and give their answers; what is sent twice is not new the second time."""
    connection = client.connection_pool.get_connection()

    def exchange() -> list[int]:
        connection.send_packed_command([packed])
        return [connection.read_response() for _ in range(count)]

    try:
        answers: list[int] = connection.retry.call_with_retry(exchange, lambda _: connection.disconnect())
    except BaseException:
        connection.disconnect()  # answers may be left to read
        raise
    finally:
        client.connection_pool.release(connection)
    return answers


def _slices(rows: Sequence[_Row], size: int) -> Iterator[Sequence[_Row]]:
    return (rows[start : start + size] for start in range(0, len(rows), size))


def _serialised(moments: Sequence[int]) -> Iterator[bytes]:
    """Write times as Feast stores them; one message for all is four times as fast as one for each."""
    stamp = Timestamp()
    for moment in moments:
        stamp.seconds, rest = divmod(moment, 1_000_000)
        stamp.nanos = rest * 1_000
        yield stamp.SerializeToString()
