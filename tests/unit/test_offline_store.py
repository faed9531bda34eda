"""History is right: our offline store through Feast's own API, held against another as-of join.

Files lie in a folder here, so that no server is needed; `tests/notebooks` asks the same of the object store.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from feast import Entity, FeatureService, FeatureStore, FeatureView, Field, FileSource, RepoConfig, ValueType
from feast.errors import SavedDatasetLocationAlreadyExists
from feast.types import Int64, String
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlplatform.errors import DataError, MissingObjectError
from mlplatform.feast_plugins import duckdb_s3, point_in_time
from mlplatform.feast_plugins.parquet_source import ParquetFile

TTL = timedelta(days=30)
# CI asks 2,000 times once; a hundred take some ten seconds here.
EXAMPLES = int(os.environ.get("PROPERTY_EXAMPLES", "40"))
START = pd.Timestamp("2023-01-01", tz="UTC")
FEATURES = ["short:job", "long:town", "long:rooms"]


class Repo:
    """A feature store over two parquet files in a folder: `short` has a ttl, `long` has none."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        user = Entity(name="user", join_keys=["user_id"], value_type=ValueType.STRING)
        self.store = FeatureStore(
            config=RepoConfig(
                project="unit",
                registry=str(folder / "registry.db"),
                provider="local",
                offline_store={"type": "mlplatform.feast_plugins.offline_store.S3DuckDBOfflineStore"},
                online_store=None,
                entity_key_serialization_version=3,
            )
        )
        short = self._view("short", user, TTL, [Field(name="job", dtype=String)])
        long = self._view(
            "long", user, timedelta(0), [Field(name="town", dtype=String), Field(name="rooms", dtype=Int64)]
        )
        self.store.apply([user, short, long, FeatureService(name="both", features=[short, long])])

    def _view(self, name: str, user: Entity, ttl: timedelta, schema: list[Field]) -> FeatureView:
        source = FileSource(name=name, path=str(self.path(name)), timestamp_field="at")
        return FeatureView(name=name, entities=[user], ttl=ttl, schema=schema, source=source)

    def path(self, view: str) -> Path:
        return self.folder / f"{view}.parquet"

    def write(self, versions: pd.DataFrame) -> None:
        # Types are given: a column of nothing but nulls has none of its own.
        text, moment = pa.string(), pa.timestamp("us", "UTC")
        known = [("user_id", text), ("at", moment), ("job", text), ("town", text), ("rooms", pa.int64())]
        table = pa.Table.from_pandas(versions, schema=pa.schema(known), preserve_index=False)
        pq.write_table(table.select(["user_id", "at", "job"]), self.path("short"))
        pq.write_table(table.select(["user_id", "at", "town", "rooms"]), self.path("long"))

    def ask(self, entity_df: pd.DataFrame, features: list[str] | None = None, **options: bool) -> pd.DataFrame:
        return self.store.get_historical_features(entity_df, features or FEATURES, **options).to_df()


def make_versions(rows: list[tuple[str, int, str | None]]) -> pd.DataFrame:
    """Make versions from (user, microseconds after START, job); town and rooms follow from the job."""
    frame = pd.DataFrame(rows, columns=["user_id", "offset", "job"])
    at = (START + pd.to_timedelta(frame.pop("offset"), unit="us")).astype("datetime64[us, UTC]")
    town = frame["job"].map(lambda job: job and f"{job}-town")
    rooms = pd.array([None if job is None else len(job) for job in frame["job"]], dtype="Int64")
    return frame.astype({"user_id": object, "job": object}).assign(at=at, town=town.astype(object), rooms=rooms)


