"""Frames in a real object store."""

from __future__ import annotations

import socket
from dataclasses import replace
from uuid import uuid4

import pandas as pd
import pytest

from mlplatform import objectstore
from mlplatform.connection import s3_client
from mlplatform.errors import CredentialsError, DataError, MissingObjectError, ServiceDownError
from mlplatform.settings import BUCKETS, DATASETS_BUCKET, Settings

FRAME = pd.DataFrame(
    {
        "name": ["a", "b"],
        "count": pd.array([1, None], dtype="Int64"),
        "time": pd.to_datetime(["2023-01-24", "2023-05-20"], utc=True).as_unit("us"),
    }
)


@pytest.fixture
def folder(platform: Settings) -> str:
    return f"s3://{DATASETS_BUCKET}/test-{uuid4()}"


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_frame_is_read_back_with_its_types(folder: str) -> None:
    uri = objectstore.write_frame(FRAME, f"{folder}/frame.parquet")
    pd.testing.assert_frame_equal(objectstore.read_frame(uri), FRAME)


def test_the_same_data_is_stored_once_and_never_written_again(folder: str) -> None:
    first = objectstore.write_frame(FRAME, f"{folder}/frame.parquet")
    before = objectstore.list_objects(folder)
    again = objectstore.write_frame(FRAME.copy(), f"{folder}/frame.parquet")
    other = objectstore.write_frame(FRAME.iloc[::-1], f"{folder}/frame.parquet")
    after = objectstore.list_objects(folder)
    assert first == again != other
    assert len(before) == 1
    assert len(after) == 2
    stored = after.set_index("uri").loc[first]
    assert stored["modified"] == before["modified"].item(), "the object was written a second time"


def test_a_damaged_object_is_noticed_by_its_name(folder: str) -> None:
    uri = objectstore.write_frame(FRAME, f"{folder}/frame.parquet")
    objectstore.write_bytes(objectstore.encode(FRAME.head(1), uri), uri)
    with pytest.raises(DataError, match="other bytes than its name says"):
        objectstore.read_frame(uri)


def test_bytes_come_back_as_they_were_last_written(folder: str) -> None:
    uri = objectstore.write_bytes(b"first", f"{folder}/raw")
    assert objectstore.write_bytes(b"\x00\xff", uri) == uri
    assert objectstore.read_bytes(uri) == b"\x00\xff"


NAMES = [
    "a b", "a+b", "a%2fb", "%2e%2e", "a&b=c", "a?b", "a#b", "it's", 'say "x"', "back\\slash", "semi;colon",
    "na\u00efve", "nai\u0308ve", "\U0001f600", "\u202eleft", "*", "~", "<&>", "a..b", "...", "-", "tab\tinside",
    "two\nlines", "nul\0", "..", "../up", "a/../b", "a/./b", "a//b", "/a", "a/", "../../feature-registry/registry.db",
    "\ud800", "x" * 255, "y" * 256, "z/" * 400 + "z", "\u00e9" * 600, "x/" * 600,
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name[:30]))
def test_a_name_is_kept_as_it_is_or_refused_in_one_line(folder: str, name: str) -> None:
    uri, before = f"{folder}/{name}", {bucket: bucket_names(bucket) for bucket in BUCKETS}
    try:
        written = objectstore.write_bytes(b"body", uri)
    except DataError as error:
        refusal = str(error)
        assert "\n" not in refusal
        assert before == {bucket: bucket_names(bucket) for bucket in BUCKETS}
        return
    assert (written, objectstore.read_bytes(uri)) == (uri, b"body")
    after = {bucket: bucket_names(bucket) for bucket in BUCKETS}
    assert after == before | {DATASETS_BUCKET: before[DATASETS_BUCKET] | {uri}}


def bucket_names(bucket: str) -> set[str]:
    return set(objectstore.list_objects(f"s3://{bucket}")["uri"])


def test_a_client_made_from_settings_needs_no_environment(
    platform: Settings, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = objectstore.write_frame(FRAME, f"{folder}/frame.parquet")
    for name in platform.to_env():
        monkeypatch.delenv(name, raising=False)
    assert len(objectstore.read_frame(uri, client=s3_client(platform))) == 2


def test_a_missing_bucket_is_named_and_not_made(platform: Settings) -> None:
    uri = "s3://no-such-bucket/frame.parquet"
    with pytest.raises(MissingObjectError, match="no bucket no-such-bucket; run 'make up'"):
        objectstore.write_frame(FRAME.head(1)[["name"]], uri)
    with pytest.raises(MissingObjectError, match="no bucket no-such-bucket"):
        objectstore.read_frame(uri)


def test_a_missing_object_is_named(folder: str) -> None:
    with pytest.raises(MissingObjectError, match=r"none\.parquet is not there"):
        objectstore.read_frame(f"{folder}/none.parquet")


def test_an_object_that_is_no_frame_is_refused_in_one_line(folder: str) -> None:
    uri = objectstore.write_bytes(b"not parquet", f"{folder}/frame.parquet")
    with pytest.raises(DataError, match="cannot be read") as caught:
        objectstore.read_frame(uri)
    assert "\n" not in str(caught.value)


def test_wrong_keys_are_reported_as_such(platform: Settings, folder: str) -> None:
    stranger = s3_client(replace(platform, secret_key="wrong"))  # noqa: S106
    with pytest.raises(CredentialsError, match="AWS_ACCESS_KEY_ID"):
        objectstore.write_frame(FRAME, f"{folder}/frame.parquet", client=stranger)
    assert objectstore.list_objects(folder).empty, "something was written all the same"


def test_a_store_that_is_down_is_reported_within_seconds(platform: Settings) -> None:
    nowhere = s3_client(replace(platform, s3_endpoint=f"http://127.0.0.1:{closed_port()}"))
    with pytest.raises(ServiceDownError, match="make up"):
        objectstore.read_frame(f"s3://{DATASETS_BUCKET}/frame.parquet", client=nowhere)
