from __future__ import annotations

import subprocess
import sys


def test_feast_is_imported_without_being_compiled_twice() -> None:
    show = "import feast; print(feast.Entity.__init__.__code__.co_varnames)"
    hasten = "from mlplatform.clients.hastening import hasten_feast; hasten_feast();"
    plain, spared = (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        for code in (show, hasten + show)
    )
    assert "memo" in plain, "Feast no longer uses typeguard: hasten_feast can go"
    assert "memo" not in spared


def test_mlflow_does_not_import_feast_for_a_header_that_feast_still_adds() -> None:
    code = """if True:
        import inspect, sys
        from mlplatform.clients.hastening import hasten_feast
        hasten_feast()
        from mlflow.tracking.request_header.registry import resolve_request_headers
        inspect.getmodule(compile("", "nowhere", "exec"))
        print(resolve_request_headers().get("Authorization"), "feast" in sys.modules)
        from feast.infra.data_sources.mlflow.auth import mlflow_token_scope
        with mlflow_token_scope("of-the-request"):
            print(resolve_request_headers()["Authorization"])
        print(resolve_request_headers().get("Authorization"))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["None False", "Bearer of-the-request", "None"]
