from __future__ import annotations

import json
import os
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from unittest.mock import patch

import pytest

from mlplatform.connection import connect, s3_client
from mlplatform.errors import ServiceDownError, SettingsError
from mlplatform.settings import REQUIRED, Settings, read_settings, state_folder
from mlplatform_ops.cluster.forwards import S3_ATTEMPTS
from mlplatform_ops.ports import free_port

COMPLETE = {
    "MLFLOW_TRACKING_URI": "http://127.0.0.1:1",
    "MLFLOW_TRACKING_USERNAME": "admin",
    "MLFLOW_TRACKING_PASSWORD": "hush-1",
    "AWS_ENDPOINT_URL": "http://127.0.0.1:1",
    "AWS_ACCESS_KEY_ID": "platform",
    "AWS_SECRET_ACCESS_KEY": "hush-2",
    "AWS_DEFAULT_REGION": "us-east-1",
    "REDIS_CONNECTION_STRING": "127.0.0.1:1,password=hush-3",
    "FEATURE_SERVER_URL": "http://127.0.0.1:1",
    "FEATURE_SERVER_TOKEN": "hush-4",
    "FEATURE_REGISTRY_KEY": "hush-5",
    "MODEL_SIGNING_KEY": "hush-6",
}


def test_settings_survive_the_way_through_an_environment() -> None:
    settings = Settings.from_env(COMPLETE)
    assert COMPLETE.items() <= settings.to_env().items()
    assert Settings.from_env(settings.to_env()) == settings


@pytest.mark.parametrize("name", REQUIRED)
def test_a_missing_variable_is_named(name: str) -> None:
    with pytest.raises(SettingsError, match=rf"{name} not set; run 'make up'"):
        Settings.from_env({key: value for key, value in COMPLETE.items() if key != name})


def test_secrets_stay_out_of_the_repr() -> None:
    assert "hush" not in repr(Settings.from_env(COMPLETE))


@pytest.mark.parametrize(
    ("connection", "url"),
    [
        ("redis:6379", "redis://redis:6379"),
        ("redis:6379,password=a", "redis://:a@redis:6379"),
        ("redis:6379,password=a=b/c,ssl=true", "rediss://:a%3Db%2Fc@redis:6379"),
        ("redis:6379,ssl=false,db=2,username=u,password=p", "redis://u:p@redis:6379/2"),
    ],
)
def test_feasts_connection_string_becomes_a_url(connection: str, url: str) -> None:
    assert Settings.from_env(COMPLETE | {"REDIS_CONNECTION_STRING": connection}).redis_url == url


@pytest.mark.parametrize("name", ["MLFLOW_TRACKING_URI", "AWS_ENDPOINT_URL", "FEATURE_SERVER_URL"])
def test_an_address_without_a_scheme_is_named(name: str) -> None:
    with pytest.raises(SettingsError, match=rf"{name}=localhost:1 is no address; set it to http://host:port"):
        connect(COMPLETE | {name: "localhost:1"})


@pytest.mark.parametrize("connection", ["redis", "redis:6379,hush", "redis://:hush@redis:6379", "redis:6379,password"])
def test_a_connection_string_that_feast_does_not_read_is_an_error_that_tells_no_secret(connection: str) -> None:
    with pytest.raises(SettingsError, match=r"set it to host:port,password=\.\.\.$") as caught:
        connect(COMPLETE | {"REDIS_CONNECTION_STRING": connection})
    assert "hush" not in str(caught.value)


