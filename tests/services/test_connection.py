from __future__ import annotations

import subprocess
import sys


def test_feast_is_imported_without_being_compiled_twice() -> None:
    show = "import feast; print(feast.Entity.__init__.__code__.co_varnames)"
    hasten = "from mlplatform.connection import hasten_feast; hasten_feast();"
    plain, spared = (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        for code in (show, hasten + show)
    )
    assert "memo" in plain, "Feast no longer uses typeguard: hasten_feast can go"
    assert "memo" not in spared
