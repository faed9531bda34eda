"""Try the doors of a running platform as somebody without credentials would: bounded, and on loopback only.

`make attack` prints what was tried and what answered. The tests run the same list as another user of the machine.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import ssl
import subprocess
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from mlplatform.settings import BUCKETS
from mlplatform_ops.embedded.services import make_certificates
from mlplatform_ops.ports import Listener

TIMEOUT_S = 4.0
HTTP_TIMEOUT_S = 30.0  # of a door that has answered HTTP, and may be busy with what else is tried
AT_ONCE = 8
# What answers without credentials, and is meant to: service, and the beginning of a path that is read.
PUBLIC = (
    ("object-store", "/status"),
    ("object-store", "/healthz"),
    ("mlflow", "/health"),
    ("mlflow", "/version"),
    ("mlflow", "/static-files/"),
    ("mlflow", "/api/3.0/mlflow/server-info"),
    ("feature-server", "/health"),
    ("model-endpoint", "/healthz"),
    ("model-endpoint", "/readyz"),
    ("model-endpoint", "/metrics"),
    ("model-endpoint", "/docs.json"),
    ("feast-ui", "/"),
)
# What lies below a public path and is not public.
_GUARDED = (("feast-ui", "/objects"),)
# In the form of a signed request, by the usual name, and with a signature that nobody made.
_UNSIGNED = (
    "AWS4-HMAC-SHA256 Credential=platform/20260101/us-east-1/s3/aws4_request, "
    f"SignedHeaders=host;x-amz-date, Signature={'0' * 64}"
)
READS = ("GET", "HEAD", "OPTIONS")
GRPC_METHODS = (
    "master_pb.Seaweed/VolumeList",
    "master_pb.Seaweed/Assign",
    "master_pb.Seaweed/LookupVolume",
    "master_pb.Seaweed/GetMasterConfiguration",
    "filer_pb.SeaweedFiler/GetFilerConfiguration",
    "filer_pb.SeaweedFiler/ListEntries",
    "filer_pb.SeaweedFiler/DeleteEntry",
    "volume_server_pb.VolumeServer/VolumeServerStatus",
    "volume_server_pb.VolumeServer/VacuumVolumeCheck",
    "messaging_pb.SeaweedS3IamCache/PutIdentity",
)
_BUCKET = BUCKETS[0]
_PATHS = {
    "object-store": (
        "/",
        "/status",
        "/healthz",
        "/metrics",
        "/debug/pprof/goroutine?debug=1",
        "/ui/index.html",
        "/dir/status",
        "/dir/assign",
        "/dir/lookup?volumeId=1&read=yes",
        "/dir/lookup?fileId=1,0123456789&read=yes",
        "/vol/grow?count=1",
        "/col/delete?collection=planted",  # none of ours: an open door must not cost data
        "/cluster/status",
        "/1,0123456789",
        "/admin/assign_volume?volume=77",
        "/stats/disk",
        "/.tus/",
        f"/{_BUCKET}",
        f"/{_BUCKET}/",
        f"/{_BUCKET}?list-type=2",
        f"/{_BUCKET}/guarded.txt",
        f"/buckets/{_BUCKET}/?limit=10",
        f"/buckets/{_BUCKET}/guarded.txt",
        "/etc/iam/identity.json",
        "/?Action=ListUsers&Version=2010-05-08",
    ),
    "mlflow": (
        "/",
        "/health",
        "/version",
        "/static-files/index.html",
        "/api/3.0/mlflow/server-info",
        "/metrics",
        "/docs",
        "/openapi.json",
        "/graphql",
        "/api/2.0/mlflow/experiments/search?max_results=10",
        "/api/2.0/mlflow/users/get?username=admin",
        "/api/2.0/mlflow-artifacts/artifacts",
        "/ajax-api/2.0/mlflow/experiments/search?max_results=10",
        "/get-artifact?path=../../settings.json&run_uuid=0",
        "/signup",
        "/health/../api/2.0/mlflow/experiments/search?max_results=10",
        "/static-files/../api/2.0/mlflow/experiments/search?max_results=10",
        "/static-files/..%2f..%2f..%2f..%2fetc%2fpasswd",
        "//api/2.0/mlflow/experiments/search?max_results=10",
        "/api/2.0/mlflow/experiments/search%3Fmax_results=10",
    ),
    "supervisor": ("/", "/RPC2", "/logtail/mlflow", "/mainlogtail", "/index.html", "/../settings.json"),
    "online-store": ("/",),
    "feature-server": (
        "/health",
        "/docs",
        "/openapi.json",
        "/metrics",
        "/get-online-features",
        "/push",
        "/materialize",
        "/health/../get-online-features",
        "/HEALTH",
        "/static/../../settings.json",
    ),
    "model-endpoint": (
        "/healthz",
        "/readyz",
        "/metrics",
        "/docs.json",
        "/predict",
        "/predict_users",
        "/",
        "/schema.json",
    ),
    "feast-ui": (
        "/objects/",
        "/objects",
        f"/objects/{_BUCKET}/guarded.txt",
        "/",
        "/registry",
        "/../settings.json",
        "/api/v1/projects",
        "/push",
    ),
}
# Of each service that speaks HTTP a path that anybody may read, and one that nobody may use.
_DOORS = {
    "object-store": ("/healthz", f"/{_BUCKET}/guarded.txt"),
    "mlflow": ("/health", "/api/2.0/mlflow/experiments/search?max_results=10"),
    "feature-server": ("/health", "/get-online-features"),
    "model-endpoint": ("/healthz", "/predict"),
    "feast-ui": ("/", f"/objects/{_BUCKET}/guarded.txt"),
    "supervisor": ("/", "/RPC2"),
}
# Ways to write the second path so that a check may take it for the first one, or for none that it knows.
_DISGUISES = (
    "{open}/..{guarded}",
    "{open}/../..{guarded}",
    "{open}/%2e%2e{guarded}",
    "{open}/%252e%252e{guarded}",
    "{open}/..;{guarded}",
    "{open}/..%2f{guarded}",
    "{open}/..%5c{guarded}",
    "{open}\\..{guarded}",
    "{open};{guarded}",
    "/{guarded}",
    "//{guarded}",
    "/.{guarded}",
    "/%2e{guarded}",
    "/;{guarded}",
    "{guarded}/",
    "{guarded}/.",
    "{guarded}%2f",
    "{guarded}%20",
    "{guarded}%00{open}",
    "{guarded};{open}",
    "{guarded}%23{open}",
    "{guarded}&_method=DELETE",
    "http://localhost{open}/..{guarded}",
)
# Bodies that a server must neither trip over nor read to their end.
_QUESTIONS = (
    b"",
    b"null",
    b"[" * 100_000,
    b'{"entities": null}',
    b'{"entities": {"user_id": [null, [["x"]], {"x": 1}]}}',
    b'{"entities": {"user_id": ["\\ud800"]}, "features": ["demographic:Sex"]}',
    b'{"people": [{"Sex": null}]}',
    b"x" * (3 * 2**20),
)
_TRICKS = (
    "/%2e%2e/%2e%2e/settings.json",
    "/..;/settings.json",
    "/.%00/",
    "/%2f%2f",
    "/\\..\\settings.json",
    "/;/admin",
    "/.git/config",
    "/" + "a" * 6000,
)


@dataclass(frozen=True)
class Attempt:
    """One door that was tried.

    Attributes:
        service: Whose door it is.
        door: What was tried.
        answer: What came back.
        held: Whether that is what must come back.
    """

    service: str
    door: str
    answer: str
    held: bool


def attack(listeners: Sequence[Listener], authority: str, weed: Path) -> list[Attempt]:
    """Try every door of every listener.

    Args:
        listeners: All sockets on which the platform listens.
        authority: The certificate of the object store's authority, no secret. Without it, gRPC's client would not even
            get as far as to be refused.
        weed: SeaweedFS's program.

    Returns:
        One entry for each attempt, in the order of the listeners.
    """
    with tempfile.TemporaryDirectory(prefix="mlplatform-attack-") as name:
        folder = Path(name)
        make_certificates(folder)
        foreign = _context()
        foreign.load_cert_chain(folder / "weed.crt", folder / "weed.key")
        contexts = {"http": None, "https": _context(), "https with a foreign certificate": foreign}
        tasks: list[Callable[[], Iterator[Attempt]]] = []
        for listener in listeners:
            if not listener.unix:
                tasks.append(_binding(_address, listener))
            tasks += [_binding(_knock, listener, scheme, context) for scheme, context in contexts.items()]
            tasks.append(_binding(_redis, listener))
            if listener.service == "object-store":
                tasks.append(_binding(_grpc, listener, folder, authority.encode()))
            if not listener.unix and listener.service in _DOORS:
                tasks += [_binding(_bodies, listener), _binding(_hosts, listener)]
        tasks += [
            _binding(_weed_shell, listener, weed)
            for listener in listeners
            if listener.service == "object-store" and not listener.unix
        ]
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return [attempt for result in pool.map(lambda task: list(task()), tasks) for attempt in result]


def _binding(function: Callable[..., Iterator[Attempt]], *arguments: Any) -> Callable[[], Iterator[Attempt]]:
    return lambda: function(*arguments)


def _context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _connect(
    listener: Listener, context: ssl.SSLContext | None = None, *, timeout_s: float = TIMEOUT_S
) -> socket.socket:
    host, _, port = listener.address.rpartition(":")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    plain = socket.socket(socket.AF_UNIX if listener.unix else family)
    plain.settimeout(timeout_s)
    try:
        plain.connect(listener.address if listener.unix else (host.strip("[]"), int(port)))
        return context.wrap_socket(plain) if context else plain
    except OSError:
        plain.close()
        raise


def _address(listener: Listener) -> Iterator[Attempt]:
    """Look whether other machines reach the socket at all."""
    host = listener.address.rpartition(":")[0].strip("[]")
    yield Attempt(listener.service, f"{listener.address}: from other machines", host, host in {"127.0.0.1", "::1"})


def _request(
    listener: Listener,
    method: str,
    path: str,
    *,
    context: ssl.SSLContext | None = None,
    body: bytes | None = None,
    headers: dict[str, str] | None = None,
    timeout_s: float = TIMEOUT_S,
) -> int:
    """Send one request, its path exactly as given, and return the answer's status."""
    connection = http.client.HTTPConnection("localhost")
    connection.sock = _connect(listener, context, timeout_s=timeout_s)
    # The standard library refuses the very paths that are tried here.
    connection._validate_path = lambda _: None  # type: ignore[attr-defined]
    try:
        connection.request(method, path, body=body, headers={"Host": listener.address.lstrip("/"), **(headers or {})})
        return connection.getresponse().status
    finally:
        connection.close()


