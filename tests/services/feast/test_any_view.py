"""What Feast promises, asked of three stores: ours on the object store and on local files, and stock DuckDB.

What stock answers and ours does not stands in DIFFERENCES, with its reason. Everything else is answered alike: the
tests with the fixture `shop` ask all three stores for one answer, and one test asks for every type of value.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from datetime import timedelta
from decimal import Decimal
from multiprocessing.pool import Pool
from pathlib import Path
from types import FunctionType
from uuid import UUID

import pandas as pd
import pyarrow as pa
import pytest
from feast import Entity, FeatureService, FeatureView, Field, FileSource, PushSource, RequestSource, ValueType
from feast.data_source import PushMode
from feast.errors import SavedDatasetLocationAlreadyExists
from feast.infra.offline_stores.file_source import SavedDatasetFileStorage
from feast.on_demand_feature_view import on_demand_feature_view
from feast.types import (
    Array,
    Bool,
    Bytes,
    Float32,
    Float64,
    ImageBytes,
    Int32,
    Int64,
    Json,
    Map,
    PdfBytes,
    ScalarMap,
    Set,
    String,
    Struct,
    TimeUuid,
    UnixTimestamp,
    Uuid,
    ZonedTimestamp,
)
from feast.types import Decimal as DecimalType
from shop import FEBRUARY, JANUARY, MARCH, Shop, ask_elsewhere, plain

from mlplatform.settings import Settings

DIFFERENCES = {
    "Delta tables": "reading overwritten versions as data is what a plain parquet reader does; refused by name",
    "s3_endpoint_override": "another address than AWS_ENDPOINT_URL would answer with other data; refused by name",
    "keys of another type": "a cast joins what is not equal; refused by name and types",
}


def test_the_list_of_differences_is_short():
    assert len(DIFFERENCES) <= 3


# Feast calls on-demand views and saved data sets experimental, and ibis warns as it is imported.
pytestmark = pytest.mark.filterwarnings("ignore")

ANN = Entity(name="user", join_keys=["user_id"], value_type=ValueType.STRING)
PLACE = Entity(name="place", join_keys=["place_id"], value_type=ValueType.INT64)


# Feast keeps a function as source, so it must stand by itself.
def older(inputs: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame({"later": inputs["age"] + inputs["years"]})


def doubled(inputs: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame({"twice": inputs["age"] * 2})


def fresh(function: FunctionType) -> FunctionType:
    """Copy a function, since Feast's decorator tells it that it comes from another module."""
    return FunctionType(function.__code__, function.__globals__, function.__name__)


def rows(**columns: list[object]) -> pd.DataFrame:
    return pd.DataFrame(columns)


def people() -> pd.DataFrame:
    return rows(user_id=["ann", "ann", "bob"], at=[JANUARY, FEBRUARY, JANUARY], age=[30, 31, 50], job=["a", "b", None])


def view(shop: Shop, name: str, data: object, fields: dict[str, object], entities: list[Entity], **options: object):
    source_options = {key: options.pop(key) for key in ("created_timestamp_column", "field_mapping") if key in options}
    source = shop.source(name, data, **source_options)
    schema = [Field(name=field, dtype=kind) for field, kind in fields.items()]
    return FeatureView(name=name, entities=entities, schema=schema, source=source, **options)


def people_view(shop: Shop, **options: object) -> FeatureView:
    return view(shop, "people", people(), {"age": Int64, "job": String}, [ANN], **options)


def test_history_and_online_agree_for_one_entity(shop: Shop):
    shop.store.apply([ANN, people_view(shop, ttl=timedelta(days=50))])
    answer = shop.ask(
        ["people:age", "people:job"],
        {"user_id": ["ann", "bob", "cy"], "event_timestamp": [MARCH, MARCH - timedelta(days=30), MARCH]},
    )
    assert plain(answer["age"]) == [31, 50, None]
    shop.materialise()
    online = shop.online(["people:age", "people:job"], {"user_id": "ann"}, {"user_id": "bob"}, {"user_id": "cy"})
    assert (online["age"], online["job"]) == ([31, 50, None], ["b", None, None])


