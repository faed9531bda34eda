"""Bring MLflow's two databases to this version's schema (`upgrade`), or wait until somebody has (`wait`).

An upgrade may lock tables and can't be undone, so it is a step of its own: one Job does it, after a backup, and a
server that starts before it is through waits here instead of failing or racing its siblings.
"""

# ruff: noqa: T201 (its output is the container's log)

import os
import sys
import time
from pathlib import Path

import sqlalchemy
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

WAIT_S = 3000
# Each database, and the table in which Alembic notes the version of its schema.
TRACKING = ("MLFLOW_BACKEND_STORE_URI", "mlflow.store.db_migrations", "alembic_version")
USERS = ("MLFLOW_AUTH_DATABASE_URI", "mlflow.server.auth.db.migrations", "alembic_version_auth")


def newest(scripts: str) -> str:
    """Return the schema version that this image's migrations lead to."""
    import mlflow

    folder = Path(mlflow.__file__).parent.joinpath(*scripts.split(".")[1:])
    config = Config()
    config.set_main_option("script_location", str(folder).replace("%", "%%"))
    return ScriptDirectory.from_config(config).get_current_head()


def current(engine: sqlalchemy.Engine, table: str) -> str | None:
    """Return the schema version that a database has, None for an empty one."""
    with engine.connect() as connection:
        return MigrationContext.configure(connection, opts={"version_table": table}).get_current_revision()


def until_reachable(engine: sqlalchemy.Engine, deadline: float) -> None:
    """Wait for the database server: a Job that crashes instead waits for minutes between its attempts."""
    while True:
        try:
            engine.connect().close()
            return
        except sqlalchemy.exc.OperationalError as error:
            if time.monotonic() > deadline:
                raise
            print("waiting for the database:", str(error.orig).strip().splitlines()[0], flush=True)
            time.sleep(2)


def upgrade(engine: sqlalchemy.Engine, scripts: str) -> None:
    """Create the tables in an empty database, or migrate the ones that are there."""
    # What `mlflow db upgrade` and `mlflow server` call; the commands refuse an empty database.
    if scripts == TRACKING[1]:
        from mlflow.store.db.utils import _safe_initialize_tables, _upgrade_db

        _safe_initialize_tables(engine)
        _upgrade_db(engine)
    else:
        # As a path, since importing mlflow.server.auth reads the server's configuration, which a Job doesn't have.
        import importlib.util

        import mlflow

        path = Path(mlflow.__file__).parent / "server" / "auth" / "db" / "utils.py"
        spec = importlib.util.spec_from_file_location("mlflow_auth_db", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.migrate(engine, "head")


def main(step: str) -> int:
    """Run one step over both databases; return the exit status."""
    deadline = time.monotonic() + WAIT_S
    for variable, scripts, table in (TRACKING, USERS):
        engine = sqlalchemy.create_engine(os.environ[variable], pool_pre_ping=True)
        until_reachable(engine, deadline)
        if step == "upgrade":
            upgrade(engine, scripts)
        while current(engine, table) != newest(scripts):
            if step == "upgrade" or time.monotonic() > deadline:
                print(f"{variable}: schema {current(engine, table)}, not {newest(scripts)}", file=sys.stderr)
                return 1
            print(f"waiting for the schema: it is {current(engine, table)}, not {newest(scripts)}", flush=True)
            time.sleep(2)
        print(f"{variable}: schema {newest(scripts)}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
