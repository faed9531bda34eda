from __future__ import annotations

import io
import socket
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from traceback import format_exception
from typing import Any
from xmlrpc.client import ProtocolError

import pytest
from botocore.exceptions import ClientError

from mlplatform.errors import DataError, PortTakenError, ServiceDownError, SettingsError
from mlplatform_ops.embedded import services
from mlplatform_ops.embedded.platform import EmbeddedPlatform
from mlplatform_ops.embedded.services import INNER_PORTS, SERVICES, choose_ports
from mlplatform_ops.embedded.supervisor import Supervisor
from mlplatform_ops.ports import free_port, is_free


@pytest.fixture
def taken() -> Iterator[int]:
    """A port on which somebody else listens."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield other.getsockname()[1]


def test_every_port_is_another_one_and_free() -> None:
    ports = choose_ports({}, {}, defaults=False)
    assert set(ports) == {service.variable for service in SERVICES} | set(INNER_PORTS)
    assert len(set(ports.values())) == len(ports)
    assert all(is_free(int(port)) for port in ports.values())


def test_the_ports_of_the_last_start_are_kept() -> None:
    ports = choose_ports({}, {}, defaults=False)
    assert choose_ports({}, ports, defaults=True) == ports


def test_a_port_whose_sockets_place_is_taken_is_not_chosen(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (left := tmp_path / "left").touch()
    monkeypatch.setattr(services, "_grpc_socket", lambda _, port: tmp_path / "none" if port.endswith("7") else left)
    ports = choose_ports({}, {}, defaults=False)
    assert {port[-1] for name, port in ports.items() if "GRPC" in name} == {"7"}


def test_a_taken_port_that_nobody_asked_for_is_replaced_and_that_is_said(taken: int) -> None:
    said: list[str] = []
    ports = choose_ports({}, {"MLPLATFORM_MLFLOW_PORT": str(taken)}, defaults=False, notify=said.append)
    assert ports["MLPLATFORM_MLFLOW_PORT"] != str(taken)
    assert said == [
        f"port {taken} is taken: mlflow gets {ports['MLPLATFORM_MLFLOW_PORT']} instead "
        "(to choose: MLPLATFORM_MLFLOW_PORT)"
    ]


def test_a_taken_port_that_the_user_set_is_an_error_before_anything_starts(taken: int, tmp_path: Path) -> None:
    platform = EmbeddedPlatform(tmp_path / "state", environ={"MLPLATFORM_S3_PORT": str(taken)}, default_ports=False)
    with pytest.raises(PortTakenError, match=f"MLPLATFORM_S3_PORT={taken}: port {taken} is taken"):
        platform.up()
    assert not (tmp_path / "state" / "settings.json").exists()
    assert not platform.running()


@pytest.mark.parametrize("value", ["0", "65536", "http", "-1", "90.5"])
def test_what_is_no_port_is_refused_by_its_variable(value: str) -> None:
    with pytest.raises(SettingsError, match=r"MLPLATFORM_REDIS_PORT=.* is not a port"):
        choose_ports({"MLPLATFORM_REDIS_PORT": value}, {}, defaults=False)


def test_a_listener_on_every_address_takes_the_port_too() -> None:
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))  # noqa: S104
        other.listen()
        assert not is_free(other.getsockname()[1])
    assert is_free(free_port())


def test_a_stranger_on_the_supervisors_port_makes_no_error_tell_its_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def foreign(*_: object) -> None:
        raise ProtocolError("platform:hush@127.0.0.1:1/RPC2", 404, "Not Found", {})

    supervisor = Supervisor(tmp_path, dict)
    monkeypatch.setattr(supervisor, "_ask", foreign)
    with pytest.raises(ServiceDownError, match=r"the supervisor has ended \(404\); run 'make up'") as caught:
        supervisor._call("getState")
    assert "hush" not in "".join(format_exception(caught.value))


def test_a_state_folder_that_cannot_be_written_is_named_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SettingsError, match=r"cannot write .*file.*; free it, or set MLPLATFORM_STATE"):
        EmbeddedPlatform(tmp_path / "file" / "state", environ={}, default_ports=False).up()


def test_the_status_of_a_platform_that_never_started_says_so(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="run 'make up'"):
        EmbeddedPlatform(tmp_path / "state", environ={}).status()


def test_down_and_clean_of_what_never_ran_do_nothing(tmp_path: Path) -> None:
    platform = EmbeddedPlatform(tmp_path / "state", environ={})
    assert platform.down() is False
    platform.clean()
    assert list(tmp_path.iterdir()) == []


def test_clean_deletes_only_what_up_made(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    (tmp_path / "settings.json").write_text('{"environment": {}}')
    (tmp_path / "logs").mkdir()
    EmbeddedPlatform(tmp_path, environ={}).clean()
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(("failures", "patience_s", "complaints"), [(0, 30, 0), (2, 30, 0), (99, 0.3, 1)])
def test_up_waits_until_the_object_store_reads_what_it_holds(
    monkeypatch: pytest.MonkeyPatch, failures: int, patience_s: float, complaints: int
) -> None:
    asked: list[str] = []

    class Store:
        def list_objects_v2(self, **_: Any) -> dict[str, Any]:
            return {"Contents": [{"Key": "empty", "Size": 0}, {"Key": "full", "Size": 1}]}

        def get_object(self, **address: Any) -> dict[str, Any]:
            asked.append(address["Key"])
            if len(asked) <= failures:
                raise ClientError({"Error": {"Code": "InternalError"}}, "GetObject")
            return {"Body": io.BytesIO(b"x")}

    monkeypatch.setattr(services, "s3_client", lambda _: Store())
    said: list[str] = []
    services.wait_for_objects(None, patience_s=patience_s, notify=said.append)  # type: ignore[arg-type]
    assert set(asked) == {"full"}
    assert len(asked) == failures + 1 or complaints
    assert len(said) == complaints


@pytest.fixture
def databases(tmp_path: Path) -> Path:
    """A folder with two sound databases of some pages each."""
    for name in services.DATABASES:
        with closing(sqlite3.connect(tmp_path / name)) as made, made:
            made.execute("CREATE TABLE kept (number INTEGER, word TEXT)")
            made.executemany("INSERT INTO kept VALUES (?, ?)", [(number, "word" * 50) for number in range(500)])
    return tmp_path


@pytest.mark.parametrize("name", services.DATABASES)
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda body: body[: len(body) // 2], "malformed|btree|database disk image"),
        (lambda body: b"", "it is empty"),
        (lambda body: b"this is no database", "file is not a database"),
        (lambda body: body[:8192] + bytes(4096) + body[12288:], r"btree|Tree|malformed"),
    ],
    ids=["cut in half", "empty", "foreign", "a page of zeros"],
)
def test_a_damaged_database_is_named_with_what_to_type_and_left_alone(
    databases: Path, name: str, damage: Callable[[bytes], bytes], said: str
) -> None:
    path = databases / name
    damaged = damage(path.read_bytes())
    path.write_bytes(damaged)
    with pytest.raises(DataError, match=said) as caught:
        services.check_databases(databases)
    assert f"cp FOLDER/databases/{name} {path}" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == damaged


def test_sound_databases_and_those_of_a_first_start_pass(databases: Path, tmp_path: Path) -> None:
    services.check_databases(databases)
    (databases / "basic_auth.db").unlink()
    services.check_databases(databases)
    (databases / "mlflow.db").write_bytes(b"")
    services.check_databases(databases)


def test_a_database_that_somebody_writes_to_is_not_called_damaged(databases: Path) -> None:
    with closing(sqlite3.connect(databases / "mlflow.db", isolation_level=None)) as writer:
        writer.execute("BEGIN EXCLUSIVE")
        services.check_databases(databases)