def test_several_entities_and_a_partial_join_key_map(shop: Shop):
    data = rows(user_id=["u", "u", "v", "v"], place_id=[1, 2, 1, 2], at=[JANUARY] * 4, n=[110, 120, 210, 220])
    stays = view(shop, "stays", data, {"n": Int64}, [ANN, PLACE])
    service = FeatureService(name="s", features=[stays.with_name("origin").with_join_key_map({"place_id": "from_id"})])
    shop.store.apply([ANN, PLACE, stays, service])
    if shop.kind != "stock DuckDB":  # which drops the other key from the join
        asked = pd.DataFrame({"user_id": list("uuvv"), "from_id": [1, 2, 1, 2], "event_timestamp": [FEBRUARY] * 4})
        assert plain(shop.store.get_historical_features(asked, service).to_df()["n"]) == [110, 120, 210, 220]
    shop.materialise()
    asked = [{"user_id": user, "place_id": place} for user in "uv" for place in (1, 2)]
    assert shop.online(["stays:n"], *asked)["n"] == [110, 120, 210, 220]


def test_the_created_column_decides_between_equal_times(shop: Shop):
    data = rows(user_id=["a"] * 3, at=[JANUARY] * 3, n=[1, 2, 3], written=[JANUARY, MARCH, FEBRUARY])
    shop.store.apply([ANN, view(shop, "v", data, {"n": Int64}, [ANN], created_timestamp_column="written")])
    assert plain(shop.ask(["v:n"], {"user_id": ["a"], "event_timestamp": [MARCH]})["n"]) == [2]
    shop.materialise()
    assert shop.online(["v:n"], {"user_id": "a"})["n"] == [2]


def test_values_written_later_can_be_left_out(shop: Shop):
    data = rows(user_id=["a"] * 2, at=[JANUARY, JANUARY], n=[1, 2], written=[JANUARY, MARCH])
    shop.store.apply([ANN, view(shop, "v", data, {"n": Int64}, [ANN], created_timestamp_column="written")])
    asked = {"user_id": ["a", "z"], "event_timestamp": [FEBRUARY] * 2}
    assert plain(shop.ask(["v:n"], asked, filter_by_created_timestamp=True)["n"]) == [1, None]


def test_field_mappings_rename_features(shop: Shop):
    data = rows(user_id=["a"], at=[JANUARY], raw=[7])
    shop.store.apply([ANN, view(shop, "v", data, {"n": Int64}, [ANN], field_mapping={"raw": "n"})])
    assert plain(shop.ask(["v:n"], {"user_id": ["a"], "event_timestamp": [MARCH]})["n"]) == [7]
    shop.materialise()
    assert shop.online(["v:n"], {"user_id": "a"})["n"] == [7]


def test_full_names_and_services(shop: Shop):
    people_ = people_view(shop)
    shop.store.apply([ANN, people_, FeatureService(name="all", features=[people_[["age"]]])])
    asked = pd.DataFrame({"user_id": ["ann"], "event_timestamp": [MARCH]})
    service = shop.store.get_feature_service("all")
    assert plain(shop.store.get_historical_features(asked, service, True).to_df()["people__age"]) == [31]
    shop.materialise()
    assert shop.online(["people:age"], {"user_id": "ann"}, full_feature_names=True)["people__age"] == [31]


def test_views_without_entities(shop: Shop):
    world = view(shop, "world", rows(at=[JANUARY, FEBRUARY], rate=[1.5, 2.5]), {"rate": Float64}, [])
    shop.store.apply([ANN, people_view(shop), world])
    assert plain(shop.ask(["world:rate"], {"event_timestamp": [JANUARY, MARCH]})["rate"]) == [1.5, 2.5]
    if shop.kind == "stock DuckDB":
        return  # does not make the key that its own conversion asks for
    shop.materialise()
    assert shop.online(["people:age", "world:rate"], {"user_id": "ann"})["rate"] == [2.5]


VALUES = {
    "text": (String, pa.array(["ü"]), "ü"),
    "int32": (Int32, pa.array([-5], pa.int32()), -5),
    "int64": (Int64, pa.array([2**62], pa.int64()), 2**62),
    "float": (Float32, pa.array([0.5], pa.float32()), 0.5),
    "double": (Float64, pa.array([0.1], pa.float64()), 0.1),
    "bool": (Bool, pa.array([True]), True),
    "bytes": (Bytes, pa.array([b"\x00\xff"]), b"\x00\xff"),
    "texts": (Array(String), pa.array([["a", "b"]]), ["a", "b"]),
    "ints": (Array(Int64), pa.array([[1, 2]]), [1, 2]),
    "doubles": (Array(Float64), pa.array([[1.5]]), [1.5]),
}