def as_of(entity_df: pd.DataFrame, versions: pd.DataFrame, column: str, ttl: timedelta | None) -> list[object]:
    """Join by pandas' own as-of, the answer to compare with."""
    asked = pd.DataFrame(
        {
            "row": range(len(entity_df)),
            "user_id": entity_df["user_id"].to_numpy(),
            "at": pd.to_datetime(entity_df["event_timestamp"], utc=True).astype("datetime64[us, UTC]").to_numpy(),
        }
    )
    known = versions[["user_id", "at", column]].assign(at=versions["at"].to_numpy())
    joined = pd.merge_asof(
        asked.sort_values("at"), known.sort_values("at"), on="at", by="user_id", tolerance=ttl and pd.Timedelta(ttl)
    )
    return [None if pd.isna(value) else value for value in joined.sort_values("row")[column]]


def plain(column: pd.Series) -> list[object]:
    return [None if pd.isna(value) else value for value in column]


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Repo]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
            patch.delenv(name, raising=False)
        yield Repo(tmp_path_factory.mktemp("repo"))


@pytest.fixture
def two_versions(repo: Repo) -> Repo:
    repo.write(make_versions([("ann", 0, "cook"), ("ann", 86_400_000_000, "baker"), ("bob", 5, "smith")]))
    return repo


DAY_US = 86_400_000_000
TTL_US = TTL // timedelta(microseconds=1)
users = st.sampled_from(["ann", "bob", "cy", 'O\'Hara "x"'])
versions_strategy = st.lists(
    st.tuples(users, st.integers(0, 100 * DAY_US), st.sampled_from(["cook", "smith", "a'b", "", None])),
    min_size=1,
    max_size=30,
    unique_by=lambda row: row[:2],
)


@st.composite
def questions(draw: st.DrawFn) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Draw versions and an entity frame whose moments lie at, just before and just after what matters."""
    rows = draw(versions_strategy)
    near = st.builds(
        lambda row, shift: (row[0], row[1] + shift),
        st.sampled_from(rows),
        st.sampled_from([0, -1, 1, TTL_US, TTL_US - 1, TTL_US + 1]),
    )
    anywhere = st.tuples(st.one_of(users, st.just("nobody")), st.integers(-DAY_US, 150 * DAY_US))
    asked = draw(st.lists(st.one_of(near, anywhere), min_size=1, max_size=60))
    asked += draw(st.lists(st.sampled_from(asked), max_size=3))
    moments = START + pd.to_timedelta([offset for _, offset in asked], unit="us")
    zone = draw(st.sampled_from(["naive", "UTC", "Asia/Kolkata", "America/St_Johns"]))
    moments = moments.tz_localize(None) if zone == "naive" else moments.tz_convert(zone)
    moments = moments.as_unit(draw(st.sampled_from(["us", "ns"])))
    entity_df = pd.DataFrame(
        {
            "note": [f"n{i}" for i in range(len(asked))],
            "event_timestamp": moments,
            "user_id": [user for user, _ in asked],
        },
        index=draw(st.permutations(range(len(asked)))),
    )
    return make_versions(rows), entity_df


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=questions())
def test_every_row_asked_gets_what_another_as_of_join_gives(repo: Repo, drawn):
    versions, entity_df = drawn
    repo.write(versions)
    before = entity_df.copy()
    answer = repo.ask(entity_df)
    pd.testing.assert_frame_equal(entity_df, before)
    assert len(answer) == len(entity_df)
    assert answer["note"].tolist() == entity_df["note"].tolist(), "another order, or a column lost"
    assert answer["user_id"].tolist() == entity_df["user_id"].tolist()
    in_utc = pd.to_datetime(entity_df["event_timestamp"], utc=True)
    assert answer["event_timestamp"].tolist() == in_utc.tolist()
    assert plain(answer["job"]) == as_of(entity_df, versions, "job", TTL)
    assert plain(answer["town"]) == as_of(entity_df, versions, "town", None)
    assert plain(answer["rooms"]) == as_of(entity_df, versions, "rooms", None)


# Two keys, rows of one moment, other names in the file, a time of writing or none, and a range in place of a frame.

PLACES = [2**53, 2**53 + 1, -1]
instants = st.integers(0, 6).map(lambda step: step * 10 * DAY_US)
visits = st.lists(
    st.tuples(users, st.sampled_from(PLACES), instants, st.integers(0, 2), st.sampled_from(["a", "b", None])),
    min_size=1,
    max_size=15,
)


@st.composite
def two_key_questions(draw: st.DrawFn) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Draw visits with many ties, and questions about their very moments."""
    rows = draw(visits)
    stored = pd.DataFrame(rows, columns=["who", "where", "offset", "wrote", "said"])
    stored["when"] = START + pd.to_timedelta(stored.pop("offset"), unit="us")
    stored["written"] = START + pd.to_timedelta(stored.pop("wrote"), unit="D")
    asked = draw(st.lists(st.tuples(users, st.sampled_from(PLACES), instants), min_size=1, max_size=15))
    moments = START + pd.to_timedelta([offset for *_, offset in asked], unit="us")
    zone = draw(st.sampled_from(["UTC", "Asia/Kolkata", "America/St_Johns"]))
    entity_df = pd.DataFrame(
        {
            "user_id": [user for user, *_ in asked],
            "place_id": [place for _, place, _ in asked],
            "event_timestamp": moments.tz_convert(zone),
        }
    )
    return stored, entity_df


