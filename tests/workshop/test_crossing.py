"""Three users go through notebooks 1 to 7 at the same time on one platform, then each tries to get at another's.

This takes minutes: 21 kernels share the machine. Nothing less shows that the same notebooks run for everybody at once.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pytest
import redis
import requests
import websocket
from botocore.exceptions import ClientError

from mlplatform import table
from mlplatform.settings import BUCKETS, CHAMPION, Settings, read_settings
from mlplatform_ops import mlflow_rest, workshop
from mlplatform_ops.embedded.platform import EmbeddedPlatform
from mlplatform_ops.embedded.supervisor import processes_of
from mlplatform_ops.embedded.users import FEATURE_PORT, LAB_PORT, LAB_TOKEN, User, read_users
from mlplatform_ops.enclosure import WORK, enclosed

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="bubblewrap is Linux's")
ROOT = Path(__file__).parents[2]
RUN = [sys.executable, "-m", "mlplatform_ops", "run", "--platform", "env", "--output", "executed"]


@dataclass(frozen=True)
class Room:
    """A running workshop."""

    state: Path
    users: list[User]

    def settings(self, place: int) -> Settings:
        return read_settings(self.users[place].private(self.state))


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Room]:
    state = tmp_path_factory.mktemp("workshop") / "state"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        try:
            yield Room(state, workshop.start(state, 3))
        finally:
            EmbeddedPlatform(state).clean()


@pytest.fixture(scope="module")
def stepped_through(room: Room) -> Room:
    """The workshop after all notebooks of the core have run for each user, all at once, where their Labs run."""
    running = []
    for user in room.users:
        line, environment = enclosed(room.state, user.name, RUN)
        running.append(subprocess.Popen(line, env=environment, stderr=subprocess.PIPE, text=True))
    said = [process.communicate()[1] for process in running]
    if any(process.returncode for process in running):
        kept = ROOT / "build" / "failed-workshop"
        for user in room.users:
            shutil.copytree(
                user.folder(room.state) / WORK / "executed", kept / user.name, dirs_exist_ok=True, symlinks=True
            )
        pytest.fail("\n".join([*said, f"executed copies: {kept}"]), pytrace=False)
    return room


@pytest.fixture
def hers(stepped_through: Room) -> Iterator[Settings]:
    """The second user's settings, of whose things everything is the same after the test."""
    settings = stepped_through.settings(1)
    before = everything(settings)
    yield settings
    assert everything(settings) == before


@pytest.fixture
def mine(stepped_through: Room) -> Settings:
    """The first user's settings: what the intruder has."""
    return stepped_through.settings(0)


def ask(settings: Settings, verb: str, route: str, *, workspace: str | None = None, **body: Any) -> requests.Response:
    """Send MLflow a request with a user's login, and the name of any workspace."""
    return requests.request(
        verb,
        f"{settings.tracking_uri}/{route}",
        params=body if verb == "GET" else None,
        json=None if verb == "GET" else body,
        auth=(settings.tracking_username, settings.tracking_password),
        headers={"X-MLFLOW-WORKSPACE": workspace} if workspace else {},
        timeout=20,
    )


def champion(settings: Settings) -> dict[str, Any]:
    version = mlflow_rest.find_version(settings, table.current().model, CHAMPION)
    assert version is not None, f"{settings.workspace} has no champion"
    return version


def store(settings: Settings) -> Any:
    return boto3.session.Session().client(
        "s3",
        endpoint_url=settings.s3_endpoint,
        aws_access_key_id=settings.access_key,
        aws_secret_access_key=settings.secret_key,
        region_name=settings.region,
    )


def objects(settings: Settings) -> dict[str, str]:
    """Every object of a user, or of the platform itself, by bucket and key, with its digest."""
    pages = store(settings).get_paginator("list_objects_v2")
    return {
        f"{bucket}/{entry['Key']}": entry["ETag"]
        for bucket in BUCKETS
        for page in pages.paginate(Bucket=settings.bucket_prefix + bucket)
        for entry in page.get("Contents", ())
    }