@pytest.mark.parametrize("kind", VALUES)
def test_every_type_comes_back_the_same_from_history_and_online(shop: Shop, kind: str):
    dtype, column, value = VALUES[kind]
    table = pa.table({"user_id": ["a"], "at": pa.array([JANUARY], pa.timestamp("us", "UTC")), "x": column})
    shop.store.apply([ANN, view(shop, "v", table, {"x": dtype}, [ANN])])
    found = shop.ask(["v:x"], {"user_id": ["a"], "event_timestamp": [MARCH]})["x"].iloc[0]
    assert (list(found) if isinstance(value, list) else found) == value
    shop.materialise()
    assert shop.online(["v:x"], {"user_id": "a"})["x"] == [value]


TIME = pa.timestamp("us", "UTC")
# Each type of Feast's beside a full, a missing and an empty value.
COLUMNS = {
    "text": (String, pa.array(["x", None, ""])),
    "bytes": (Bytes, pa.array([b"x", None, b""])),
    "image": (ImageBytes, pa.array([b"x", None, b""])),
    "pdf": (PdfBytes, pa.array([b"x", None, b""])),
    "bool": (Bool, pa.array([True, None, False])),
    "int32": (Int32, pa.array([1, None, 0], pa.int32())),
    "int64": (Int64, pa.array([2**62, None, 0])),
    "float": (Float32, pa.array([1.5, None, 0], pa.float32())),
    "double": (Float64, pa.array([0.1, None, 0])),
    "time": (UnixTimestamp, pa.array([JANUARY, None, FEBRUARY], TIME)),
    "zoned time": (ZonedTimestamp, pa.array([JANUARY, None, FEBRUARY], TIME)),
    "decimal": (DecimalType, pa.array([Decimal("1.25"), None, Decimal(3)])),
    "uuid": (Uuid, pa.array([str(UUID(int=5)), None, str(UUID(int=6))])),
    "time uuid": (TimeUuid, pa.array(["58e0a7d7-eebc-11d8-9669-0800200c9a66", None, None])),
    "json": (Json, pa.array(['{"a": [1, 2]}', None, "3"])),
    "texts": (Array(String), pa.array([["a", "b"], None, []])),
    "many bytes": (Array(Bytes), pa.array([[b"x"], None, []])),
    "bools": (Array(Bool), pa.array([[True, False], None, []])),
    "int32s": (Array(Int32), pa.array([[1], None, []], pa.list_(pa.int32()))),
    "floats": (Array(Float32), pa.array([[1.5], None, []], pa.list_(pa.float32()))),
    "times": (Array(UnixTimestamp), pa.array([[JANUARY], None, []], pa.list_(TIME))),
    "jsons": (Array(Json), pa.array([['{"a": 1}'], None, []])),
    "lists": (Array(Array(Int64)), pa.array([[[1, 2], [3]], None, []])),
    "set of texts": (Set(String), pa.array([["a", "b"], None, []])),
    "set of ints": (Set(Int64), pa.array([[1, 2], None, []])),
    "struct": (Struct({"a": String, "b": Int64}), pa.array([{"a": "x", "b": 1}, None, {"a": None, "b": None}])),
    "structs": (Array(Struct({"a": String})), pa.array([[{"a": "x"}], None, []])),
    "map": (Map, pa.array([[("a", "x")], None, []], pa.map_(pa.string(), pa.string()))),
    "map of ints": (Map, pa.array([[("a", 1)], None, []], pa.map_(pa.string(), pa.int64()))),
    "maps": (Array(Map), pa.array([[[("a", "x")]], None, []], pa.list_(pa.map_(pa.string(), pa.string())))),
    "map by int": (ScalarMap, pa.array([[(1, "x")], None, []], pa.map_(pa.int64(), pa.string()))),
}
# What Feast's engine cannot store, and ours can.
OURS_ALONE = {"map", "map of ints", "maps", "map by int", "zoned time"}


