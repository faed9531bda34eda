"""Load the endpoint and other ways to serve the same champion, side by side in one run.

`python tests/benchmarks/serving.py` in the environment of `make env`, with a champion and features. Each contender
is one process with one worker, which is asked for one person by 1, 8 and 32 clients. CPU per request is the figure to
trust on a machine that others use too. In the end the endpoint is asked by 32 clients while its alias moves twice; the
model for that is a copy, removed again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
import requests
from figures import show

from mlplatform.history import STEADY_USER
from mlplatform.settings import find_root
from mlplatform_ops.ports import free_port

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

from people import PERSON

PEOPLE = {"people": [PERSON]}
CLIENTS = (1, 8, 32)
TOKEN = os.environ.get("BENCHMARK_TOKEN", "")


def main() -> None:
    """Measure all contenders and print a Markdown table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--requests", type=int, default=1_500, help="requests per contender and number of clients; 0: none"
    )
    parser.add_argument("--moves-for", type=float, default=60.0, help="seconds under load while the alias moves")
    parser.add_argument("--role", choices=("fastapi", "bentoml", "empty"), help="serve as this contender")
    parser.add_argument("--port", type=int)
    options = parser.parse_args()
    if options.role:
        serve(options.role, options.port)
        return
    token = os.environ["BENCHMARK_TOKEN"] = os.environ["MODEL_ENDPOINT_TOKEN"] = secrets.token_urlsafe(16)
    own = [sys.executable, __file__]
    contenders: list[tuple[str, list[str], str, str, dict[str, Any]]] = [
        ("BentoML, empty", [*own, "--role", "empty"], "/readyz", "/predict", PEOPLE),
        (
            "the endpoint, a person",
            [sys.executable, "-m", "mlplatform_serving", "--log", ""],
            "/readyz",
            "/predict",
            PEOPLE,
        ),
        (
            "the endpoint, a user",
            [sys.executable, "-m", "mlplatform_serving", "--log", ""],
            "/readyz",
            "/predict_users",
            {"users": [STEADY_USER]},
        ),
        ("BentoML, pipeline", [*own, "--role", "bentoml"], "/readyz", "/predict", PEOPLE),
        ("FastAPI, pipeline", [*own, "--role", "fastapi"], "/readyz", "/predict", PEOPLE),
        (
            "mlflow models serve",
            ["mlflow", "models", "serve", "-m", "models:/income-above-50k@champion", "--env-manager", "local"],
            "/ping",
            "/invocations",
            {"dataframe_split": {"columns": list(PERSON), "data": [list(PERSON.values())]}},
        ),
    ]
    show(("contender", "clients", "CPU per request, ms", "p50, ms", "p99, ms", "p99 / p50", "requests/s", "failed"))
    show(("---",) * 8)
    for name, command, ready, path, body in contenders if options.requests else ():
        with running(command, ready) as (process, port):
            for clients in CLIENTS:
                load(process, port, path, body, token, clients=clients, count=10 * clients)
                measured = load(process, port, path, body, token, clients=clients, count=options.requests)
                show((name, str(clients), *measured))
    if options.moves_for:
        move_under_load(token, options.moves_for)


@contextmanager
def running(command: Sequence[str], ready: str) -> Iterator[tuple[psutil.Process, int]]:
    """Run a contender until it is ready, and end it with its children."""
    port = free_port()
    environ = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [*command, "--port", str(port)],
            cwd=find_root() / "feature_repo",
            env=environ,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        family = psutil.Process(process.pid)
        try:
            while not answers(f"http://127.0.0.1:{port}{ready}"):
                if process.poll() is not None:
                    log.seek(0)
                    sys.exit(f"{command} ended: {log.read().decode()[-2_000:]}")
                time.sleep(0.2)
            yield family, port
        finally:
            for member in [*family.children(recursive=True), family]:
                member.terminate()
            process.wait(timeout=30)


def answers(url: str) -> bool:
    """Say whether a server is ready."""
    try:
        return requests.get(url, timeout=5).ok
    except requests.RequestException:
        return False


def load(
    process: psutil.Process, port: int, path: str, body: object, token: str, *, clients: int, count: int
) -> tuple[str, ...]:
    """Ask a contender and give the table's cells: CPU, p50, p99, their ratio, requests per second, failures."""
    request = encode(port, path, body, token)
    seconds: list[float] = []
    statuses: Counter[int] = Counter()

    async def everyone() -> None:
        each = count // clients
        await asyncio.gather(*(client(port, request, seconds, statuses, count=each) for _ in range(clients)))

    spent, started = cpu_seconds(process), time.perf_counter()
    asyncio.run(everyone())
    spent, wall = cpu_seconds(process) - spent, time.perf_counter() - started
    done = len(seconds)
    p50, p99 = statistics.median(seconds), statistics.quantiles(seconds, n=100)[98]
    failed = done - statuses[200]
    figures = (1_000 * spent / done, 1_000 * p50, 1_000 * p99, p99 / p50)
    return (*(f"{figure:.2f}" for figure in figures), f"{done / wall:.0f}", str(failed))


def cpu_seconds(process: psutil.Process) -> float:
    """Add up the CPU time of a process and of its children that live."""
    times = [member.cpu_times() for member in [process, *process.children(recursive=True)]]
    return float(sum(entry.user + entry.system for entry in times))


def encode(port: int, path: str, body: object, token: str) -> bytes:
    """Write a request as it goes over the wire: a client that costs next to nothing leaves the CPU to the server."""
    raw = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAuthorization: Bearer {token}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
    )
    return head.encode() + raw