def _knock(listener: Listener, scheme: str, context: ssl.SSLContext | None) -> Iterator[Attempt]:
    """Read, write and delete, by paths that a service knows and by tricks."""
    requests: list[tuple[str, str, dict[str, str]]] = [
        ("GET", path, {}) for path in (*_PATHS.get(listener.service, ("/",)), *_TRICKS)
    ]
    if listener.service in _DOORS:
        opened, guarded = _DOORS[listener.service]
        disguised = [disguise.format(open=opened.rstrip("/"), guarded=guarded) for disguise in _DISGUISES]
        requests += [(method, path, {}) for path in disguised for method in ("GET", "POST")]
    written = f"/buckets/{_BUCKET}/planted.txt" if listener.service == "object-store" else "/planted.txt"
    requests += [(method, written, {}) for method in ("PUT", "POST", "DELETE", "PATCH")]
    requests += [(method, f"/{_BUCKET}/planted.txt", {}) for method in ("PUT", "POST", "DELETE")]
    override = {"X-HTTP-Method-Override": "DELETE", "X-Forwarded-For": "127.0.0.1", "X-Original-URL": "/health"}
    requests += [("POST", path, override) for path in _PATHS.get(listener.service, ())[:3]]
    wrong = [{"Authorization": said} for said in ("Bearer wrong", "Basic YWRtaW46cGFzc3dvcmQxMjM0", _UNSIGNED)]
    requests += [("GET", path, header) for path in _PATHS.get(listener.service, ())[:8] for header in wrong]
    answers: dict[str, list[str]] = {}
    wrongly: list[Attempt] = []
    for method, path, headers in requests:
        try:
            status = _request(
                listener, method, path, context=context, body=b"x" if method != "GET" else None, headers=headers
            )
        except (OSError, http.client.HTTPException) as error:
            answers.setdefault(_reason(error), []).append(path)
            if context is not None:
                break  # without a TLS handshake, no path matters
            continue
        answers.setdefault(str(status), []).append(path)
        if status < 400 and not _public(listener.service, method, path):
            wrongly.append(
                Attempt(listener.service, f"{scheme} {listener.address} {method} {path}", str(status), False)
            )
    yield from wrongly
    tried = sum(map(len, answers.values()))
    said = ", ".join(f"{answer} ({len(paths)})" for answer, paths in sorted(answers.items()))
    yield Attempt(listener.service, f"{scheme} {listener.address}: {tried} requests", said, not wrongly)