def experiments(settings: Settings) -> list[dict[str, Any]]:
    answer = ask(settings, "POST", "api/2.0/mlflow/experiments/search", workspace=settings.workspace, max_results=100)
    return list(answer.json().get("experiments", ()))


def runs(settings: Settings) -> list[dict[str, Any]]:
    numbers = [entry["experiment_id"] for entry in experiments(settings)]
    asked = {"experiment_ids": numbers, "max_results": 1000}
    answer = ask(settings, "POST", "api/2.0/mlflow/runs/search", workspace=settings.workspace, **asked)
    return list(answer.json().get("runs", ()))


def online(settings: Settings) -> int:
    with redis.Redis.from_url(settings.redis_url) as client:
        return int(client.dbsize())


def everything(settings: Settings) -> tuple[Any, ...]:
    route, named = "api/2.0/mlflow/registered-models/get", {"name": table.current().model}
    answer = ask(settings, "GET", route, workspace=settings.workspace, **named)
    assert answer.ok, f"{settings.workspace}: {answer.status_code} {answer.text}"
    return objects(settings), experiments(settings), runs(settings), answer.json(), online(settings)


def test_the_same_notebooks_find_the_same_for_everybody(stepped_through: Room) -> None:
    scores, numbers = [], []
    for place in range(3):
        settings = stepped_through.settings(place)
        run = mlflow_rest.look_up(settings, "runs/get", run_id=champion(settings)["run_id"])
        assert run is not None
        scores.append({entry["key"]: entry["value"] for entry in run["run"]["data"]["metrics"]})
        numbers.append(online(settings))
        assert {entry["name"] for entry in experiments(settings)} >= {"income-classifier", "income"}
    assert scores[0] == scores[1] == scores[2]
    assert numbers[0] == numbers[1] == numbers[2] > 28_000


def test_nothing_was_written_outside_of_the_users_parts(stepped_through: Room) -> None:
    settings = EmbeddedPlatform(stepped_through.state).settings
    stored = objects(settings)
    prefixes = tuple(f"mlflow-artifacts/workspaces/{user.name}/" for user in stepped_through.users)
    assert [name for name in stored if not name.startswith(prefixes)] == []
    assert [entry["name"] for entry in experiments(settings)] == ["Default"]
    assert online(settings) == 0


