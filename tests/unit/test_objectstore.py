"""Object names, and frames as bytes: no server needed."""

from __future__ import annotations

import contextlib
import hashlib
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from uuid import UUID

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlplatform import objectstore
from mlplatform.errors import DataError

# No file can hold a lone surrogate: it is no UTF-8.
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
moments = st.datetimes(datetime(1700, 1, 1), datetime(2260, 1, 1), timezones=st.just(UTC))
COLUMNS = {
    "object": st.none() | texts,
    "int64": st.integers(-(2**63), 2**63 - 1),
    "Int8": st.none() | st.integers(-128, 127),
    "float32": st.floats(width=32),
    "float64": st.floats(),
    "bool": st.booleans(),
    "boolean": st.none() | st.booleans(),
    "string": st.none() | texts,
    "datetime64[us, UTC]": moments,
    "datetime64[ns]": moments.map(lambda moment: moment.replace(tzinfo=None)),
    "timedelta64[us]": st.timedeltas(timedelta(-100_000), timedelta(100_000)),
}


@st.composite
def frames(draw: st.DrawFn) -> pd.DataFrame:
    """Frames of every kind of column that `encode` accepts, under any names and any row index."""
    n_rows = draw(st.integers(0, 5))
    kinds = draw(st.lists(st.sampled_from(sorted(COLUMNS)), min_size=1, max_size=6))
    names = draw(st.lists(texts, min_size=len(kinds), max_size=len(kinds), unique=True))
    index = draw(
        st.sampled_from(
            [pd.RangeIndex(n_rows), pd.Index(range(n_rows)[::-1]), pd.Index([f"row {row}" for row in range(n_rows)])]
        )
    )
    columns = {
        name: pd.Series(
            draw(st.lists(COLUMNS[kind], min_size=n_rows, max_size=n_rows)), index=index, dtype=kind, name=name
        )
        for name, kind in zip(names, kinds, strict=True)
    }
    return pd.DataFrame(columns, index=index, columns=pd.Index(names, dtype=object))


@given(frames())
def test_any_frame_comes_back_as_it_was(frame: pd.DataFrame) -> None:
    back = objectstore.decode(objectstore.encode(frame, "s3://b/k.parquet"), "s3://b/k.parquet")
    pd.testing.assert_frame_equal(back, frame, check_exact=True)


def nested(value: object) -> pd.DataFrame:
    return pd.DataFrame({"column": pd.Series([value, value], dtype=object)})


@pytest.mark.parametrize(
    "frame",
    [
        pd.DataFrame({"column": [1, "a"]}),
        nested([1, 2]),
        nested({"a": 1}),
        nested(1),
        nested(1.5),
        pd.DataFrame({"column": [1j]}),
        pd.DataFrame({"column": pd.Categorical(["a"])}),
        pd.DataFrame({"column": ["\ud800"]}),
        pd.DataFrame({1: ["a number as a name"]}),
        pd.DataFrame([["a", "b"]], columns=["same", "same"]),
        pd.DataFrame(index=[0, 1]),
    ],
    ids=[
        "mixed",
        "lists",
        "dicts",
        "integers",
        "floats",
        "complex",
        "categories",
        "surrogate",
        "number as name",
        "same name twice",
        "no column",
    ],
)
def test_a_frame_that_parquet_cannot_keep_is_refused_in_one_line(frame: pd.DataFrame) -> None:
    with pytest.raises(DataError, match=r"parquet cannot keep the frame for s3://b/k.parquet .*;") as caught:
        objectstore.encode(frame, "s3://b/k.parquet")
    assert "\n" not in str(caught.value)


# What our own data consist of must not be among what is refused.
KEPT = {"int8", "int64", "Int64", "float64", "bool", "boolean", "object", "time in us", "time in ns", "time in UTC"}


def every_type() -> dict[str, pd.Series]:
    """A column of two values of every type that NumPy, pandas and Arrow have for one."""
    made: dict[str, pd.Series] = {}
    for kind in ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"):
        made[kind] = pd.Series([1, 2], dtype=kind)
        nullable = kind.replace("u", "U").replace("int", "Int") if kind[0] == "i" else kind.replace("uint", "UInt")
        made[nullable] = pd.Series([1, None], dtype=nullable)
    for kind in ("float16", "float32", "float64", "longdouble", "Float32", "Float64", "complex128", "bool", "boolean"):
        made[kind] = pd.Series([1, 0], dtype=kind)
    for kind in ("string[python]", "string[pyarrow]", "category", "object"):
        made[kind] = pd.Series(["a", None], dtype=kind)
    for unit in ("s", "ms", "us", "ns"):
        made[f"time in {unit}"] = pd.Series(np.array(["2023-01-02T03:04:05", "NaT"], dtype=f"datetime64[{unit}]"))
        made[f"delta in {unit}"] = pd.Series(np.array([1, 2], dtype=f"timedelta64[{unit}]"))
    for zone in ("UTC", "Asia/Kathmandu", timezone(timedelta(hours=2)), timezone(timedelta(seconds=3661))):
        made[f"time in {zone}"] = made["time in us"].dt.tz_localize(zone)
    made["period"] = pd.Series(pd.period_range("2023", periods=2, freq="M"))
    made["interval"] = pd.Series(pd.interval_range(0, 2))
    made["sparse"] = pd.Series(pd.arrays.SparseArray([0, 1]))
    moment, pair = datetime(2023, 1, 2), pa.struct([("a", pa.int8())])
    for value in (b"x", UUID(int=1), Decimal("1.5"), moment, moment.date(), moment.time(), (1, 2), {1}):
        made[f"objects: {value!r}"] = pd.Series([value, value], dtype=object)
    for value, kind in (
        (True, pa.bool_()), (1, pa.int8()), (1, pa.uint64()), (1.5, pa.float32()), (1.5, pa.float64()),
        (None, pa.null()), ("a", pa.string()), ("a", pa.large_string()), (b"a", pa.binary()), (b"abc", pa.binary(3)),
        (b"a", pa.large_binary()), (moment.date(), pa.date32()), (moment.date(), pa.date64()),
        (moment.time(), pa.time32("s")), (moment.time(), pa.time64("us")), (moment, pa.timestamp("s")),
        (moment, pa.timestamp("ns")), (moment, pa.timestamp("us", "UTC")), (timedelta(1), pa.duration("s")),
        (Decimal("1.5"), pa.decimal128(5, 2)), (Decimal("1.5"), pa.decimal256(40, 2)), ([1], pa.list_(pa.int8())),
        ({"a": 1}, pair), ([("a", 1)], pa.map_(pa.string(), pa.int8())), ("a", pa.dictionary(pa.int8(), pa.string())),
    ):  # fmt: skip
        made[f"Arrow {kind}"] = pd.Series(pd.arrays.ArrowExtensionArray(pa.array([value, None], kind)))
    return made


