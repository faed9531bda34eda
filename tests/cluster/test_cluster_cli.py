"""The cluster's commands, as typed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_cluster import FakeCluster, serve, use
from manifests import compose

from mlplatform.settings import CLIENT_DEFAULTS, VARIABLES
from mlplatform_ops.cli import main
from mlplatform_ops.cluster.overlay import read_env


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCluster]:
    """A copy of the manifests as working directory, and a cluster that the kubeconfig names."""
    compose(tmp_path)
    for name in ("notebooks", "feature_repo"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    with serve(tmp_path) as (cluster, kubeconfig):
        use(kubeconfig, monkeypatch)
        yield cluster


def test_up_status_and_down_say_what_they_did(fake: FakeCluster, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["k8s-status"]) == 1
    assert "make k8s-up" in capsys.readouterr().err
    assert main(["k8s-up", "--context", "kind-test"]) == 0
    assert "context kind-test (" in capsys.readouterr().err
    assert main(["k8s-status"]) == 0
    assert "Deployment mlflow: 1/1 ready\n" in capsys.readouterr().out
    fake.waiting["mlflow"] = "ContainerCreating"
    assert main(["k8s-status"]) == 1
    assert main(["k8s-down", "--keep-data"]) == 0
    assert "kept the namespace mlplatform" in capsys.readouterr().err
    assert main(["k8s-down", "--delete-data"]) == 0
    assert ("namespaces", "mlplatform") not in fake.objects


def test_down_without_anybody_to_ask_keeps_the_data(fake: FakeCluster) -> None:
    assert main(["k8s-up"]) == 0
    assert main(["k8s-down", "--yes"]) == 0
    assert ("persistentvolumeclaims", "mlflow") in fake.objects


def test_secrets_are_made_once_and_rotated_on_request(fake: FakeCluster, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["k8s-secrets"]) == 0
    assert "was kept" in capsys.readouterr().err
    assert main(["k8s-secrets", "--rotate", "redis"]) == 0
    assert "wrote " in capsys.readouterr().err


def test_features_go_to_the_cluster_that_is_asked_for(
    fake: FakeCluster, no_platform: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (*VARIABLES.values(), *CLIENT_DEFAULTS):
        monkeypatch.setenv(name, "")
    seen: list[str] = []
    monkeypatch.setattr("mlplatform.features.build", lambda notify: seen.append(os.environ["MLFLOW_TRACKING_PASSWORD"]))
    assert main(["k8s-up"]) == 0
    fake.backends = dict.fromkeys(("mlflow-0", "minio-0", "redis-0", "feature-server-0"), 1)
    assert main(["features", "--platform", "k8s"]) == 0
    client = tmp_path / "deploy" / "overlays" / "local" / "secrets" / "client.env"
    assert seen == [read_env(client)["MLFLOW_TRACKING_PASSWORD"]]
    assert not no_platform.exists()
