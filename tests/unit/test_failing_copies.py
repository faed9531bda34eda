"""What a copy does when the object store fails in the middle: stand-ins for a store, since a real one does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import EndpointConnectionError

from mlplatform.errors import ServiceDownError
from mlplatform_ops import backup


class Keeping:
    """A store that answers 200 to a deletion, and keeps an object."""

    def delete_objects(self, **_: Any) -> dict[str, Any]:
        return {"Deleted": [{"Key": "a"}], "Errors": [{"Key": "b", "Code": "InternalError"}]}


class Leaving:
    """A store that is there when it is asked for its objects, and away when they come."""

    def get_paginator(self, _: str) -> Leaving:
        return self

    def paginate(self, **_: Any) -> list[dict[str, Any]]:
        return [{}]

    def upload_file(self, *_: Any) -> None:
        raise EndpointConnectionError(endpoint_url="http://127.0.0.1:1")


def test_an_object_that_the_store_keeps_is_named() -> None:
    with pytest.raises(ServiceDownError, match=r"keeps 1 objects .* such as s3://bucket/b \(InternalError\)"):
        backup.delete(Keeping(), "bucket", ["a", "b"])


def test_a_store_that_leaves_while_a_copy_is_put_back_is_named(tmp_path: Path) -> None:
    (tmp_path / "buckets" / "bucket").mkdir(parents=True)
    (tmp_path / "buckets" / "bucket" / "key").touch()
    with pytest.raises(ServiceDownError, match="does not answer for s3://bucket/key"):
        backup.restore(Leaving(), tmp_path)
