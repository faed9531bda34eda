"""The registry is data: whoever can write the object can neither run code nor change a definition unseen."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from subprocess import PIPE, STDOUT, CompletedProcess

import dill
import pandas as pd
import pytest
from feast.protos.feast.core.OnDemandFeatureView_pb2 import OnDemandFeatureView
from feast.protos.feast.core.Registry_pb2 import Registry
from shop import scratch_repository
from warm import run_code

from mlplatform import features, objectstore
from mlplatform.errors import RegistryError
from mlplatform.feast_plugins.registry_store import signed, verified
from mlplatform.settings import Settings


@pytest.fixture
def repo(platform: Settings, tmp_path: Path) -> Path:
    folder = scratch_repository(tmp_path)
    features.apply(folder)
    return folder


def uri(repo: Path) -> str:
    return f"s3://feature-registry/{repo.name}.db"


def with_function(body: bytes, repo: Path, mark: Path) -> bytes:
    """Add an on-demand view whose function would create a file, as source and as a pickle."""
    registry = Registry.FromString(verified(body, "registry"))
    view = OnDemandFeatureView()
    view.spec.name, view.spec.project = "trap", repo.name
    function = view.spec.feature_transformation.user_defined_function
    function.name, function.body_text = "trap", f"open({str(mark)!r}, 'w').close()\ndef trap(x): return x\n"

    class Payload:
        def __reduce__(self):
            return Path.touch, (mark,)

    function.body = dill.dumps(Payload())
    registry.on_demand_feature_views.append(view)
    return registry.SerializeToString()


FEAST = Path(sys.executable).with_name("feast")
READERS = {
    "notebook": "from mlplatform import features; features.open_store(pathlib.Path.cwd())",
    "UI": "from mlplatform_ops.feast_servers.feature_ui import main; main(['--port', '0'])",
    "feature server": (
        "from mlplatform_ops.feast_servers import feature_server as s; "
        "source = [c for n, c in vars(s).items() if hasattr(c, 'look')][0](pathlib.Path.cwd()); "
        "source.look(); sys.exit(source.app() is None)"
    ),
}


# What `python -m mlplatform.feast_plugins.registry_store .` does.
SIGN = "import sys; from mlplatform.feast_plugins.registry_store import main; sys.argv = ['', '.']; main()"


def run_command(*words: str | Path, folder: Path) -> CompletedProcess[str]:
    return subprocess.run(words, cwd=folder, stdout=PIPE, stderr=STDOUT, text=True, check=False, timeout=300)


def read_by(reader: str, repo: Path) -> CompletedProcess[str]:
    if reader == "feast":
        return run_command(FEAST, "feature-views", "list", folder=repo)
    return run_code(f"import pathlib, sys; {READERS[reader]}", repo)


@pytest.mark.parametrize("reader", ["notebook", "UI", "feature server", "feast"])
def test_every_reader_refuses_a_registry_that_brings_code(repo: Path, tmp_path: Path, reader: str):
    mark = tmp_path / "was-run"
    objectstore.write_bytes(signed(with_function(objectstore.read_bytes(uri(repo)), repo, mark)), uri(repo))
    done = read_by(reader, repo)
    said = [line for line in done.stdout.splitlines() if "brings code" in line]
    assert done.returncode
    assert len(said) == 1
    assert "trap; it was not run" in said[0]
    assert not mark.exists()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda body: body[: len(body) // 2], "has no digest: it is cut short, or was written without"),
        (lambda body: verified(body, ""), "has no digest"),
        (lambda body: body.replace(b"Sex", b"Six"), "was written with another FEATURE_REGISTRY_KEY or changed since"),
        (lambda body: b"", "has no digest"),
    ],
    ids=["truncated", "without the key", "changed", "empty"],
)
def test_a_registry_that_was_not_written_with_the_key_is_refused(repo: Path, damage, said: str):
    objectstore.write_bytes(damage(objectstore.read_bytes(uri(repo))), uri(repo))
    with pytest.raises(RegistryError, match=said):
        features.open_store(repo)


@pytest.mark.parametrize("reader", ["UI", "feature server", "feast"])
def test_every_reader_refuses_a_registry_without_digest_in_one_line(repo: Path, reader: str):
    objectstore.write_bytes(verified(objectstore.read_bytes(uri(repo)), ""), uri(repo))
    done = read_by(reader, repo)
    assert done.returncode
    assert len([line for line in done.stdout.splitlines() if "has no digest" in line]) == 1


def test_a_registry_of_earlier_gets_its_digest_by_one_command(repo: Path):
    objectstore.write_bytes(verified(objectstore.read_bytes(uri(repo)), ""), uri(repo))
    done = run_command(sys.executable, "-m", "mlplatform.feast_plugins.registry_store", ".", folder=repo)
    assert done.stdout.endswith("has a digest now\n"), done.stderr
    assert features.open_store(repo).list_feature_views()


def test_signing_refuses_code_too(repo: Path, tmp_path: Path):
    mark = tmp_path / "was-run"
    objectstore.write_bytes(with_function(objectstore.read_bytes(uri(repo)), repo, mark), uri(repo))
    done = run_code(SIGN, repo)
    assert done.returncode
    assert "brings code that feature_repo does not have" in done.stdout
    assert not mark.exists()


FUNCTION = """
import pandas as pd
from feast import Field
from feast.on_demand_feature_view import on_demand_feature_view
from feast.types import String
from features import views

demographic = next(view for view in views if view.name == "demographic")


@on_demand_feature_view(sources=[demographic], schema=[Field(name="shout", dtype=String)])
def loud(inputs: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame({"shout": inputs["Sex"].str.upper()})
"""


def test_a_function_that_the_repository_brings_is_handed_on_with_the_repositorys_own_pickle(repo: Path, tmp_path: Path):
    (repo / "loud.py").write_text(FUNCTION)
    applied = run_command(FEAST, "apply", folder=repo)
    assert applied.returncode == 0, applied.stdout
    registry = Registry.FromString(verified(objectstore.read_bytes(uri(repo)), ""))
    function = registry.on_demand_feature_views[0].spec.feature_transformation.user_defined_function
    mark = tmp_path / "was-run"

    class Payload:
        def __reduce__(self):
            return Path.touch, (mark,)

    function.body = dill.dumps(Payload())
    objectstore.write_bytes(signed(registry.SerializeToString()), uri(repo))
    (view,) = features.open_store(repo).list_on_demand_feature_views()
    shouted = view.feature_transformation.udf(pd.DataFrame({"Sex": ["male"]}))
    assert shouted["shout"].tolist() == ["MALE"]
    assert not mark.exists()
    (repo / "loud.py").write_text(FUNCTION.replace("upper", "lower"))
    with pytest.raises(RegistryError, match="brings code that feature_repo does not have, in registry/loud"):
        features.open_store(repo)
    applied = run_command(FEAST, "apply", folder=repo)
    assert applied.returncode == 0, applied.stdout
    assert features.open_store(repo).list_on_demand_feature_views()


def test_stock_feast_still_reads_the_object(repo: Path):
    body = objectstore.read_bytes(uri(repo))
    assert Registry.FromString(body).feature_views
