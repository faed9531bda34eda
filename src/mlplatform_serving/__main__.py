"""Serve the champion: `python -m mlplatform_serving --port 3000`, with the platform's variables in the environment.

`bentoml serve` starts a supervisor, a worker and a resource tracker, and reports usage. Here one process serves; two
replicas are two of them.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile

from mlplatform.clients.hastening import hasten_feast
from mlplatform.clients.waiting import limit_waiting
from mlplatform.errors import PlatformError
from mlplatform.serving.endpoint_log import FOLDER
from mlplatform.serving.model_client import TOKEN_VARIABLE
from mlplatform.settings import CLIENT_DEFAULTS


def main(arguments: list[str] | None = None) -> None:
    """Serve until told to stop."""
    parser = argparse.ArgumentParser(prog="python -m mlplatform_serving", description="Serve the champion over HTTP.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=3000, help="port to listen on (default: %(default)s)")
    parser.add_argument("--model", help="the registered model (default: the one that data/table.toml names)")
    parser.add_argument(
        "--log", default=FOLDER, help="where rows and scores are logged; empty: nowhere (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    # While a token is being replaced, the one before it is valid too.
    tokens = [value for name in (TOKEN_VARIABLE, f"{TOKEN_VARIABLE}_PREVIOUS") if (value := os.environ.get(name))]
    if not tokens and options.host not in {"127.0.0.1", "::1", "localhost"}:
        sys.exit(f"error: anyone who reaches {options.host} could ask; set {TOKEN_VARIABLE}")
    with tempfile.TemporaryDirectory(prefix="bentoml-") as home:
        # Read when bentoml is imported. It would make folders in the user's home and report to its maker.
        os.environ.update(BENTOML_HOME=home, BENTOML_DO_NOT_TRACK="True")
        for name, value in CLIENT_DEFAULTS.items():
            os.environ.setdefault(name, value)
        hasten_feast()
        # MLflow's client asks a server that is away for minutes, and a probe ends an endpoint that does not start.
        limit_waiting()
        try:
            import bentoml  # noqa: F401
            import uvicorn
        except ImportError:
            sys.exit("error: the packages of the group 'serving' are not installed; run 'make .venv/.serving'")
        try:
            from mlplatform_serving import service
        except PlatformError as error:  # it reads the description of the table
            sys.exit(f"error: {error}")
        from mlplatform_serving.gate import Gate

        service.MODEL, service.LOG = options.model or service.MODEL, options.log
        app = Gate(service.application(), lambda: service.predictor().problem, tokens=tokens)
        uvicorn.run(app, host=options.host, port=options.port, access_log=False, log_level="warning")


if __name__ == "__main__":
    main()
