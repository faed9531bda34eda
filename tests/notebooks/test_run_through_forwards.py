"""A run that reaches a cluster through forwards survives that each of them drops in the middle of it.

kubectl and its forwards are real. A stand-in for the API server leads them to this session's servers.
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

import pytest
from fake_cluster import serve, use
from manifests import compose

from mlplatform import results
from mlplatform.settings import Settings
from mlplatform_ops import runner as notebooks
from mlplatform_ops.cluster.cluster import Cluster
from mlplatform_ops.cluster.overlay import FOLDER

ROOT = Path(__file__).parents[2]
# Enough that the run is under way: its first pieces ask whether the servers are there, and it must not wait for those.
PIECES = {"mlflow-0": 8, "minio-0": 8, "redis-0": 8, "feature-server-0": 1}


def _ports(settings: Settings) -> dict[str, int]:
    addresses = {
        "mlflow-0": settings.tracking_uri,
        "minio-0": settings.s3_endpoint,
        "redis-0": settings.redis_url,
        "feature-server-0": settings.feature_server,
    }
    return {pod: urlsplit(address).port or 0 for pod, address in addresses.items()}


def test_a_run_goes_on_when_every_forward_drops_in_the_middle_of_it(
    executed: dict[str, Path], platform: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    overlay = compose(tmp_path)
    with serve(tmp_path) as (fake, kubeconfig):
        use(kubeconfig, monkeypatch)
        cluster = Cluster(overlay, notify=said.append)
        cluster.up()
        credentials = "".join(f"{name}={value}\n" for name, value in platform.to_env().items())
        (overlay / FOLDER / "client.env").write_text(credentials)
        fake.backends, fake.drops = _ports(platform), dict(PIECES)
        said.clear()
        with cluster.forwarded({}) as settings:
            for name, value in settings.to_env().items():
                monkeypatch.setenv(name, value)
            execution = notebooks.execute(ROOT / "notebooks" / "07_predict_income.ipynb", tmp_path, {}, lambda _: None)
    assert execution.error == ""
    dropped = [line.replace(":", " ").split()[-1] for line in said if "dropped" in line]
    assert sorted(dropped) == sorted(PIECES)
    again, before = (results.read_results(path) for path in (execution.executed, executed["07_predict_income"]))
    assert again["single"] == before["single"]
    assert again["predictions"] == before["predictions"]
