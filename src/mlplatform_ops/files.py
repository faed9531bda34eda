"""Files that only their owner may read, replaced at once."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from mlplatform.errors import SettingsError


def write_private(path: Path, text: str) -> None:
    """Replace a file at once, readable by its owner alone."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        Path(name).replace(path)
    except OSError:
        Path(name).unlink()
        raise


def private_folder() -> Path:
    """Give the folder in this user's home that nobody else may enter; make it if it is missing.

    Raises:
        SettingsError: It cannot be made, or somebody else owns it.
    """
    path = Path.home() / ".cache" / "mlplatform"
    try:
        path.mkdir(parents=True, exist_ok=True)
        path.chmod(0o700)
    except (OSError, RuntimeError) as error:
        raise SettingsError(f"cannot make {path} for you alone ({error}); set HOME to a folder of yours") from error
    return path