def test_every_type_is_answered_as_stock_answers_it(platform: Settings, tmp_path: Path):
    """The list of differences names no type, so each is answered like stock, or where stock fails."""
    answers = {}
    for kind in ("stock DuckDB", "ours on local files"):
        shop = Shop(kind, tmp_path / kind, platform)
        (tmp_path / kind).mkdir()
        at = pa.array([JANUARY] * 3, TIME)
        views = {
            name: view(
                shop, f"v{place}", pa.table({"user_id": ["a", "b", "c"], "at": at, "x": column}), {"x": dtype}, [ANN]
            )
            for place, (name, (dtype, column)) in enumerate(COLUMNS.items())
        }
        shop.store.apply([ANN, *views.values()])
        users = ["a", "b", "c", "z"]
        for name, made in views.items():
            asked = {"user_id": users, "event_timestamp": [MARCH] * 4}
            history = shop.ask([f"{made.name}:x"], asked).set_index("user_id").loc[users]["x"]
            try:
                shop.store.materialize(JANUARY.to_pydatetime(), MARCH.to_pydatetime(), [made.name])
                online = repr(shop.online([f"{made.name}:x"], *({"user_id": user} for user in users))["x"])
            except (TypeError, pa.ArrowException):
                online = "refused"
            answers[kind, name] = str(history.dtype), repr(history.tolist()), online
    stock_fails = {name for name in COLUMNS if answers["stock DuckDB", name][2] == "refused"}
    assert stock_fails == OURS_ALONE
    for name in COLUMNS:
        stock, ours = answers["stock DuckDB", name], answers["ours on local files", name]
        assert ours[:2] == stock[:2], name
        assert ours[2] == stock[2] if name not in stock_fails else ours[2] != "refused", name


def test_on_demand_views_over_history_and_online(shop: Shop):
    people_ = people_view(shop)

    request = RequestSource(name="ask", schema=[Field(name="years", dtype=Int64)])
    later = on_demand_feature_view(sources=[people_, request], schema=[Field(name="later", dtype=Int64)])
    shop.store.apply([ANN, people_, later(fresh(older))])
    asked = {"user_id": ["ann"], "event_timestamp": [MARCH], "years": [5]}
    assert plain(shop.ask(["older:later"], asked)["later"]) == [36]
    shop.materialise()
    assert shop.online(["older:later"], {"user_id": "ann", "years": 5})["later"] == [36]


def test_pushed_values_arrive_online_and_offline(shop: Shop):
    batch = shop.source("people", people())
    push = PushSource(name="push", batch_source=batch)
    schema = [Field(name="age", dtype=Int64), Field(name="job", dtype=String)]
    shop.store.apply([ANN, FeatureView(name="people", entities=[ANN], schema=schema, source=push)])
    new = rows(user_id=["ann"], at=[MARCH], age=[32], job=["c"])
    if shop.kind == "stock DuckDB":
        return  # its append asks for the very order of types that pandas does not give
    shop.store.push("push", new, to=PushMode.ONLINE_AND_OFFLINE)
    assert shop.online(["people:age"], {"user_id": "ann"})["age"] == [32]
    assert plain(shop.ask(["people:age"], {"user_id": ["ann"], "event_timestamp": [MARCH]})["age"]) == [32]


def test_data_sets_are_saved_once_and_read_back(shop: Shop):
    shop.store.apply([ANN, people_view(shop)])
    asked = pd.DataFrame({"user_id": ["ann"], "event_timestamp": [MARCH]})
    job = shop.store.get_historical_features(asked, ["people:age"])
    storage = SavedDatasetFileStorage(path=shop.path("saved.parquet"))
    saved = shop.store.create_saved_dataset(job, "saved", storage)
    assert plain(saved.to_df()["age"]) == [31]
    with pytest.raises(SavedDatasetLocationAlreadyExists):
        shop.store.create_saved_dataset(job, "again", storage)
    assert plain(shop.store.get_saved_dataset("saved").to_df()["age"]) == [31]


def test_schemas_and_entities_are_inferred(shop: Shop):
    source = shop.source("people", people())
    user = Entity(name="user", join_keys=["user_id"], value_type=ValueType.STRING)
    shop.store.apply([user, FeatureView(name="people", entities=[user], source=source)])
    found = {field.name: field.dtype for field in shop.store.get_feature_view("people").features}
    assert found == {"age": Int64, "job": String}


def test_every_row_within_a_range_can_be_pulled(shop: Shop):
    source = shop.source("people", people())
    job = shop.store._get_provider().offline_store.pull_all_from_table_or_query(
        shop.config, source, ["user_id"], ["age"], "at", None, JANUARY.to_pydatetime(), FEBRUARY.to_pydatetime()
    )
    assert sorted(job.to_df()["age"]) == [30, 31, 50]


# What stock refuses or answers wrongly