@pytest.mark.parametrize("workspace", ["own", "hers", "default", None])
def test_mlflow_refuses_every_way_to_another_users_runs_and_models(
    mine: Settings, hers: Settings, workspace: str | None
) -> None:
    named = {"own": mine.workspace, "hers": hers.workspace}.get(workspace or "", workspace)
    version = champion(hers)
    run = version["run_id"]
    number = next(entry["info"]["experiment_id"] for entry in runs(hers) if entry["info"]["run_id"] == run)
    files = f"api/2.0/mlflow-artifacts/artifacts/workspaces/{hers.workspace}/{number}/{run}/artifacts"
    attempts: list[tuple[str, str, dict[str, Any]]] = [
        ("GET", "api/2.0/mlflow/experiments/get", {"experiment_id": number}),
        ("GET", "api/2.0/mlflow/runs/get", {"run_id": run}),
        ("POST", "api/2.0/mlflow/runs/log-metric", {"run_id": run, "key": "roc_auc", "value": 1, "timestamp": 1}),
        ("POST", "api/2.0/mlflow/runs/set-tag", {"run_id": run, "key": "mine", "value": "yes"}),
        ("POST", "api/2.0/mlflow/runs/update", {"run_id": run, "status": "FAILED"}),
        ("POST", "api/2.0/mlflow/runs/delete", {"run_id": run}),
        ("POST", "api/2.0/mlflow/runs/create", {"experiment_id": number}),
        ("POST", "api/2.0/mlflow/experiments/delete", {"experiment_id": number}),
        ("GET", "api/2.0/mlflow/artifacts/list", {"run_id": run}),
        ("GET", "get-artifact", {"run_uuid": run, "path": "model/MLmodel"}),
        ("GET", f"{files}/model/MLmodel", {}),
        ("GET", f"ajax-{files}/model/MLmodel", {}),
        ("PUT", f"{files}/planted.txt", {}),
        ("DELETE", f"{files}/model/MLmodel", {}),
        ("GET", "api/2.0/mlflow-artifacts/artifacts", {"path": f"workspaces/{hers.workspace}"}),
        ("PATCH", "api/2.0/mlflow/users/update-password", {"username": hers.workspace, "password": "x" * 20}),
        ("PATCH", "api/2.0/mlflow/users/update-admin", {"username": mine.workspace, "is_admin": True}),
        ("DELETE", f"api/3.0/mlflow/workspaces/{hers.workspace}", {}),
        ("POST", "api/3.0/mlflow/roles/assign", {"username": mine.workspace, "role_id": 1}),
    ]
    held = [(verb, path, ask(mine, verb, path, workspace=named, **body).status_code) for verb, path, body in attempts]
    assert [attempt for attempt in held if attempt[2] not in {400, 401, 403, 404, 405}] == []
    # A search answers, with what is the asker's own.
    found = ask(mine, "POST", "api/2.0/mlflow/runs/search", workspace=named, experiment_ids=[number]).json()
    seen = ask(mine, "POST", "api/2.0/mlflow/experiments/search", workspace=named, max_results=100).json()
    assert found.get("runs", []) == []
    assert number not in {entry["experiment_id"] for entry in seen.get("experiments", ())}
    query = f'query q {{ mlflowGetRun(input: {{runId: "{run}"}}) {{ run {{ info {{ runId }} }} }} }}'
    assert run not in ask(mine, "POST", "graphql", workspace=named, query=query, operationName="q").text


def test_nobody_promotes_in_anothers_registry_or_serves_anothers_files(mine: Settings, hers: Settings) -> None:
    version = champion(hers)
    in_hers: list[tuple[str, str, dict[str, Any]]] = [
        ("POST", "registered-models/alias", {"name": table.current().model, "alias": CHAMPION, "version": "1"}),
        ("DELETE", "registered-models/alias", {"name": table.current().model, "alias": CHAMPION}),
        ("POST", "registered-models/rename", {"name": table.current().model, "new_name": "gone"}),
        ("DELETE", "registered-models/delete", {"name": table.current().model}),
        ("DELETE", "model-versions/delete", {"name": table.current().model, "version": version["version"]}),
        (
            "POST",
            "model-versions/set-tag",
            {"name": table.current().model, "version": version["version"], "key": "a", "value": ""},
        ),
        ("POST", "model-versions/create", {"name": table.current().model, "source": "runs:/x/model"}),
        ("GET", "registered-models/get", {"name": table.current().model}),
        ("GET", "model-versions/get-download-uri", {"name": table.current().model, "version": version["version"]}),
    ]
    for verb, path, body in in_hers:
        answer = ask(mine, verb, f"api/2.0/mlflow/{path}", workspace=hers.workspace, **body)
        assert answer.status_code == 403, f"{verb} {path}: {answer.status_code} {answer.text[:100]}"
    for source in (
        version["source"],
        f"mlflow-artifacts:/workspaces/{hers.workspace}",
        f"runs:/{version['run_id']}/model",
    ):
        body = {"name": table.current().model, "source": source, "run_id": version["run_id"]}
        answer = ask(mine, "POST", "api/2.0/mlflow/model-versions/create", workspace=mine.workspace, **body)
        assert answer.status_code == 403, f"{source}: {answer.status_code} {answer.text[:100]}"
    assert mine.model_signing_key != hers.model_signing_key
    assert mine.feature_registry_key != hers.feature_registry_key


