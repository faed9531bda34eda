"""Which notebooks need not run again: nothing they depend on has changed, and what they made is still there.

After a run, each executed copy is stamped with a digest of everything that decided its result: the notebook, its
parameters, the modules of this repository that it imports, directly or not, the locked packages, the data and the
platform. Beside it stand marks of what others can change later: which version is champion, what the feature store
holds. The next run compares both, and asks the platform for every object and every MLflow run that the copy recorded.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import redis

from mlplatform import table
from mlplatform.connection import s3_client
from mlplatform.errors import NotebookError, service_down
from mlplatform.results import read_results
from mlplatform.settings import CHAMPION, FEATURES_BUCKET, REGISTRY_BUCKET, Settings
from mlplatform.storage.refusals import s3_errors
from mlplatform_ops import mlflow_rest
from mlplatform_ops.files import write_private
from mlplatform_ops.runner import Execution, needs, services

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

STAMP = "mlplatform_stamp"  # in the metadata of an executed copy

# The packages whose code answers behind an on-demand service.
SERVERS = {"feature-server": "mlplatform_ops/feast_servers", "model-endpoint": "mlplatform_serving"}
_RUN_ID = re.compile(r"[0-9a-f]{32}")


def find_unchanged(
    notebooks: Iterable[Path],
    output: Path,
    settings: Settings,
    *,
    root: Path,
    parameters: Mapping[str, Mapping[str, object]],
    notify: Callable[[str], None],
) -> list[Execution]:
    """Find the notebooks whose last executed copy is what another run would give.

    Args:
        notebooks: Those that are to be run; what each needs and is not among them is not looked at.
        output: Where executed copies are.
        settings: The platform, which answers.
        root: The clone's top folder.
        parameters: Values by parameter, by notebook name.
        notify: Called with a line for those that are kept, and with the reason for each that runs again.

    Returns:
        One entry per notebook that need not run.
    """
    paths = {path.stem: path for path in notebooks}
    kept: dict[str, Execution] = {}
    s3 = s3_client(settings)
    marks = _marks(settings, s3)
    for name, path in sorted(paths.items()):
        executed = output / path.name
        stamp = _read_stamp(executed)
        if stamp is None:
            continue
        if earlier := sorted((needs(path) & paths.keys()) - kept.keys()):
            reason = f"{', '.join(earlier)} runs again"
        else:
            reason = _difference(stamp, path, parameters.get(name, {}), settings, root, marks) or _lost(
                executed, settings, s3
            )
        if reason:
            notify(f"{name} runs again: {reason}")
        else:
            kept[name] = Execution(name, executed, float(stamp["seconds"]), unchanged=True)
    if kept:
        notify(f"kept, since nothing they depend on has changed and what they made is there: {', '.join(kept)}")
    return list(kept.values())


def any_stamped(notebooks: Iterable[Path], output: Path) -> bool:
    """Say whether an earlier run left a copy that may be kept."""
    return any(_read_stamp(output / path.name) for path in notebooks)


def stamp_all(
    executions: Iterable[Execution],
    notebooks: Iterable[Path],
    settings: Settings,
    *,
    root: Path,
    parameters: Mapping[str, Mapping[str, object]],
) -> None:
    """Stamp the executed copies of notebooks that succeeded, once all have run: later ones change what marks say."""
    succeeded = [execution for execution in executions if not execution.error and not execution.skipped]
    if not succeeded:
        return
    paths, marks = {path.stem: path for path in notebooks}, _marks(settings, s3_client(settings))
    for execution in succeeded:
        path = paths[execution.name]
        copy = json.loads(execution.executed.read_text())
        copy["metadata"][STAMP] = {
            "parts": _parts(path, parameters.get(execution.name, {}), settings, root),
            "marks": {module: marks[module] for module in _marked(path, root)},
            "seconds": execution.seconds,
        }
        write_private(execution.executed, json.dumps(copy, indent=1))


def _difference(
    stamp: Mapping[str, Any],
    path: Path,
    parameters: Mapping[str, object],
    settings: Settings,
    root: Path,
    marks: Mapping[str, str],
) -> str:
    """Name what has changed since a copy was stamped; empty if nothing has."""
    parts = _parts(path, parameters, settings, root)
    if changed := sorted(name for name in parts.keys() | stamp["parts"] if parts.get(name) != stamp["parts"].get(name)):
        return f"{', '.join(changed[:3])}{' and more' if len(changed) > 3 else ''} changed"
    moved = [module for module, mark in stamp["marks"].items() if marks.get(module) != mark]
    return f"what {' and '.join(moved)} knows was changed since" if moved else ""


def _parts(path: Path, parameters: Mapping[str, object], settings: Settings, root: Path) -> dict[str, str]:
    """Give a digest of each thing that decides what a notebook finds, by its name."""
    notebook = json.loads(path.read_text())
    cells = [["".join(cell["source"]), cell["metadata"].get("tags")] for cell in notebook["cells"]]
    files = {root / "requirements.lock", *used_files(path, root)}
    files |= {file for file in (root / "data").glob("*") if file.suffix in {".csv", ".toml"}}
    files |= {file for file in (root / "feature_repo").glob("*") if file.is_file()}
    return {
        "the notebook": _digest(json.dumps([cells, notebook["metadata"].get("mlplatform")]).encode()),
        "parameters": _digest(json.dumps(parameters, sort_keys=True, default=str).encode()),
        "python": sys.version,
        "the platform": _digest(f"{settings.s3_endpoint} {settings.access_key} {settings.tracking_uri}".encode()),
        **{str(file.relative_to(root)): _digest(file.read_bytes()) for file in files if file.is_file()},
    }


def used_files(notebook: Path, root: Path) -> set[Path]:
    """List the files of our packages that a notebook imports, directly or through each other, and what these read.

    Classes that `feature_store.yaml` names and the server of a service that the notebook needs count as imported.
    """
    source = root / "src"
    code = "\n".join(
        "".join(cell["source"]) for cell in json.loads(notebook.read_text())["cells"] if cell["cell_type"] == "code"
    )
    found: set[Path] = set()
    waiting = list(_imported(code, source))
    for service in services(notebook):
        waiting += sorted((source / SERVERS[service]).rglob("*.py")) if service in SERVERS else []
    while waiting:
        file = waiting.pop()
        if file not in found:
            found.add(file)
            waiting += _imports_of(file, source)
    return found


@lru_cache(maxsize=256)
def _imports_of(file: Path, source: Path) -> tuple[Path, ...]:
    if file.suffix != ".py":
        return ()
    code = file.read_text()
    plugins = (source / "mlplatform" / "feast_plugins").glob("*.py") if file.name == "features.py" else ()
    read = (path for path in file.parent.iterdir() if path.suffix in {".toml", ".md"} and path.name in code)
    return (*_imported(code, source), *plugins, *read)


def _imported(code: str, source: Path) -> Iterator[Path]:
    """Give the files of our packages that a piece of code imports."""
    for node in ast.walk(ast.parse(re.sub(r"^\s*[%!].*$", "", code, flags=re.MULTILINE))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            place = source.joinpath(*name.split("."))
            for file in (place.with_suffix(".py"), place / "__init__.py"):
                if file.is_file():
                    yield file


def _marked(path: Path, root: Path) -> list[str]:
    """Name the modules that a notebook uses and whose answers others can change."""
    used = {file.stem for file in used_files(path, root)}
    return [module for module in ("registry", "features") if module in used]


def _marks(settings: Settings, s3: S3Client) -> dict[str, str]:
    """Ask which version is champion, and what the feature store holds.

    Raises:
        ServiceDownError: A service does not answer.
    """
    champion = mlflow_rest.find_version(settings, table.current().model, CHAMPION)
    stored = [_list(s3, f"s3://{bucket}/") for bucket in (FEATURES_BUCKET, REGISTRY_BUCKET)]
    try:
        with redis.Redis.from_url(settings.redis_url) as client:
            keys = client.dbsize()
    except redis.RedisError as error:
        raise service_down("online store", settings.redis.split(",", 1)[0]) from error
    return {
        "registry": champion["version"] if champion else "",
        "features": _digest(f"{keys} {stored}".encode()),
    }


def _lost(executed: Path, settings: Settings, s3: S3Client) -> str:
    """Name an object or an MLflow run that a copy recorded and the platform no longer has; empty if all are there."""
    try:
        recorded = sorted(set(_texts(read_results(executed))))
    except NotebookError as error:
        return str(error)
    for text in recorded:
        if text.startswith("s3://") and text not in _list(s3, text):
            return f"{text} is gone"
        if _RUN_ID.fullmatch(text):
            run = mlflow_rest.look_up(settings, "runs/get", run_id=text)
            if run is None or run["run"]["info"]["lifecycle_stage"] != "active":
                return f"MLflow's run {text} is gone"
    return ""


def _list(s3: S3Client, prefix: str) -> dict[str, str]:
    """Give the ETag of each object whose address begins so, without pandas, which `objectstore` imports."""
    bucket, _, key = prefix.removeprefix("s3://").partition("/")
    pages = s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=key)
    with s3_errors(prefix):
        return {f"s3://{bucket}/{entry['Key']}": entry["ETag"] for page in pages for entry in page.get("Contents", [])}


def _texts(value: object) -> Iterator[str]:
    """Give every text within nested results."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from _texts(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from _texts(entry)


def _read_stamp(executed: Path) -> dict[str, Any] | None:
    try:
        stamp = json.loads(executed.read_text())["metadata"].get(STAMP)
    except (OSError, ValueError, KeyError):
        return None
    return dict(stamp) if stamp else None


def _digest(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()[:16]