def _public(service: str, method: str, path: str) -> bool:
    if method not in READS or ".." in unquote(unquote(path)):
        return False
    if any(service == name and start in unquote(unquote(path)) for name, start in _GUARDED):
        return False
    # A redirect to a login page or to a path with a slash gives nothing away; the path that it names is tried too.
    return any(service == name and path.startswith(start) for name, start in PUBLIC)


def _reason(error: Exception) -> str:
    if isinstance(error, PermissionError):
        return "no permission"
    if isinstance(error, TimeoutError):
        return "no answer"
    return "closed"


def _redis(listener: Listener) -> Iterator[Attempt]:
    """Speak Redis, as somebody without the password."""
    answers = []
    for command in (
        b"PING\r\n",
        b"INFO\r\n",
        b"KEYS *\r\n",
        b"DBSIZE\r\n",
        b"AUTH wrong\r\n",
        b"EVAL 'return 1' 0\r\n",
    ):
        with contextlib.suppress(OSError):
            connection = _connect(listener)
            with connection:
                connection.sendall(command)
                answers.append(connection.recv(200))
    # RESP marks an error by a minus sign; any other of its five signs begins an answer.
    open_ = [answer for answer in answers if answer[:1] in {b"+", b"$", b"*", b":"}]
    yield Attempt(
        listener.service,
        f"redis {listener.address}: 6 commands",
        "answered" if open_ else "refused or closed",
        not open_,
    )