S3_ATTEMPTS: dict[str, Callable[[Any, str, str, str], Any]] = {
    "list": lambda s3, own, her, key: s3.list_objects_v2(Bucket=her),
    "list versions": lambda s3, own, her, key: s3.list_object_versions(Bucket=her),
    "list uploads": lambda s3, own, her, key: s3.list_multipart_uploads(Bucket=her),
    "head": lambda s3, own, her, key: s3.head_object(Bucket=her, Key=key),
    "get": lambda s3, own, her, key: s3.get_object(Bucket=her, Key=key),
    "put": lambda s3, own, her, key: s3.put_object(Bucket=her, Key=key, Body=b""),
    "upload in parts": lambda s3, own, her, key: s3.create_multipart_upload(Bucket=her, Key=key),
    "copy out": lambda s3, own, her, key: s3.copy_object(Bucket=own, Key="stolen", CopySource=f"{her}/{key}"),
    "copy in": lambda s3, own, her, key: s3.copy_object(Bucket=her, Key="planted", CopySource=f"{own}/{key}"),
    "delete": lambda s3, own, her, key: s3.delete_object(Bucket=her, Key=key),
    "delete the bucket": lambda s3, own, her, key: s3.delete_bucket(Bucket=her),
    "tag": lambda s3, own, her, key: s3.put_object_tagging(Bucket=her, Key=key, Tagging={"TagSet": []}),
    "open to all": lambda s3, own, her, key: s3.put_bucket_acl(Bucket=her, ACL="public-read-write"),
    "open one's own to all": lambda s3, own, her, key: s3.put_bucket_policy(Bucket=own, Policy="{}"),
    "make a bucket": lambda s3, own, her, key: s3.create_bucket(Bucket=her.replace("mlflow", "another")),
    "MLflow's own bucket": lambda s3, own, her, key: s3.list_objects_v2(Bucket="mlflow-artifacts"),
}


@pytest.mark.parametrize("attempt", S3_ATTEMPTS)
def test_the_object_store_refuses_every_way_to_another_users_buckets(
    mine: Settings, hers: Settings, attempt: str
) -> None:
    name = "mlflow-datasets"
    key = next(name_ for name_ in objects(hers) if name_.startswith(name)).partition("/")[2]
    with pytest.raises(ClientError) as refused:
        S3_ATTEMPTS[attempt](store(mine), mine.bucket_prefix + name, hers.bucket_prefix + name, key)
    assert refused.value.response["Error"]["Code"] in {"AccessDenied", "403"}


def test_the_object_store_shows_a_user_their_own_buckets_and_signs_nothing_for_others(
    mine: Settings, hers: Settings
) -> None:
    s3, key = store(mine), next(iter(objects(hers))).partition("/")[2]
    assert {entry["Name"] for entry in s3.list_buckets()["Buckets"]} == {mine.bucket_prefix + name for name in BUCKETS}
    for method in ("get_object", "put_object", "delete_object"):
        bucket = f"{hers.bucket_prefix}mlflow-datasets"
        link = s3.generate_presigned_url(method, Params={"Bucket": bucket, "Key": key})
        verb = method.partition("_")[0].upper()
        assert requests.request(verb, link, timeout=20).status_code == 403
    several = s3.delete_objects(Bucket=f"{hers.bucket_prefix}mlflow-datasets", Delete={"Objects": [{"Key": key}]})
    assert [entry["Code"] for entry in several["Errors"]] == ["AccessDenied"]


@pytest.mark.parametrize(
    "command",
    [
        "SELECT 2",
        "COPY KEY stolen DB 2",
        "MOVE KEY 2",
        "SWAPDB 1 2",
        "FLUSHALL",
        "KEYS *",
        "CONFIG GET requirepass",
        "ACL LIST",
        "ACL SETUSER user01 alldbs",
        "MONITOR",
        "CLIENT LIST",
        "SHUTDOWN NOSAVE",
        "FUNCTION FLUSH",
        "SCRIPT FLUSH",
        "MIGRATE 127.0.0.1 1 KEY 2 1",
        "REPLICAOF NO ONE",
        "AUTH user02 guessed",
    ],
)
def test_the_online_store_refuses_every_way_out_of_a_users_database(
    mine: Settings, hers: Settings, command: str
) -> None:
    with redis.Redis.from_url(mine.redis_url) as client:
        key = client.randomkey()
        words = [key if word == "KEY" else word for word in command.split()]
        with pytest.raises((redis.exceptions.NoPermissionError, redis.exceptions.AuthenticationError)):
            client.execute_command(*words)
        with pytest.raises(redis.ResponseError, match="No permissions"):
            client.eval("redis.call('SELECT', 2) return redis.call('DBSIZE')", 0)


