"""MLflow's databases, brought from an older schema to this version's as the Job and the servers' init container do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy

SCHEMA = Path(__file__).parents[2] / "deploy" / "components" / "postgres" / "schema.py"
# Before experiments and models got workspaces, and before users got roles.
OLD = {"mlflow": "c8d9e0f1a2b3", "mlflow_auth": "8606fa83a998"}
# In a process of its own, since Alembic imports MLflow's server, and that warns of much.
MAKE_OLD = """import sys
from pathlib import Path
import mlflow, sqlalchemy
from alembic import command
from alembic.config import Config
from mlflow.store.tracking.dbmodels.initial_models import Base
uri, scripts, revision = sys.argv[1:]
if scripts.startswith("store"):
    Base.metadata.create_all(sqlalchemy.create_engine(uri))
config = Config()
config.set_main_option("script_location", str(Path(mlflow.__file__).parent / scripts))
config.set_main_option("sqlalchemy.url", uri)
command.upgrade(config, revision)
"""


@pytest.fixture
def databases(tmp_path: Path) -> dict[str, str]:
    """The addresses of both databases, as an older version left them, each with something in it."""
    uris = {name: f"sqlite:///{tmp_path}/{name}.db" for name in OLD}
    for (name, revision), scripts in zip(
        OLD.items(), ("store/db_migrations", "server/auth/db/migrations"), strict=True
    ):
        subprocess.run([sys.executable, "-W", "ignore", "-c", MAKE_OLD, uris[name], scripts, revision], check=True)
    tracking, users = (sqlalchemy.create_engine(uri) for uri in uris.values())
    _add(tracking, "experiments", experiment_id=7, name="old", artifact_location="x", lifecycle_stage="active")
    _add(tracking, "registered_models", name="income")
    _add(tracking, "model_versions", name="income", version=1, current_stage="None")
    _add(tracking, "registered_model_aliases", name="income", alias="champion", version=1)
    _add(users, "users", id=1, username="ann", password_hash="x", is_admin=False)  # noqa: S106
    _add(users, "experiment_permissions", experiment_id="7", user_id=1, permission="READ")
    return {"MLFLOW_BACKEND_STORE_URI": uris["mlflow"], "MLFLOW_AUTH_DATABASE_URI": uris["mlflow_auth"]}


def _add(engine: sqlalchemy.Engine, table: str, **values: object) -> None:
    with engine.begin() as connection:
        described = sqlalchemy.Table(table, sqlalchemy.MetaData(), autoload_with=connection)
        connection.execute(described.insert().values(**values))


def _start(step: str, databases: dict[str, str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(SCHEMA), step],
        env=os.environ | databases,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_an_older_schema_is_upgraded_with_all_that_it_holds_while_servers_wait(databases: dict[str, str]) -> None:
    with _start("wait", databases) as waiting:
        assert waiting.stdout
        assert any(f"waiting for the schema: it is {OLD['mlflow']}" in line for line in waiting.stdout)
        try:
            with _start("upgrade", databases) as upgrading:
                said = upgrading.communicate()[0]
            assert upgrading.returncode == 0, said
            assert waiting.wait(60) == 0
        finally:
            waiting.kill()

    def found(variable: str, query: str) -> list[tuple[object, ...]]:
        with sqlalchemy.create_engine(databases[variable]).connect() as connection:
            return [tuple(row) for row in connection.execute(sqlalchemy.text(query))]

    tracking, users = databases
    assert found(tracking, "SELECT experiment_id, name, workspace FROM experiments") == [(7, "old", "default")]
    assert found(tracking, "SELECT alias, version FROM registered_model_aliases") == [("champion", 1)]
    assert found(users, "SELECT username FROM users") == [("ann",)]
    granted = "SELECT resource_type, resource_pattern, permission FROM role_permissions"
    assert found(users, granted) == [("experiment", "7", "READ")]
