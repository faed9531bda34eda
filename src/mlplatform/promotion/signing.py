"""Signatures over a model's files, so that only what a training run logged and the registry promoted is ever loaded.

A signature is an HMAC with the platform's MODEL_SIGNING_KEY over the name and digest of every file, and over what the
files are signed as. Who can write to the object store or to MLflow and lacks the key can replace a model, and cannot
make anybody load it. docs/decisions says why it is this and not a pair of keys.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import mlflow
from mlflow.entities.model_registry import ModelVersion
from mlflow.models import Model
from sklearn.pipeline import Pipeline

from mlplatform.errors import SettingsError, UntrustedModelError

KEY_VARIABLE = "MODEL_SIGNING_KEY"
TAG = "signature"
MODEL_FILE = "model.skops"
# What skops may load beside its own list. This list counts, not the one that travels with a model.
TRUSTED_TYPES = ["sklearn.tree._tree.Tree", "xgboost.core.Booster", "xgboost.sklearn.XGBClassifier"]


def seal(model_id: str) -> None:
    """Sign the files that the active run has just logged; `promote` accepts no others.

    Args:
        model_id: MLflow's id of the logged model, as `log_model(...).model_id` gives it.
    """
    with TemporaryDirectory() as folder:
        tags = {TAG: sign(_download(model_id, Path(folder)), model_id)}
    mlflow.MlflowClient().set_logged_model_tags(model_id, tags)


def sign_version(version: ModelVersion) -> str:
    """Give the signature of a version, once its files are those that its training run logged, in a format we load.

    Raises:
        UntrustedModelError: The files are others, or the run signed none, or they are not of that format.
    """
    model_id = model_id_of(version)
    with TemporaryDirectory() as folder:
        files = _download(model_id, Path(folder))
        tags = mlflow.MlflowClient().get_logged_model(model_id).tags
        verify(files, model_id, tags.get(TAG), label=f"{label(version)} as its training run logged it")
        _check_format(files, label=label(version))
        return sign(files, _subject(version))


def fetch_verified(version: ModelVersion, into: Path) -> Path:
    """Download a version's files and verify them; nothing is deserialised.

    Args:
        version: The registered version.
        into: An existing folder that nobody else can write to.

    Returns:
        The folder of the model's files, which holds `MLmodel` and `model.skops`.

    Raises:
        UntrustedModelError: They are not what was signed when this version was promoted.
    """
    files = _download(model_id_of(version), into)
    verify(files, _subject(version), version.tags.get(TAG), label=label(version))
    _check_format(files, label=label(version))
    return files


def load(files: Path) -> Pipeline:
    """Load a verified model with our own list of types, whatever its `MLmodel` says.

    Args:
        files: What `fetch_verified` returned.
    """
    from skops import io  # it looks through all of scikit-learn and SciPy first, for the better part of a second

    return io.load(files / MODEL_FILE, trusted=TRUSTED_TYPES)


def sign(files: Path, subject: str) -> str:
    """Sign every file of a folder as a subject, so that a signature fits no other subject.

    Raises:
        SettingsError: There is no key.
        UntrustedModelError: There is something in the folder that is no plain file, such as a link.
    """
    digests = {}
    for path in sorted(files.rglob("*")):
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise UntrustedModelError(f"{path.name} in {subject} is no plain file; train the model again")
        if path.is_file():
            digests[path.relative_to(files).as_posix()] = hashlib.sha256(path.read_bytes()).hexdigest()
    key = os.environ.get(KEY_VARIABLE, "")
    if len(key) < 32:
        raise SettingsError(
            f"{KEY_VARIABLE} is missing or shorter than 32 characters; call connect(), or run 'make env'"
        )
    return hmac.new(key.encode(), json.dumps([subject, digests], sort_keys=True).encode(), "sha256").hexdigest()


def verify(files: Path, subject: str, signature: str | None, *, label: str) -> None:
    """Compare the files of a folder with a signature.

    Raises:
        UntrustedModelError: There is no signature, or it is another one.
    """
    if not signature:
        raise UntrustedModelError(f"{label} is not signed; train it with notebook 02_train_models and promote it")
    if not hmac.compare_digest(sign(files, subject), signature):
        raise UntrustedModelError(
            f"{label} is not what was signed: a file or its signature was changed; roll back, or train again"
        )


def label(version: ModelVersion) -> str:
    """Name a version in a message."""
    return f"{version.name!r} version {version.version}"


def model_id_of(version: ModelVersion) -> str:
    """Give the id of the logged model that a version was made from; MLflow answers it as the version's source only."""
    return str(version.source).removeprefix("models:/")


def _subject(version: ModelVersion) -> str:
    return json.dumps([version.name, str(version.version), model_id_of(version)])


def _download(model_id: str, into: Path) -> Path:
    # By the model's own id: by a version's name MLflow adds a file about the registry to what was logged.
    return Path(mlflow.artifacts.download_artifacts(f"models:/{model_id}", dst_path=str(into)))


def _check_format(files: Path, *, label: str) -> None:
    """Refuse what is no pipeline in the skops format, or holds other types than ours."""
    from skops import io
    from skops.io.exceptions import UntrustedTypesFoundException

    flavour = Model.load(str(files)).flavors.get("sklearn", {})
    if flavour.get("serialization_format") != "skops" or flavour.get("pickled_model") != MODEL_FILE:
        raise UntrustedModelError(f"{label} is not in the skops format; log it with tracking.log_model")
    try:
        strange = set(io.get_untrusted_types(file=files / MODEL_FILE)) - set(TRUSTED_TYPES)
    except (UntrustedTypesFoundException, OSError, ValueError, KeyError) as error:
        raise UntrustedModelError(f"{label} is no readable skops file; log it with tracking.log_model") from error
    if strange:
        raise UntrustedModelError(f"{label} needs the types {', '.join(sorted(strange))}, which are not on our list")