def expected_visit(stored: pd.DataFrame, user: str, place: int, moment: pd.Timestamp, has_created: bool) -> object:
    """Look through all rows, one by one: the latest, then the last written, then the greatest content."""
    best, answer = None, None
    for row in stored.itertuples():
        if (row.who, row.where) == (user, place) and moment - TTL <= row.when <= moment:
            said = (row.said is not None, row.said or "")
            rank = (row.when, row.written, said) if has_created else (row.when, said)
            if best is None or rank > best:
                best, answer = rank, row.said
    return answer


@pytest.fixture(scope="module")
def visit_store(repo: Repo, tmp_path_factory: pytest.TempPathFactory) -> tuple[FeatureStore, Path]:
    folder = tmp_path_factory.mktemp("visits")
    store = FeatureStore(config=repo.store.config.model_copy(update={"project": "visits"}))
    mapping = {"who": "user_id", "where": "place_id", "when": "at", "said": "word"}
    keys = [
        Entity(name="user", join_keys=["user_id"], value_type=ValueType.STRING),
        Entity(name="place", join_keys=["place_id"], value_type=ValueType.INT64),
    ]
    views = [
        FeatureView(
            name=name,
            entities=keys,
            ttl=TTL,
            schema=[Field(name="word", dtype=String)],
            source=FileSource(
                name=name,
                path=str(folder / "visits.parquet"),
                timestamp_field="at",
                created_timestamp_column=created,
                field_mapping=mapping,
            ),
        )
        for name, created in (("with_created", "written"), ("without", ""))
    ]
    store.apply([*keys, *views])
    return store, folder


