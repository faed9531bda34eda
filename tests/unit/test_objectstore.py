"""Object names, and frames as bytes: no server needed."""

from __future__ import annotations

import hashlib

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlplatform import objectstore
from mlplatform.errors import DataError

TYPES = pd.DataFrame(
    {
        "text": ["NA", "a,b\n"],
        "whole": [1, -2],
        "real": [0.1, None],
        "flag": [True, False],
        "time": pd.to_datetime(["2023-01-24T06:52:20.000001Z", "2023-01-25T00:00:00Z"], format="ISO8601").as_unit("us"),
        "small": pd.array([1, None], dtype="Int8"),
    }
)


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_a_frame_comes_back_with_its_types(suffix: str) -> None:
    uri = f"s3://bucket/frame.{suffix}"
    body, metadata = objectstore.encode(TYPES, uri)
    pd.testing.assert_frame_equal(objectstore.decode(body, uri, metadata=metadata), TYPES)


# No file can hold a lone surrogate: it is no UTF-8.
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@given(st.lists(st.tuples(texts, st.integers(-(2**63), 2**63 - 1), st.floats(allow_nan=False)), max_size=5))
def test_any_frame_comes_back_from_parquet_as_it_was(rows: list[tuple[str, int, float]]) -> None:
    frame = pd.DataFrame(rows, columns=["text", "whole", "real"])
    body, metadata = objectstore.encode(frame, "s3://b/k.parquet")
    pd.testing.assert_frame_equal(objectstore.decode(body, "s3://b/k.parquet", metadata=metadata), frame)


def test_the_row_index_survives_in_parquet() -> None:
    shuffled = TYPES.iloc[::-1]
    body, metadata = objectstore.encode(shuffled, "s3://b/k.parquet")
    assert objectstore.decode(body, "s3://b/k.parquet", metadata=metadata).index.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("frame", "uri", "reason"),
    [
        (TYPES.iloc[::-1], "s3://b/k.csv", "reset the index"),
        (TYPES, "s3://b/k.txt", "names no known format"),
        (pd.DataFrame({"text": ["", "a"]}), "s3://b/k.csv", "would not come back the same"),
        (pd.DataFrame({"mixed": [1, "a"]}), "s3://b/k.parquet", "convert the column first"),
    ],
)
def test_a_frame_that_would_not_come_back_the_same_is_refused(frame: pd.DataFrame, uri: str, reason: str) -> None:
    with pytest.raises(DataError, match=reason) as caught:
        objectstore.encode(frame, uri)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("body", "uri"), [(b"junk", "s3://b/k.parquet"), (b"", "s3://b/k.csv"), (b"a\n\xff", "s3://b/k.csv")]
)
def test_bytes_that_are_no_such_file_are_refused_in_one_line(body: bytes, uri: str) -> None:
    with pytest.raises(DataError, match="cannot be read") as caught:
        objectstore.decode(body, uri)
    assert "\n" not in str(caught.value)


def test_a_name_holds_the_digest_of_its_content() -> None:
    digest = hashlib.sha256(b"content").hexdigest()[:16]
    assert objectstore.addressed("s3://b/folder/name.csv", b"content") == f"s3://b/folder/name-{digest}.csv"


@pytest.mark.parametrize("uri", ["bucket/key", "s3://bucket", "s3://bucket/", "s3:///key", "file:///tmp/key", ""])
def test_an_address_without_bucket_and_key_is_refused(uri: str) -> None:
    with pytest.raises(DataError, match="give s3://bucket/key"):
        objectstore.split_uri(uri)


def test_an_address_is_divided_into_bucket_and_key() -> None:
    assert objectstore.split_uri("s3://bucket/a/b.csv") == ("bucket", "a/b.csv")