@pytest.mark.parametrize(("kind", "column"), every_type().items(), ids=list(every_type()))
def test_a_type_comes_back_as_it_was_or_is_refused_in_one_line(kind: str, column: pd.Series) -> None:
    as_index = pd.DataFrame({"n": [1, 2]})
    with contextlib.suppress(NotImplementedError):  # pandas has no such index
        as_index.index = pd.Index(column, dtype=column.dtype)
    for frame in (pd.DataFrame({"column": column}), as_index):
        for part in (frame, frame.head(0)):
            try:
                body = objectstore.encode(part, "s3://b/k.parquet")
            except DataError as error:
                refusal = str(error)
                assert ("\n" in refusal, kind in KEPT and frame is not as_index) == (False, False), refusal
                continue
            back = objectstore.decode(body, "s3://b/k.parquet")
            assert [*map(str, back.dtypes), str(back.index.dtype)] == [*map(str, part.dtypes), str(part.index.dtype)]
            assert back.reset_index().astype(object).map(str).equals(part.reset_index().astype(object).map(str))


def test_a_null_among_objects_comes_back_as_none() -> None:
    frame = pd.DataFrame({"column": pd.Series(["a", None, float("nan"), pd.NA], dtype=object)})
    back = objectstore.decode(objectstore.encode(frame, "s3://b/k.parquet"), "s3://b/k.parquet")
    assert back["column"].tolist() == ["a", None, None, None]


@pytest.mark.parametrize(
    "index",
    [pd.Index([1, 2], name=7), pd.Index([1, 2], name=("a", "b")), pd.Index([1, "a"], dtype=object)],
    ids=["a number as name", "two names", "mixed"],
)
def test_an_index_that_parquet_cannot_keep_is_refused(index: pd.Index) -> None:
    with pytest.raises(DataError, match="parquet cannot keep the frame"):
        objectstore.encode(pd.DataFrame({"n": [1, 2]}, index=index), "s3://b/k.parquet")


def test_a_file_with_types_that_pandas_does_not_know_is_refused_in_one_line() -> None:
    body = pd.DataFrame({"n": pd.arrays.ArrowExtensionArray(pa.array([[1]], pa.list_(pa.int8())))}).to_parquet()
    with pytest.raises(DataError, match="cannot be read") as caught:
        objectstore.decode(body, "s3://b/k.parquet")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("uri", ["s3://b/k.csv", "s3://b/k.txt", "s3://b/parquet"])
def test_another_format_is_refused(uri: str) -> None:
    with pytest.raises(DataError, match=r"is not the name of a parquet file; end it in \.parquet"):
        objectstore.encode(pd.DataFrame({"whole": [1]}), uri)


@pytest.mark.parametrize("body", [b"junk", b""])
def test_bytes_that_are_no_parquet_file_are_refused_in_one_line(body: bytes) -> None:
    with pytest.raises(DataError, match="cannot be read") as caught:
        objectstore.decode(body, "s3://b/k.parquet")
    assert "\n" not in str(caught.value)


def test_a_name_holds_the_digest_of_its_content() -> None:
    digest = hashlib.sha256(b"content").hexdigest()[:16]
    assert objectstore.addressed("s3://b/folder/name.parquet", b"content") == f"s3://b/folder/name-{digest}.parquet"


@pytest.mark.parametrize("uri", ["bucket/key", "s3://bucket", "s3://bucket/", "s3:///key", "file:///tmp/key", ""])
def test_an_address_without_bucket_and_key_is_refused(uri: str) -> None:
    with pytest.raises(DataError, match="give s3://bucket/key"):
        objectstore.split_uri(uri)


def test_an_address_is_divided_into_bucket_and_key() -> None:
    assert objectstore.split_uri("s3://bucket/a/b.csv") == ("bucket", "a/b.csv")