@pytest.mark.parametrize("has_created", [True, False], ids=["with a time of writing", "without"])
@settings(max_examples=EXAMPLES // 2, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=two_key_questions())
def test_two_keys_ties_ranges_and_other_names_give_what_a_look_through_all_rows_gives(visit_store, drawn, has_created):
    stored, entity_df = drawn
    store, folder = visit_store
    # The file also has columns called like the mapped names, which must not be taken.
    decoys = {"at": START, "word": "decoy", "user_id": "decoy", "place_id": 0}
    table = pa.Table.from_pandas(stored.assign(**decoys), preserve_index=False)
    said = table.column_names.index("said")
    pq.write_table(table.set_column(said, "said", table["said"].cast(pa.string())), folder / "visits.parquet")
    name = "with_created" if has_created else "without"
    answer = store.get_historical_features(entity_df, [f"{name}:word"]).to_df()
    asked = zip(entity_df["user_id"], entity_df["place_id"], entity_df["event_timestamp"], strict=True)
    assert plain(answer["word"]) == [expected_visit(stored, *row, has_created) for row in asked]
    end = START + pd.Timedelta(days=30)
    ranged = store.get_historical_features(
        None, [f"{name}:word"], start_date=START.to_pydatetime(), end_date=end.to_pydatetime()
    ).to_df()
    within = stored[stored["when"] <= end]
    known = sorted(set(zip(within["who"], within["where"], within["when"], strict=True)))
    found = list(zip(ranged["user_id"], ranged["place_id"], ranged["event_timestamp"], strict=True))
    assert found == known
    assert plain(ranged["word"]) == [expected_visit(stored, *row, has_created) for row in known]


def test_keys_of_one_hash_are_told_apart(two_versions, monkeypatch):
    users, moments = ["ann", "bob", "cy", "ann"], [0, 0, 0, 2]
    entity_df = pd.DataFrame({"user_id": users, "event_timestamp": [START + pd.Timedelta(d, "D") for d in moments]})
    monkeypatch.setattr(point_in_time, "_hash", lambda _: "0")
    entity_df["event_timestamp"] += pd.Timedelta(6, "us")
    assert plain(two_versions.ask(entity_df)["job"]) == ["cook", "smith", None, "baker"]


def test_a_value_counts_from_its_very_microsecond_to_its_ttl_and_no_longer(two_versions):
    last = START + pd.Timedelta(days=1)
    moments = [START - pd.Timedelta(1, "us"), START, last + TTL, last + TTL + pd.Timedelta(1, "us")]
    answer = two_versions.ask(pd.DataFrame({"user_id": "ann", "event_timestamp": moments}))
    assert plain(answer["job"]) == [None, "cook", "baker", None]
    assert plain(answer["town"]) == [None, "cook-town", "baker-town", "baker-town"], "a view without ttl forgets"


def test_an_entity_frame_may_be_empty(two_versions):
    empty = pd.DataFrame(
        {"user_id": pd.Series(dtype=object), "event_timestamp": pd.Series(dtype="datetime64[ns, UTC]")}
    )
    assert list(two_versions.ask(empty).columns) == ["user_id", "event_timestamp", "job", "town", "rooms"]


def test_moments_and_ids_that_are_missing_get_nulls(two_versions):
    entity_df = pd.DataFrame({"user_id": ["ann", None, "ann"], "event_timestamp": [START, START, pd.NaT]})
    assert plain(two_versions.ask(entity_df)["town"]) == ["cook-town", None, None]


def test_rows_of_a_file_without_key_or_time_are_nobodys(repo):
    rows = make_versions([("ann", 0, "cook"), ("ann", 1, "lost"), ("ann", 2, "never")])
    rows.loc[1, "user_id"] = None
    rows.loc[2, "at"] = pd.NaT
    repo.write(rows)
    entity_df = pd.DataFrame({"user_id": [None, "ann"], "event_timestamp": START + pd.Timedelta(days=1)})
    assert plain(repo.ask(entity_df)["town"]) == [None, "cook-town"]


def test_extra_columns_keep_their_types(two_versions):
    extra = pd.DataFrame(
        {
            "user_id": ["ann", "bob"],
            "event_timestamp": START,
            "weight": np.array([1.5, 2.5], dtype="float32"),
            "kind": pd.Categorical(["a", "b"]),
            "flag": [True, False],
        }
    )
    answer = two_versions.ask(extra)
    assert answer[["weight", "kind", "flag"]].dtypes.equals(extra[["weight", "kind", "flag"]].dtypes)


def test_the_only_column_of_times_is_taken_whatever_its_name(two_versions):
    assert plain(two_versions.ask(pd.DataFrame({"user_id": ["ann"], "seen": [START]}))["job"]) == ["cook"]


def test_python_datetimes_in_an_object_column_are_times(two_versions):
    entity_df = pd.DataFrame({"user_id": ["ann"], "event_timestamp": pd.Series([START.to_pydatetime()], dtype=object)})
    assert plain(two_versions.ask(entity_df)["job"]) == ["cook"]


def test_full_feature_names_carry_the_view(two_versions):
    answer = two_versions.ask(pd.DataFrame({"user_id": ["ann"], "event_timestamp": [START]}), full_feature_names=True)
    assert list(answer.columns[2:]) == ["short__job", "long__town", "long__rooms"]


def test_a_feature_service_is_answered_like_its_features(two_versions):
    entity_df = pd.DataFrame({"user_id": ["ann"], "event_timestamp": [START]})
    service = two_versions.store.get_feature_service("both")
    answer = two_versions.store.get_historical_features(entity_df, service).to_df()
    assert answer[["job", "town", "rooms"]].iloc[0].tolist() == ["cook", "cook-town", 4]


def test_of_two_rows_at_one_moment_the_later_written_counts(tmp_path):
    path = tmp_path / "twice.parquet"
    at = [START.as_unit("us")] * 3
    written = [START + pd.Timedelta(days=day) for day in (1, 3, 2)]
    pd.DataFrame({"user_id": "ann", "at": at, "job": ["a", "b", "c"], "written": written}).to_parquet(path)
    lookup = point_in_time.Lookup(
        view="twice",
        file=ParquetFile("twice", str(path)),
        keys={"user_id": "user_id"},
        features={"job": "job"},
        types={},
        timestamp_field="at",
        created_column="written",
        ttl=None,
    )
    entities = pa.table({"user_id": ["ann"], "event_timestamp": pa.array([START], pa.timestamp("us", "UTC"))})
    assert point_in_time.point_in_time(entities, "event_timestamp", [lookup]).column("job").to_pylist() == ["b"]


def test_text_of_more_than_arrow_holds_in_one_piece_is_taken_all_the_same(two_versions, monkeypatch):
    asked = pd.DataFrame(
        {"user_id": ["ann", "nobody", "ann"], "event_timestamp": START + pd.to_timedelta([1, 1, 99], "D")}
    )
    expected = two_versions.ask(asked)
    monkeypatch.setattr(point_in_time, "TEXT_LIMIT", 1)
    pd.testing.assert_frame_equal(two_versions.ask(asked), expected)
    assert expected["town"].notna().any()


def test_a_file_is_read_anew_after_it_was_replaced(repo):
    entity_df = pd.DataFrame({"user_id": ["ann"], "event_timestamp": [START]})
    for job in ("cook", "baker"):
        repo.write(make_versions([("ann", 0, job)]))
        assert plain(repo.ask(entity_df)["job"]) == [job]


def test_a_result_is_saved_once_and_replaced_only_when_allowed(two_versions, tmp_path):
    from feast.infra.offline_stores.file_source import SavedDatasetFileStorage

    job = two_versions.store.get_historical_features(
        pd.DataFrame({"user_id": ["ann"], "event_timestamp": [START]}), FEATURES
    )
    storage = SavedDatasetFileStorage(path=str(tmp_path / "saved.parquet"))
    job.persist(storage)
    assert pd.read_parquet(tmp_path / "saved.parquet")["job"].tolist() == ["cook"]
    with pytest.raises(SavedDatasetLocationAlreadyExists):
        job.persist(storage)
    job.persist(storage, allow_overwrite=True)


def test_an_entity_frame_without_times_is_refused(two_versions):
    with pytest.raises(DataError, match="no column of times; name the moment of each row event_timestamp"):
        two_versions.ask(pd.DataFrame({"user_id": ["ann"]}))


def test_an_entity_frame_with_two_columns_of_times_is_refused(two_versions):
    with pytest.raises(DataError, match="columns of times: seen, left"):
        two_versions.ask(pd.DataFrame({"user_id": ["ann"], "seen": [START], "left": [START]}))


def test_an_entity_frame_with_times_as_text_is_refused(two_versions):
    with pytest.raises(DataError, match=r"holds string values and no times; convert it with pd\.to_datetime"):
        two_versions.ask(pd.DataFrame({"user_id": ["ann"], "event_timestamp": ["2023-01-01"]}))


def test_an_entity_frame_with_times_as_numbers_is_refused(two_versions):
    with pytest.raises(DataError, match="holds integer values and no times"):
        two_versions.ask(pd.DataFrame({"user_id": ["ann"], "event_timestamp": [1_672_531_200]}))


def test_an_entity_frame_without_the_key_is_refused(two_versions):
    with pytest.raises(DataError, match="no column user_id; add the ids to ask about"):
        two_versions.ask(pd.DataFrame({"user": ["ann"], "event_timestamp": [START]}))


def test_an_entity_frame_with_a_column_named_like_a_feature_is_refused(two_versions):
    with pytest.raises(DataError, match=r"columns named like features \(job\)"):
        two_versions.ask(pd.DataFrame({"user_id": ["ann"], "event_timestamp": [START], "job": ["cook"]}))


def test_a_query_instead_of_an_entity_frame_is_refused(two_versions):
    with pytest.raises(DataError, match="history needs a data frame with user_id, event_timestamp"):
        two_versions.store.get_historical_features("SELECT 1", FEATURES).to_df()


def test_a_feature_file_without_a_column_is_named_with_what_it_has(two_versions):
    frame = pd.read_parquet(two_versions.path("long"))
    frame.rename(columns={"town": "city"}).to_parquet(two_versions.path("long"))
    with pytest.raises(
        DataError,
        match=r"long\.parquet \(source long\) has no column town; it has user_id, at, city, rooms; write the file",
    ):
        two_versions.ask(pd.DataFrame({"user_id": ["ann"], "event_timestamp": [START]}))


def test_a_feature_file_with_another_type_is_refused(two_versions):
    frame = pd.read_parquet(two_versions.path("short"))
    frame.assign(job=1).to_parquet(two_versions.path("short"))
    with pytest.raises(
        DataError, match=r"short:job in .*short\.parquet \(source short\) is int64, and its view says STRING; write"
    ):
        two_versions.ask(pd.DataFrame({"user_id": ["ann"], "event_timestamp": [START]}))


def test_a_feature_file_with_times_as_text_is_refused(two_versions):
    frame = pd.read_parquet(two_versions.path("short"))
    frame.assign(at="2023-01-01").to_parquet(two_versions.path("short"))
    with pytest.raises(
        DataError, match=r"at in .*short\.parquet \(source short\) is VARCHAR and no time; write timestamps"
    ):
        two_versions.ask(pd.DataFrame({"user_id": ["ann"], "event_timestamp": [START]}))


def test_a_feature_file_that_is_missing_is_named(two_versions):
    two_versions.path("short").unlink()
    with pytest.raises(MissingObjectError, match=r"short\.parquet \(source short\) is not there; write it"):
        two_versions.ask(pd.DataFrame({"user_id": ["ann"], "event_timestamp": [START]}))


def test_a_feature_file_that_is_no_parquet_is_refused(two_versions):
    two_versions.path("short").write_bytes(b"user_id,at,job\n")
    with pytest.raises(DataError, match=r"short\.parquet \(source short\) cannot be read .* write it"):
        two_versions.ask(pd.DataFrame({"user_id": ["ann"], "event_timestamp": [START]}))


def test_the_secret_names_the_endpoint_and_quotes_what_it_is_given():
    environ = {
        "AWS_ENDPOINT_URL": "https://store.example:9000",
        "AWS_ACCESS_KEY_ID": "o'key",
        "AWS_SECRET_ACCESS_KEY": "s",
        "AWS_DEFAULT_REGION": "here",
    }
    assert duckdb_s3._secret(environ) == (
        "CREATE SECRET (TYPE s3, KEY_ID 'o''key', SECRET 's', REGION 'here', ENDPOINT 'store.example:9000', "
        "URL_STYLE 'path', USE_SSL true)"
    )
    assert duckdb_s3._secret({}) == "CREATE SECRET (TYPE s3)"