class _EmptyStore(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<ListAllMyBucketsResult/>")

    def log_message(self, *_: object) -> None:
        pass


def test_a_client_asks_as_often_as_it_is_told_while_a_dropped_forward_is_made_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = Settings.from_env(COMPLETE | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_port()}"})
    port = int(settings.s3_endpoint.rsplit(":", 1)[1])

    def open_later() -> None:
        time.sleep(1.1)  # a client that asks twice has ended by then
        with HTTPServer(("127.0.0.1", port), _EmptyStore) as server:
            server.handle_request()

    monkeypatch.setenv("AWS_MAX_ATTEMPTS", str(S3_ATTEMPTS))
    thread = threading.Thread(target=open_later, daemon=True)
    thread.start()
    assert s3_client(settings).list_buckets()["ResponseMetadata"]["HTTPStatusCode"] == 200
    thread.join()


@pytest.mark.parametrize("value", ["0", "-1", "many"])
def test_a_number_of_attempts_that_is_none_is_named(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", value)
    with pytest.raises(SettingsError, match=f"AWS_MAX_ATTEMPTS={value} is no count; set it to 1 or more"):
        s3_client(Settings.from_env(COMPLETE))


def test_the_state_folder_is_found_from_any_folder_of_the_clone() -> None:
    root = Path(__file__).parents[2]
    assert state_folder(root / "tests" / "unit", {}) == root / ".platform"
    assert state_folder(root / "notebooks", {}) == root / ".platform"


def test_outside_of_a_clone_the_state_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="not inside a clone"):
        state_folder(tmp_path, {})


def test_without_a_platform_connect_says_what_to_run(no_platform: Path) -> None:
    with pytest.raises(SettingsError, match=r"no platform was started here .* run 'make up'"):
        connect()


def test_damaged_settings_are_named(no_platform: Path) -> None:
    no_platform.mkdir()
    (no_platform / "settings.json").write_text('{"environment": ')
    with pytest.raises(SettingsError, match=r"damaged \(settings.json: .*run 'make up', .* keeps the data"):
        connect()


def test_damaged_settings_are_read_from_their_copy(no_platform: Path) -> None:
    no_platform.mkdir()
    (no_platform / "settings.json").write_text('{"environment": {"AWS_ENDPOINT_URL": 5}}')
    (no_platform / "settings.json.copy").write_text(json.dumps({"environment": COMPLETE}))
    assert read_settings(no_platform) == Settings.from_env(COMPLETE)


def test_settings_of_an_earlier_version_name_the_way_out(no_platform: Path) -> None:
    no_platform.mkdir()
    (no_platform / "settings.json").write_text(json.dumps({"environment": {**COMPLETE, "FEATURE_SERVER_TOKEN": ""}}))
    with pytest.raises(SettingsError, match=r"earlier version .* run 'make down', then 'make up'"):
        connect()


def test_connect_does_not_mix_a_stray_variable_with_the_embedded_platform(no_platform: Path) -> None:
    with pytest.raises(SettingsError, match="no platform was started here"):
        connect({"AWS_ACCESS_KEY_ID": "of-some-cloud", "MLPLATFORM_STATE": str(no_platform)})


def test_a_login_to_a_cloud_does_not_lead_the_platforms_keys_there() -> None:
    cloud = {
        "AWS_ACCESS_KEY_ID": "cloud",
        "AWS_ENDPOINT_URL_S3": "https://s3.example",
        "AWS_IGNORE_CONFIGURED_ENDPOINT_URLS": "true",
        "AWS_SESSION_TOKEN": "cloud",
        "AWS_SECURITY_TOKEN": "cloud",
        "BUCKET_PREFIX": "theirs-",
    }
    with patch.dict(os.environ, cloud):
        Settings.from_env(COMPLETE).put_into(os.environ)
        client = s3_client()
        assert "BUCKET_PREFIX" not in os.environ
    assert client.meta.endpoint_url == COMPLETE["AWS_ENDPOINT_URL"]
    login = client._request_signer._credentials
    assert (login.access_key, login.token) == (COMPLETE["AWS_ACCESS_KEY_ID"], None)


def test_a_platform_that_the_environment_names_keeps_its_token_and_its_prefix() -> None:
    named = COMPLETE | {
        "AWS_SESSION_TOKEN": "of this platform",
        "BUCKET_PREFIX": "user03-",
        "MLFLOW_WORKSPACE": "user03",
    }
    environ = dict(named)
    Settings.from_env(named).put_into(environ)
    assert named.items() <= environ.items()


def test_a_platform_that_is_down_is_said_and_leaves_the_environment_alone() -> None:
    down = f"http://127.0.0.1:{free_port()}"
    environ = COMPLETE | {"AWS_ENDPOINT_URL": down, "MLFLOW_TRACKING_URI": down}
    before = dict(environ)
    with pytest.raises(ServiceDownError, match=r"at .* does not answer; run 'make up'"):
        connect(environ)
    assert environ == before