async def client(
    port: int,
    request: bytes,
    seconds: list[float],
    statuses: Counter[int],
    *,
    count: int = 0,
    until: float = 0.0,
    bodies: Counter[bytes] | None = None,
) -> None:
    """Send one request after the other over one connection, a number of times or until a moment."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    while len(seconds) < 10**9 and (count > 0 or time.perf_counter() < until):
        started = time.perf_counter()
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        size = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        body = await reader.readexactly(int(size.split(b":")[1]))
        seconds.append(time.perf_counter() - started)
        statuses[int(head[9:12])] += 1
        if bodies is not None:
            bodies[body] += 1
        count -= 1
    writer.close()
    await writer.wait_closed()


def move_under_load(token: str, seconds: float) -> None:
    """Move the alias twice while 32 clients ask; say how many requests failed and how soon the move was followed."""
    import mlflow

    from mlplatform.promotion.alias import sign
    from mlplatform.registry import CHAMPION, find

    source = find(CHAMPION)
    assert source is not None, "no champion; run 'make run'"
    model = str(source.source)
    name, registry = f"benchmark-{uuid4()}", mlflow.MlflowClient()
    registry.create_registered_model(name)
    for _ in range(2):
        sign(
            registry.create_model_version(
                name, model, source.run_id, await_creation_for=0, model_id=model.partition("/")[2]
            )
        )
    registry.set_registered_model_alias(name, CHAMPION, "1")
    try:
        with running([sys.executable, "-m", "mlplatform_serving", "--log", "", "--model", name], "/readyz") as (
            _,
            port,
        ):
            asyncio.run(_move(name, port, token, seconds))
    finally:
        registry.delete_registered_model(name)


async def _move(name: str, port: int, token: str, seconds: float) -> None:
    import mlflow

    from mlplatform.registry import CHAMPION

    request = encode(port, "/predict", PEOPLE, token)
    times: list[float] = []
    statuses: Counter[int] = Counter()
    bodies: Counter[bytes] = Counter()
    until = time.perf_counter() + seconds
    asked = [asyncio.create_task(client(port, request, times, statuses, until=until, bodies=bodies)) for _ in range(32)]
    followed = []
    for version in ("2", "1"):
        await asyncio.sleep(seconds / 3)
        await asyncio.to_thread(mlflow.MlflowClient().set_registered_model_alias, name, CHAMPION, version)
        moved = time.perf_counter()
        bodies.clear()
        while not any(f'"model_version":{version},'.encode() in body for body in bodies):
            await asyncio.sleep(0.01)
            assert time.perf_counter() < until, f"version {version} never answered"
        followed.append(time.perf_counter() - moved)
    await asyncio.gather(*asked)
    failed = sum(count for status, count in statuses.items() if status >= 500)
    sys.stdout.write(
        f"\n32 clients for {seconds:.0f} s, alias moved twice: {len(times)} requests, {failed} with 5xx, statuses "
        f"{dict(statuses)}; followed after {followed[0]:.2f} s (a new version) and {followed[1]:.2f} s (back)\n"
    )


def serve(role: str, port: int) -> None:
    """Be one of the contenders."""
    import uvicorn

    os.environ.update(BENTOML_HOME=tempfile.mkdtemp(), BENTOML_DO_NOT_TRACK="True")
    app = fastapi_app() if role == "fastapi" else bentoml_app(empty=role == "empty")
    uvicorn.run(app, host="127.0.0.1", port=port, access_log=False, log_level="warning")


def fastapi_app() -> Any:
    """Serve the pipeline as one would with FastAPI and nothing else."""
    import pandas as pd
    from fastapi import FastAPI, Header, HTTPException

    from mlplatform import registry
    from mlplatform.modeling import probabilities

    model, app = registry.load_model(), FastAPI()

    @app.get("/readyz")
    def ready() -> str:
        return "ready"

    @app.post("/predict")
    def predict(question: dict[str, list[dict[str, str]]], authorization: str = Header()) -> list[float]:
        if not secrets.compare_digest(authorization, f"Bearer {TOKEN}"):
            raise HTTPException(401)
        answers: list[float] = probabilities(model, pd.DataFrame(question["people"])).tolist()
        return answers

    return app


def bentoml_app(*, empty: bool) -> Any:
    """Serve the pipeline, or nothing, as one would with BentoML and its defaults."""
    import bentoml
    import pandas as pd
    from starlette.middleware.base import BaseHTTPMiddleware
    from starlette.responses import Response

    from mlplatform import registry
    from mlplatform.modeling import probabilities

    class Token(BaseHTTPMiddleware):
        async def dispatch(self, request: Any, call_next: Any) -> Any:
            given = request.headers.get("authorization", "")
            if request.url.path == "/predict" and not secrets.compare_digest(given, f"Bearer {TOKEN}"):
                return Response(status_code=401)
            return await call_next(request)

    model = None if empty else registry.load_model()

    class Contender:
        def predict(self, people: list[dict[str, str]]) -> list[float]:
            if model is None:
                return [0.5]
            answers: list[float] = probabilities(model, pd.DataFrame(people)).tolist()
            return answers

    Contender.predict.__annotations__ = {"people": list[dict[str, str]], "return": list[float]}
    Contender.predict = bentoml.api(Contender.predict)  # type: ignore[method-assign]
    service: Any = bentoml.service(name="contender")(Contender)
    service.add_asgi_middleware(Token)
    return service.to_asgi()


if __name__ == "__main__":
    main()