def test_tokens_open_a_users_own_lab_and_feature_server_only(stepped_through: Room) -> None:
    own, other = stepped_through.users[0].own, stepped_through.users[1].own
    lab = f"http://127.0.0.1:{other[LAB_PORT]}/api/contents"
    features = f"http://127.0.0.1:{other[FEATURE_PORT]}/get-online-features"
    question = {"feature_service": "income_v1", "entities": {"user_id": ["9f2ac416-06e1-44a0-87bd-d4787c85bf66"]}}

    lab_token, bearer = f"token {own[LAB_TOKEN]}", f"Bearer {own['FEATURE_SERVER_TOKEN']}"
    assert requests.get(lab, headers={"Authorization": lab_token}, timeout=20).status_code == 403
    refused = requests.post(features, headers={"Authorization": bearer}, json=question, timeout=20)
    assert refused.status_code == 401
    # A page of another user, shown below the address of one's own Lab, could run code there.
    inside = f"http://127.0.0.1:{own[LAB_PORT]}/proxy/{other[FEATURE_PORT]}/health"
    assert requests.get(inside, headers={"Authorization": lab_token}, timeout=20).status_code == 404
    bearer = {"Authorization": f"Bearer {other['FEATURE_SERVER_TOKEN']}"}
    assert requests.post(features, headers=bearer, json=question, timeout=20).ok
    assert requests.get(lab, headers={"Authorization": f"token {other[LAB_TOKEN]}"}, timeout=20).ok


def in_a_lab(user: User, code: str) -> str:
    """Run code as a notebook in a user's Lab does; gives what it printed."""
    address, login = f"127.0.0.1:{user.own[LAB_PORT]}/api/kernels", f"token {user.own[LAB_TOKEN]}"
    answer = requests.post(f"http://{address}", headers={"Authorization": login}, json={"name": "python3"}, timeout=60)
    kernel = answer.json()["id"]
    header = {"msg_id": "1", "msg_type": "execute_request", "session": "1", "username": "", "version": "5.3"}
    asked = {"code": code, "silent": False, "store_history": False, "user_expressions": {}, "allow_stdin": False}
    message = {"channel": "shell", "header": header, "parent_header": {}, "metadata": {}, "content": asked}
    with closing(
        websocket.create_connection(f"ws://{address}/{kernel}/channels", header={"Authorization": login}, timeout=60)
    ) as socket:
        socket.send(json.dumps(message))
        while (said := json.loads(socket.recv()))["msg_type"] not in {"stream", "error"}:
            pass
    return str(said["content"].get("text") or said["content"]["evalue"])


PEEK = """
import json, os, pathlib, sys
found = {}
for name in json.loads(sys.argv[1]):
    try:
        found[name] = sorted(os.listdir(name)) if os.path.isdir(name) else len(open(name, "rb").read())
    except OSError as error:
        found[name] = type(error).__name__
found["processes"] = [number for number in os.listdir("/proc") if number.isdigit()]
for name in json.loads(sys.argv[2]):
    try:
        pathlib.Path(name, "planted").touch()
    except OSError:
        pass
print(json.dumps(found))
"""


