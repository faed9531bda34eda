"""What is saved from one platform is there on another, new one."""

from __future__ import annotations

from pathlib import Path

import boto3
import mlflow
import pytest

from mlplatform.connection import s3_client
from mlplatform.errors import DataError, MissingObjectError
from mlplatform.settings import DATASETS_BUCKET, Settings
from mlplatform_ops import backup
from mlplatform_ops.cli import main
from mlplatform_ops.embedded.platform import EmbeddedPlatform
from mlplatform_ops.ports import free_port


def _store(settings: Settings) -> object:
    return boto3.session.Session().client(
        "s3",
        endpoint_url=settings.s3_endpoint,
        aws_access_key_id=settings.access_key,
        aws_secret_access_key=settings.secret_key,
        region_name=settings.region,
    )


def test_a_new_platform_finds_every_object_and_run_of_the_saved_one(
    embedded: EmbeddedPlatform, platform: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3_client().put_object(Bucket=DATASETS_BUCKET, Key="backup/one.csv", Body=b"a,b\n")
    mlflow.set_tracking_uri(platform.tracking_uri)
    mlflow.set_experiment("backup")
    with mlflow.start_run() as run:
        mlflow.log_metric("answer", 42)
        mlflow.log_text("kept", "note.txt")
    copy = tmp_path / "copy"
    command = ["backup", "save", str(copy), "--database", str(embedded.state / "mlflow" / "mlflow.db")]
    assert main(command) == 0

    other = EmbeddedPlatform(tmp_path / "other", environ={}, default_ports=False)
    (other.state / "mlflow").mkdir(parents=True)
    backup.copy_sqlite(copy / "databases" / "mlflow.db", other.state / "mlflow" / "mlflow.db")
    try:
        settings = other.up()
        assert backup.restore(_store(settings), copy) > 1
        for name, value in settings.to_env().items():
            monkeypatch.setenv(name, value)
        mlflow.set_tracking_uri(settings.tracking_uri)
        found = mlflow.get_run(run.info.run_id)
        assert found.data.metrics == {"answer": 42}
        assert mlflow.artifacts.load_text(f"{found.info.artifact_uri}/note.txt") == "kept"
        assert s3_client().get_object(Bucket=DATASETS_BUCKET, Key="backup/one.csv")["Body"].read() == b"a,b\n"
    finally:
        other.clean()
        mlflow.set_tracking_uri(platform.tracking_uri)


def test_only_the_object_store_need_be_there(
    platform: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    s3_client().put_object(Bucket=DATASETS_BUCKET, Key="backup/two.csv", Body=b"a,b\n")
    copy = tmp_path / "copy"
    assert main(["backup", "save", str(copy)]) == 0
    assert main(["backup", "restore", str(copy)]) == 0
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    assert main(["backup", "save", str(tmp_path / "another")]) == 1
    assert "does not answer" in capsys.readouterr().err


def test_a_copy_that_ended_early_is_none_and_the_next_one_starts_anew(
    platform: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy"
    monkeypatch.setattr(backup, "BUCKETS", (DATASETS_BUCKET, "unheard-of"))
    with pytest.raises(MissingObjectError, match="no bucket unheard-of"):
        backup.save(s3_client(), copy)
    left = tmp_path / "copy.part" / "buckets" / DATASETS_BUCKET / "backup"
    left.mkdir()
    (left / "three.csv").write_text("a,b\n")
    with pytest.raises(MissingObjectError, match="no copy in"):
        backup.restore(s3_client(), copy)
    monkeypatch.setattr(backup, "BUCKETS", (DATASETS_BUCKET,))
    backup.save(s3_client(), copy)
    assert not (copy / "buckets" / DATASETS_BUCKET / "backup" / "three.csv").exists()
    assert not (tmp_path / "copy.part").exists()


def test_a_copy_is_not_mixed_with_an_older_one(platform: Settings, tmp_path: Path) -> None:
    backup.save(s3_client(), tmp_path / "copy")
    with pytest.raises(DataError, match=r"copy is there already; name a new folder"):
        backup.save(s3_client(), tmp_path / "copy")


def test_restoring_from_nothing_says_so(platform: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["backup", "restore", str(tmp_path)]) == 1
    assert "no copy in" in capsys.readouterr().err


def test_saving_a_database_that_is_not_there_says_so(platform: Settings, tmp_path: Path) -> None:
    with pytest.raises(MissingObjectError, match="no database at"):
        backup.save(s3_client(), tmp_path / "copy", databases=[tmp_path / "nothing.db"])


def test_two_databases_of_one_name_are_not_saved_over_each_other(platform: Settings, tmp_path: Path) -> None:
    databases = [tmp_path / folder / "mlflow.db" for folder in ("one", "two")]
    with pytest.raises(DataError, match="two of the databases have one name"):
        backup.save(s3_client(), tmp_path / "copy", databases=databases)


def test_restoring_into_a_bucket_that_is_not_there_copies_nothing(platform: Settings, tmp_path: Path) -> None:
    for bucket in (DATASETS_BUCKET, "unheard-of"):
        (tmp_path / "buckets" / bucket).mkdir(parents=True)
        (tmp_path / "buckets" / bucket / "not-to-be-copied.txt").write_text("x")
    with pytest.raises(MissingObjectError, match=r"there is no bucket unheard-of; run 'make up'"):
        backup.restore(s3_client(), tmp_path)
    names = {entry["Key"] for entry in s3_client().list_objects_v2(Bucket=DATASETS_BUCKET).get("Contents", ())}
    assert "not-to-be-copied.txt" not in names