def _grpc(listener: Listener, folder: Path, authority: bytes) -> Iterator[Attempt]:
    """Call methods that list, read, write and mint, in clear, over TLS, and with a certificate of another authority."""
    # Its remarks about each refusal would be printed.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    import grpc

    options = [("grpc.ssl_target_name_override", "localhost")]
    target = f"unix:{listener.address}" if listener.unix else listener.address
    pair = (folder / "weed.key").read_bytes(), (folder / "weed.crt").read_bytes()
    channels: dict[str, Callable[[], Any]] = {
        "in clear": lambda: grpc.insecure_channel(target),
        "TLS": lambda: grpc.secure_channel(target, grpc.ssl_channel_credentials(authority), options),
        "a foreign certificate": lambda: grpc.secure_channel(
            target, grpc.ssl_channel_credentials(authority, *pair), options
        ),
    }
    for kind, make in channels.items():
        reached = []
        with make() as channel:
            for method in GRPC_METHODS:
                call = channel.unary_unary(f"/{method}")
                try:
                    call(b"", timeout=1.0)
                    reached.append(method)
                except grpc.RpcError as error:
                    code = error.code()
                    if code not in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}:
                        # An HTTP server's refusal is translated to a code of gRPC.
                        if "HTTP2" in str(error.details()) or "http2" in str(error.details()):
                            continue
                        reached.append(f"{method}: {code.name}")
        yield Attempt(
            listener.service,
            f"gRPC {listener.address}, {kind}: {len(GRPC_METHODS)} methods",
            "; ".join(reached) or "unreachable",
            not reached,
        )


