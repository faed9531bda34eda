"""Object names, and frames as bytes: no server needed."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta

import pandas as pd
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
