from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlplatform.clients.sharing import stored_at
from mlplatform.connection import s3_client
from mlplatform.settings import STATE_VARIABLE, Settings, read_settings, state_folder
from mlplatform_ops import cli, workshop
from mlplatform_ops.embedded import users
from mlplatform_ops.embedded.services import auth_config, s3_config, valkey_config
from mlplatform_ops.enclosure import WORK

PLATFORM = {
    "MLFLOW_TRACKING_URI": "http://127.0.0.1:1",
    "MLFLOW_TRACKING_USERNAME": "admin",
    "MLFLOW_TRACKING_PASSWORD": "hush-1",
    "AWS_ENDPOINT_URL": "http://127.0.0.1:2",
    "AWS_ACCESS_KEY_ID": "platform",
    "AWS_SECRET_ACCESS_KEY": "hush-2",
    "AWS_DEFAULT_REGION": "us-east-1",
    "REDIS_CONNECTION_STRING": "127.0.0.1:3,password=hush-3,socket_timeout=1",
    "MLPLATFORM_REDIS_PORT": "3",
    "MLPLATFORM_REDIS_PASSWORD": "hush-3",
}


@pytest.fixture
def two(tmp_path: Path) -> list[Settings]:
    """The settings of two users, read from where they are kept."""
    users.make_users(tmp_path, 2)
    users.write_users(tmp_path, users.read_users(tmp_path), PLATFORM)
    return [read_settings(user.private(tmp_path)) for user in users.read_users(tmp_path)]


def test_two_users_share_addresses_and_no_secret(two: list[Settings]) -> None:
    first, second = (settings.to_env() for settings in two)
    secret = {name for name in first if "PASSWORD" in name or "SECRET" in name or "TOKEN" in name or "KEY" in name}
    assert secret >= {"MLFLOW_TRACKING_PASSWORD", "MODEL_SIGNING_KEY", "FEATURE_REGISTRY_KEY", "AWS_SECRET_ACCESS_KEY"}
    assert [name for name in secret if first[name] == second[name]] == []
    assert not any("hush" in value for value in (*first.values(), *second.values()))
    assert first["MLFLOW_TRACKING_URI"] == second["MLFLOW_TRACKING_URI"] == PLATFORM["MLFLOW_TRACKING_URI"]
    assert (two[0].workspace, two[0].bucket_prefix) == ("user01", "user01-")
    assert two[1].redis_url.endswith("@127.0.0.1:3/2")


def test_users_keep_their_secrets_when_others_join(tmp_path: Path) -> None:
    users.make_users(tmp_path, 2)
    before = users.read_users(tmp_path)
    assert [user.name for user in users.make_users(tmp_path, 3)] == ["user03"]
    assert users.read_users(tmp_path)[:2] == before
    assert users.make_users(tmp_path, 1) == []
    assert len(users.read_users(tmp_path)) == 3


def test_a_workshop_never_takes_the_teachers_own_platform(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for state in ("", str(tmp_path / "own")):
        monkeypatch.setenv(STATE_VARIABLE, state)
        assert cli._workshop_state() != state_folder()
        assert cli._workshop_state().parent == state_folder().parent


@pytest.mark.parametrize("left", ["a folder", "a closed folder", "a link", "a file", "nothing"])
def test_a_fresh_start_gives_notebooks_whatever_the_user_has_put_there(left: str, tmp_path: Path) -> None:
    (user,) = users.make_users(tmp_path, 1)
    work = user.folder(tmp_path) / WORK
    work.parent.mkdir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    if left == "a link":
        work.symlink_to(elsewhere)
    elif left == "a file":
        work.touch()
    elif left != "nothing":
        (work / "notebooks").mkdir(parents=True)
        work.chmod(0o500 if left == "a closed folder" else 0o700)
    workshop._hand_out(tmp_path, user)
    assert not work.is_symlink()
    assert sorted(path.name for path in work.iterdir()) == sorted(workshop.COPIED)
    assert list((work / "notebooks").glob("*.ipynb"))
    assert list(elsewhere.iterdir()) == []
    assert [path.name for path in user.private(tmp_path).iterdir() if path.is_dir()] == []


def test_a_platform_without_users_tells_its_servers_what_it_always_did() -> None:
    assert "user " not in valkey_config(PLATFORM)
    assert "default_permission = READ" in auth_config(PLATFORM)
    assert s3_config(PLATFORM).count('"name"') == 1


def test_a_bucket_gets_its_prefix_for_boto3_and_for_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.setenv(name, PLATFORM[name])
    client: Any = s3_client()
    asked = {"Bucket": "mlflow-datasets", "Key": "people/a.parquet"}
    assert "/mlflow-datasets/people" in client.generate_presigned_url("get_object", Params=asked)
    assert stored_at("s3://mlflow-datasets/a", {}) == "s3://mlflow-datasets/a"
    monkeypatch.setenv("BUCKET_PREFIX", "user07-")
    assert "/user07-mlflow-datasets/people" in client.generate_presigned_url("get_object", Params=asked)
    assert stored_at("s3://mlflow-datasets/a") == "s3://user07-mlflow-datasets/a"
    assert stored_at("/home/s3://a") == "/home/s3://a"