def _bodies(listener: Listener) -> Iterator[Attempt]:
    """Send what must neither be unpacked nor waited for, nor break anything, where plain HTTP is spoken at all."""
    opened, path = _DOORS[listener.service]
    try:
        if _request(listener, "GET", opened) >= 500:
            return
    except (OSError, http.client.HTTPException):
        return
    bomb = zlib.compressobj(9, zlib.DEFLATED, 31)
    packed = b"".join(bomb.compress(b"\0" * 2**20) for _ in range(64)) + bomb.flush()
    headers = {"Content-Encoding": "gzip", "Content-Type": "application/json"}
    status = _status(listener, path, packed, headers)
    yield Attempt(listener.service, f"gzip bomb, 64 MiB, POST {path}", status, status[0] in "4c")

    headers = {"Content-Type": "application/json"}
    said = [_status(listener, path, question, headers) for question in _QUESTIONS]
    counted = ", ".join(f"{status} ({said.count(status)})" for status in sorted(set(said)))
    held = all(status[0] in "4c" for status in said)
    yield Attempt(listener.service, f"POST {path} with {len(said)} bodies of wrong form or size", counted, held)

    one = f"GET {opened} HTTP/1.1\r\nHost: {listener.address}\r\n\r\n".encode()
    two = f"DELETE {path} HTTP/1.1\r\nHost: {listener.address}\r\nConnection: close\r\n\r\n".encode()
    answer = b""
    with contextlib.suppress(OSError), _connect(listener, timeout_s=HTTP_TIMEOUT_S) as connection:
        connection.sendall(one + two)
        while block := connection.recv(65536):
            answer += block
    codes = [line.split()[1].decode() for line in answer.splitlines() if line.startswith(b"HTTP/1.1")]
    held = all(code[0] in "45" for code in codes[1:])
    yield Attempt(listener.service, "two requests in one packet", " ".join(codes) or "closed", held)

    slow = []
    try:
        with contextlib.suppress(OSError):  # refusing them is a way to hold
            for _ in range(200):
                slow.append(_connect(listener))
                slow[-1].sendall(b"POST / HTTP/1.1\r\nContent-Length: 1000000\r\n")
        try:
            status = str(_request(listener, "GET", opened, timeout_s=HTTP_TIMEOUT_S))
        except (OSError, http.client.HTTPException) as error:
            status = _reason(error)
    finally:
        for connection in slow:
            connection.close()
    yield Attempt(listener.service, f"GET {opened} beside 200 slow connections", status, status.isdigit())


def _status(listener: Listener, path: str, body: bytes, headers: dict[str, str]) -> str:
    try:
        return str(_request(listener, "POST", path, body=body, headers=headers, timeout_s=HTTP_TIMEOUT_S))
    except (OSError, http.client.HTTPException) as error:
        return _reason(error)


def _hosts(listener: Listener) -> Iterator[Attempt]:
    """Ask in the name of a page elsewhere."""
    _, path = _DOORS[listener.service]
    for headers in ({"Host": "evil.example"}, {"Origin": "http://evil.example"}, {"Host": "169.254.169.254"}):
        status = _status(listener, path, b"{}", headers)
        said = ", ".join(f"{name}: {value}" for name, value in headers.items())
        yield Attempt(listener.service, f"POST {path} with {said}", status, status[0] in "4c")


def _weed_shell(listener: Listener, weed: Path) -> Iterator[Attempt]:
    """Let SeaweedFS's own shell list volumes and buckets, with this port in the master's place."""
    port = listener.address.rsplit(":", 1)[1]
    with tempfile.TemporaryDirectory(prefix="mlplatform-attack-") as folder:
        try:
            outcome = subprocess.run(
                [str(weed), "shell", f"-master=127.0.0.1:{port}.{port}"],
                input=b"volume.list\nfs.ls /buckets\ncluster.ps\n",
                capture_output=True,
                timeout=TIMEOUT_S,
                cwd=folder,
                env={"HOME": folder, "PATH": os.defpath},
                check=False,
            )
            said = outcome.stdout + outcome.stderr
        except subprocess.TimeoutExpired as error:
            said = (error.stdout or b"") + (error.stderr or b"")
    told = any(word.encode() in said for word in (*BUCKETS, "DataCenter", "total size"))
    yield Attempt("object-store", f"weed shell, master at {port}", "answered" if told else "no answer", not told)