def test_a_terminal_in_a_lab_sees_its_users_folder_and_nobody_elses(room: Room, tmp_path: Path) -> None:
    first, second = room.users[:2]
    (tmp_path / "guarded").touch()
    read = [
        second.private(room.state),
        second.private(room.state) / "settings.json",
        second.folder(room.state),
        first.private(room.state),
        room.state / "settings.json",
        room.state / "s3.json",
        tmp_path / "guarded",
        Path.home() / ".cache",
        Path("/etc/shadow"),
    ]
    write = [ROOT / "src", Path(sys.prefix), Path("/usr"), room.state, room.state / "users"]
    texts = [json.dumps([str(path) for path in paths]) for paths in (read, [*write, first.folder(room.state)])]
    line, environment = enclosed(room.state, first.name, [sys.executable, "-c", PEEK, *texts])
    outcome = subprocess.run(line, env=environment, capture_output=True, text=True, check=True)
    found = json.loads(outcome.stdout)
    processes = found.pop("processes")
    assert set(found.values()) == {"FileNotFoundError"}, found
    assert [path for path in write if (path / "planted").exists()] == []
    assert (first.folder(room.state) / "planted").exists()
    assert len(processes) <= 2  # bubblewrap's and its own
    assert sorted(path.name for path in room.state.glob("users/*")) == sorted(
        [name for user in room.users for name in (user.name, f"{user.name}.private", f"{user.name}.tmp")]
    )


def test_secrets_are_on_no_command_line(room: Room) -> None:
    lines = " ".join(" ".join(process.cmdline()) for process in processes_of(room.state))
    assert [name for user in room.users for name, value in user.own.items() if len(value) > 8 and value in lines] == []


def test_a_reset_empties_one_users_part_and_leaves_the_others(stepped_through: Room) -> None:
    state, second = stepped_through.state, stepped_through.users[1]
    kept = [everything(stepped_through.settings(place)) for place in (0, 2)]
    notebook = second.folder(state) / WORK / "notebooks" / "01_explore_data.ipynb"
    notebook.write_text("scribbled over")
    workshop.reset(state, second.name)
    settings = stepped_through.settings(1)
    assert objects(settings) == {}
    assert experiments(settings) == []
    assert mlflow_rest.find_version(settings, table.current().model, CHAMPION) is None
    assert online(settings) == 0
    assert notebook.read_bytes() == (ROOT / "notebooks" / notebook.name).read_bytes()
    assert [name for name in objects(EmbeddedPlatform(state).settings) if second.name in name] == []
    assert [everything(stepped_through.settings(place)) for place in (0, 2)] == kept
    named = {"name": "income-classifier"}
    assert ask(settings, "POST", "api/2.0/mlflow/experiments/create", workspace=settings.workspace, **named).ok


def test_a_lab_runs_notebooks_as_its_user_and_no_port_leads_to_their_kernels(room: Room) -> None:
    user = room.users[2]
    # On one port a kernel takes what its subprocesses print, and only with a secret that it tells them.
    code = (
        "from mlplatform.connection import connect; "
        "print(connect().workspace, __import__('os').getcwd(), get_ipython().kernel.iopub_thread._pipe_port)"
    )
    *said, output_port = in_a_lab(user, code).split()
    assert said == [user.name, str(user.folder(room.state) / WORK)]
    kernels = [process for process in processes_of(room.state) if "ipykernel_launcher" in process.cmdline()]
    assert kernels
    open_ports = [
        found.laddr.port for process in kernels for found in process.net_connections("inet") if not found.raddr
    ]
    assert open_ports == [int(output_port)]
    workshop.reset(room.state, user.name)
    assert [process for process in kernels if process.is_running() and process.status() != "zombie"] == []


def test_more_users_join_and_those_who_are_in_keep_what_they_have(stepped_through: Room) -> None:
    state = stepped_through.state
    kept = everything(stepped_through.settings(0))
    workshop.start(state, 4)
    assert [user.name for user in read_users(state)] == ["user01", "user02", "user03", "user04"]
    assert everything(read_settings(read_users(state)[0].private(state))) == kept
    seats = workshop.seats(state)
    assert all(seat.memory_bytes > 2**20 and seat.answers == {"lab": True, "features": True} for seat in seats)