@pytest.fixture(scope="module")
def elsewhere(platform: Settings) -> Iterator[Pool]:
    """A process in another time zone; a process takes its zone once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TZ", "America/St_Johns")
        with multiprocessing.get_context("spawn").Pool(1) as process:
            yield process


def test_timestamps_are_utc_wherever_the_machine_is(our_shop: Shop, elsewhere: Pool):
    data = rows(user_id=["a"], at=[JANUARY], seen=[FEBRUARY])
    our_shop.store.apply([ANN, view(our_shop, "v", data, {"seen": UnixTimestamp}, [ANN])])
    asked = {"user_id": ["a"], "event_timestamp": [MARCH]}
    zone, name, found = elsewhere.apply(ask_elsewhere, (our_shop.config, ["v:seen"], asked))
    assert (zone, name) == ("America/St_Johns", "UTC")
    assert found["seen"].iloc[0] == FEBRUARY


def test_a_view_over_another_view_is_loaded_from_that_one_and_not_from_its_sink(our_shop: Shop):
    first = view(our_shop, "first", rows(user_id=["a"], at=[JANUARY], n=[1]), {"n": Int64}, [ANN])
    sink = our_shop.source("sink", rows(user_id=["a"], at=[JANUARY], n=[2]))
    schema = [Field(name="n", dtype=Int64)]
    second = FeatureView(name="second", entities=[ANN], schema=schema, source=first, sink_source=sink)
    our_shop.store.apply([ANN, first, second])
    our_shop.materialise()
    assert our_shop.online(["second:n"], {"user_id": "a"})["n"] == [1]


def test_rows_of_one_moment_are_chosen_by_their_content_alone(our_shop: Shop):
    data = rows(user_id=["a"] * 3, at=[JANUARY] * 3, x=[1, 2, 2], y=["z", "b", "c"])
    answers = set()
    for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):
        our_shop.store.apply([ANN, view(our_shop, "v", data.iloc[order], {"x": Int64, "y": String}, [ANN])])
        asked = {"user_id": ["a"], "event_timestamp": [MARCH]}
        answers.add((our_shop.ask(["v:x"], asked)["x"].iloc[0], our_shop.ask(["v:y"], asked)["y"].iloc[0]))
    assert answers == {(2, "c")}
    our_shop.materialise()
    online = our_shop.online(["v:x", "v:y"], {"user_id": "a"})
    assert (online["x"], online["y"]) == ([2], ["c"])


def test_a_renamed_time_is_the_one_of_the_mapping(our_shop: Shop):
    data = rows(user_id=["a", "a"], raw=[JANUARY, FEBRUARY], at=[FEBRUARY, JANUARY], n=[1, 2])
    our_shop.store.apply([ANN, view(our_shop, "v", data, {"n": Int64}, [ANN], field_mapping={"raw": "at"})])
    assert plain(our_shop.ask(["v:n"], {"user_id": ["a"], "event_timestamp": [MARCH]})["n"]) == [2]
    our_shop.materialise()
    assert our_shop.online(["v:n"], {"user_id": "a"})["n"] == [2]


@pytest.mark.parametrize(
    ("stored", "asked", "said"),
    [
        ([2], ["02"], "user_id in the entity frame is VARCHAR, and user_id in .*v.* is BIGINT"),
        ([2**53 + 1], [float(2**53)], "user_id in the entity frame is DOUBLE, and user_id in .*v.* is BIGINT"),
    ],
)
def test_keys_of_another_type_are_refused_by_name(our_shop: Shop, stored: list, asked: list, said: str):
    user = Entity(name="user", join_keys=["user_id"], value_type=ValueType.INT64)
    our_shop.store.apply([user, view(our_shop, "v", rows(user_id=stored, at=[JANUARY], n=[1]), {"n": Int64}, [user])])
    with pytest.raises(ValueError, match=said):
        our_shop.ask(["v:n"], {"user_id": asked, "event_timestamp": [MARCH]})


def test_another_format_and_another_object_store_are_refused(our_shop: Shop):
    from feast.data_format import DeltaFormat

    schema = [Field(name="n", dtype=Int64)]
    data = rows(user_id=["a"], at=[JANUARY], n=[1])
    for option, said in (
        ({"file_format": DeltaFormat()}, "source 'v' is DeltaFormat, and this store reads parquet only"),
        ({"s3_endpoint_override": "http://elsewhere:1"}, "source 'v' has s3_endpoint_override=http://elsewhere:1"),
    ):
        source = our_shop.source("v", data, **option)
        our_shop.store.apply([ANN, FeatureView(name="v", entities=[ANN], schema=schema, source=source)])
        with pytest.raises(ValueError, match=said):
            our_shop.ask(["v:n"], {"user_id": ["a"], "event_timestamp": [MARCH]})


def test_numbers_may_be_wider_or_narrower_as_long_as_they_stay_the_same(our_shop: Shop):
    fits = rows(user_id=["a"], at=[JANUARY], i=[5], f=[2.0], d=[7])
    kinds = {"i": Int32, "f": Int64, "d": Float64}
    our_shop.store.apply([ANN, view(our_shop, "v", fits, kinds, [ANN])])
    asked = {"user_id": ["a"], "event_timestamp": [MARCH]}
    assert our_shop.ask(["v:i", "v:f", "v:d"], asked)[["i", "f", "d"]].iloc[0].tolist() == [5, 2, 7]
    our_shop.materialise()
    online = our_shop.online(["v:i", "v:f", "v:d"], {"user_id": "a"})
    assert (online["i"], online["f"], online["d"]) == ([5], [2], [7])
    for name, value in (("i", 2**31), ("f", 2.5), ("d", 2**53 + 1)):
        our_shop.source("v", fits.assign(**{name: [value]}))
        with pytest.raises(ValueError, match=rf"v:{name} in .*v\.parquet \(source v\) is .*, and its view says"):
            our_shop.ask([f"v:{name}"], asked)
        with pytest.raises(ValueError, match=rf"v:{name} in .*v\.parquet \(source v\) is .*, and its view says"):
            our_shop.materialise()


@pytest.mark.parametrize("pattern", ["many", "many/*.parquet"])
def test_a_folder_or_a_pattern_of_files_is_one_source(our_shop: Shop, pattern: str):
    everybody = people()
    for number in range(3):
        our_shop.put(f"many/part-{number}.parquet", everybody.iloc[[number]])
    source = FileSource(name="many", path=our_shop.path(pattern), timestamp_field="at")
    schema = [Field(name="age", dtype=Int64)]
    our_shop.store.apply([ANN, FeatureView(name="many", entities=[ANN], schema=schema, source=source)])
    asked = {"user_id": ["ann", "bob"], "event_timestamp": [MARCH] * 2}
    assert plain(our_shop.ask(["many:age"], asked)["age"]) == [31, 50]


def test_a_range_of_time_stands_for_an_entity_frame(our_shop: Shop):
    our_shop.store.apply([ANN, people_view(our_shop)])
    answer = our_shop.store.get_historical_features(
        None, ["people:age"], start_date=JANUARY.to_pydatetime(), end_date=MARCH.to_pydatetime()
    ).to_df()
    assert list(zip(answer["user_id"], answer["age"], strict=True)) == [("ann", 30), ("ann", 31), ("bob", 50)]


def test_on_demand_views_are_stored_online_without_a_created_column(our_shop: Shop):
    people_ = people_view(our_shop)

    twice = on_demand_feature_view(
        sources=[people_], schema=[Field(name="twice", dtype=Int64)], entities=[ANN], write_to_online_store=True
    )
    our_shop.store.apply([ANN, people_, twice(fresh(doubled))])
    our_shop.materialise()
    assert our_shop.online(["doubled:twice"], {"user_id": "bob"})["twice"] == [100]


def test_maps_are_kept_as_they_are(our_shop: Shop):
    column = pa.array([[("a", "x")]], pa.map_(pa.string(), pa.string()))
    at = pa.array([JANUARY], pa.timestamp("us", "UTC"))
    table = pa.table({"user_id": ["a"], "at": at, "m": column})
    our_shop.store.apply([ANN, view(our_shop, "v", table, {"m": Map}, [ANN])])
    found = our_shop.ask(["v:m"], {"user_id": ["a"], "event_timestamp": [MARCH]})["m"].iloc[0]
    assert dict(found) == {"a": "x"}
    our_shop.materialise()
    assert our_shop.online(["v:m"], {"user_id": "a"})["m"] == [{"a": "x"}]


def test_decimals_are_numbers(our_shop: Shop):
    column = pa.array([Decimal("1.25")], pa.decimal128(10, 2))
    at = pa.array([JANUARY], pa.timestamp("us", "UTC"))
    table = pa.table({"user_id": ["a"], "at": at, "x": column})
    our_shop.store.apply([ANN, view(our_shop, "v", table, {"x": Float64}, [ANN])])
    assert plain(our_shop.ask(["v:x"], {"user_id": ["a"], "event_timestamp": [MARCH]})["x"]) == [1.25]
