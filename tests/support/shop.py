"""A feature store to ask the same of four ways: ours on S3, on a Dask cluster and on local files, and stock DuckDB."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any
from uuid import uuid4

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from feast import FeatureStore, FileSource, RepoConfig

from mlplatform.feast_plugins.parquet_source import filesystem
from mlplatform.settings import Settings

ROOT = Path(__file__).parents[2]
OURS = "mlplatform.feast_plugins"
JANUARY, FEBRUARY, MARCH = (pd.Timestamp(f"2023-0{month}-01", tz="UTC") for month in (1, 2, 3))


class Shop:
    """A feature store of one kind with files of its own."""

    def __init__(self, kind: str, folder: Path, settings: Settings, *, scheduler: str = "", **online: Any) -> None:
        self.kind, self.folder = kind, folder
        self.project = f"shop_{uuid4().hex[:8]}"
        on_s3 = kind in {"ours on S3", "ours on Dask"}
        self.root = f"s3://feature-data-sets/{self.project}" if on_s3 else str(folder / "data")
        ours = kind != "stock DuckDB"
        registry: dict[str, Any] = {"path": str(folder / "registry.db"), "cache_ttl_seconds": 0}
        if on_s3:
            registry["path"] = f"s3://feature-registry/{self.project}.db"
            registry["registry_store_type"] = f"{OURS}.registry_store.ConditionalS3RegistryStore"
        store = f"{OURS}.online_store.ExpiringRedisOnlineStore" if ours else "redis"
        offline = {"type": f"{OURS}.offline_store.S3DuckDBOfflineStore" if ours else "duckdb"}
        if scheduler:
            offline["scheduler"] = scheduler
        if ours:
            online = {"expire_online": False, **online}
        self.config = RepoConfig(
            project=self.project,
            provider="local",
            registry=registry,
            repo_path=folder,
            offline_store=offline,
            online_store={"type": store, "connection_string": settings.redis, **online},
            batch_engine={"type": f"{OURS}.compute_engine.PipelinedComputeEngine" if ours else "local"},
            entity_key_serialization_version=3,
        )
        self.store = FeatureStore(config=self.config)

    def path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def put(self, name: str, data: pd.DataFrame | pa.Table) -> str:
        table = data if isinstance(data, pa.Table) else pa.Table.from_pandas(data, preserve_index=False)
        files, path = filesystem(self.path(name))
        if "://" not in self.root:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path, filesystem=files)
        return self.path(name)

    def source(self, name: str, data: pd.DataFrame | pa.Table, **options: Any) -> FileSource:
        path = self.put(f"{name}.parquet", data)
        return FileSource(name=name, path=path, **{"timestamp_field": "at", **options})

    def ask(self, features: list[str], columns: dict[str, Any], **options: Any) -> pd.DataFrame:
        return self.store.get_historical_features(pd.DataFrame(columns), features, **options).to_df()

    def online(self, features: list[str], *rows: dict[str, Any], **options: Any) -> dict[str, list[Any]]:
        return self.store.get_online_features(features, list(rows), **options).to_dict()

    def materialise(self) -> None:
        self.store.materialize(JANUARY.to_pydatetime(), MARCH.to_pydatetime())


def ask_elsewhere(config: RepoConfig, features: list[str], columns: dict[str, Any]) -> tuple[str, str, pd.DataFrame]:
    """Ask in a process that knows no shop; give its zone, the answer's zone, and the answer."""
    found = FeatureStore(config=config).get_historical_features(pd.DataFrame(columns), features).to_df()
    zone = duckdb.sql("SELECT current_setting('TimeZone')").fetchone()[0]
    return zone, str(found[features[0].partition(":")[2]].dtype.tz), found


def plain(column: pd.Series) -> list[Any]:
    """Give a column's values, null as None."""
    return [None if pd.isna(value) else value for value in column]


def describe_table(clone: Path) -> None:
    """Make a folder a clone that knows what the table is."""
    for part in ("data", "feature_repo", "notebooks"):
        (clone / part).mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "data" / "table.toml", clone / "data")


def scratch_repository(folder: Path) -> Path:
    """Copy the feature repository and what describes the table, with a project, a registry and files of its own."""
    name = f"scratch_{uuid4().hex[:8]}"
    repo = folder / name
    shutil.copytree(ROOT / "feature_repo", repo, ignore=shutil.ignore_patterns("__pycache__"))
    describe_table(folder)
    for file, old, new in (
        ("feature_store.yaml", "project: income", f"project: {name}"),
        ("feature_store.yaml", "registry.db", f"{name}.db"),
        ("entity.py", '"income"', f'"{name}"'),
        ("features.py", "s3://feature-data-sets/", f"s3://feature-data-sets/{name}/"),
    ):
        path = repo / file
        text = path.read_text()
        assert old in text, f"{file} has no {old}"
        path.write_text(text.replace(old, new))
    return repo
