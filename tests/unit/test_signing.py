"""What a signature over a model's files refuses: every mutant of a real model, stored as MLflow stores it."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import pandas as pd
import pytest
from mlflow.entities.model_registry import ModelVersion, ModelVersionTag
from sklearn.tree import DecisionTreeClassifier

from mlplatform import modeling
from mlplatform.errors import SettingsError, UntrustedModelError
from mlplatform.income import COLUMNS
from mlplatform.promotion import signing

FLIPS = 10  # per file, spread over its length


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's files."""
    folder = tmp_path_factory.mktemp("honest") / "model"
    return save(folder, depth=2)


def save(folder: Path, *, depth: int) -> Path:
    frame = pd.DataFrame({column: ["a", "b", "a", "b"] for column in COLUMNS})
    model = modeling.make_pipeline(DecisionTreeClassifier(max_depth=depth)).fit(frame, [0, 1, 0, 1])
    types = signing.TRUSTED_TYPES
    needed = ["scikit-learn"]
    mlflow.sklearn.save_model(
        model, str(folder), serialization_format="skops", skops_trusted_types=types, pip_requirements=needed
    )
    return folder


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(signing.KEY_VARIABLE, "k" * 43)


@pytest.fixture
def files(honest: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(honest, tmp_path / "model"))


def version(number: int = 1, *, signature: str | None = None, model_id: str = "m-1") -> ModelVersion:
    tags = [ModelVersionTag(signing.TAG, signature)] if signature else []
    return ModelVersion("income", str(number), 0, tags=tags, source=f"models:/{model_id}")


def signed(files: Path, number: int = 1, **options: str) -> ModelVersion:
    entry = version(number, **options)
    return version(number, signature=signing.sign(files, signing._subject(entry)), **options)


@pytest.fixture
def fetch(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[ModelVersion, Path], Path]]:
    """Verify a folder as if it had been downloaded."""

    def call(entry: ModelVersion, files: Path) -> Path:
        monkeypatch.setattr("mlplatform.promotion.signing._download", lambda *_: files)
        return signing.fetch_verified(entry, files.parent)

    return call


Fetch = Callable[[ModelVersion, Path], Path]


def test_an_honest_model_is_verified_and_loaded(files: Path, fetch: Fetch) -> None:
    model = signing.load(fetch(signed(files), files))
    assert model.predict(pd.DataFrame({column: ["a", "b"] for column in COLUMNS})).tolist() == [0, 1]


def test_every_flipped_byte_is_refused(files: Path, fetch: Fetch) -> None:
    entry, mutants = signed(files), 0
    for path in (path for path in files.rglob("*") if path.is_file()):
        body = path.read_bytes()
        for at in {len(body) * step // FLIPS for step in range(FLIPS)}:
            path.write_bytes(body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :])
            with pytest.raises(UntrustedModelError, match="is not what was signed"):
                fetch(entry, files)
            mutants += 1
        path.write_bytes(body)
    assert mutants >= 50
    fetch(entry, files)


def test_every_removed_truncated_or_renamed_file_is_refused(files: Path, fetch: Fetch) -> None:
    entry = signed(files)
    for path in [path for path in files.rglob("*") if path.is_file()]:
        body, other = path.read_bytes(), path.with_name(path.name + "2")
        for change in (path.unlink, lambda path=path, body=body: path.write_bytes(body[:-1])):
            change()
            with pytest.raises(UntrustedModelError):
                fetch(entry, files)
            path.write_bytes(body)
        path.rename(other)
        with pytest.raises(UntrustedModelError):
            fetch(entry, files)
        other.rename(path)
    fetch(entry, files)


@pytest.mark.parametrize("name", ["model.pkl", "code/evil.py", "MLmodel2", ".hidden", "data/model.skops"])
def test_every_added_file_is_refused(name: str, files: Path, fetch: Fetch) -> None:
    entry = signed(files)
    (files / name).parent.mkdir(exist_ok=True)
    (files / name).write_bytes(b"")
    with pytest.raises(UntrustedModelError):
        fetch(entry, files)


def test_a_link_is_refused_even_to_the_same_bytes(files: Path, fetch: Fetch, honest: Path) -> None:
    entry = signed(files)
    (files / "model.skops").unlink()
    (files / "model.skops").symlink_to(honest / "model.skops")
    with pytest.raises(UntrustedModelError, match="no plain file"):
        fetch(entry, files)


def swap_for_pickle(files: Path, mark: Path) -> None:
    """What an attacker would do who can write to the object store."""

    class Payload:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (mark,))

    (files / "model.pkl").write_bytes(pickle.dumps(Payload()))
    (files / "model.skops").unlink()
    text = (files / "MLmodel").read_text().replace("model.skops", "model.pkl")
    (files / "MLmodel").write_text(text.replace("serialization_format: skops", "serialization_format: cloudpickle"))


def test_a_pickle_in_the_models_place_is_refused_and_never_run(files: Path, fetch: Fetch, tmp_path: Path) -> None:
    entry, mark = signed(files), tmp_path / "mark"
    swap_for_pickle(files, mark)
    with pytest.raises(UntrustedModelError):
        fetch(entry, files)
    with pytest.raises(UntrustedModelError, match="not in the skops format"):
        fetch(signed(files), files)  # even when somebody signs it
    assert not mark.exists()


def test_a_widened_list_of_trusted_types_is_refused_and_never_believed(files: Path, fetch: Fetch) -> None:
    entry = signed(files)
    text = (files / "MLmodel").read_text()
    (files / "MLmodel").write_text(
        text.replace("- sklearn.tree._tree.Tree", "- sklearn.tree._tree.Tree\n    - os.system")
    )
    with pytest.raises(UntrustedModelError):
        fetch(entry, files)


def test_a_type_that_is_not_on_our_list_is_refused_even_when_signed(
    files: Path, fetch: Fetch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlplatform.promotion.signing.TRUSTED_TYPES", [])
    with pytest.raises(UntrustedModelError, match=r"sklearn\.tree\._tree\.Tree, which are not on our list"):
        fetch(signed(files), files)


def test_a_signature_fits_one_version_of_one_model_only(files: Path, fetch: Fetch) -> None:
    signature = signed(files).tags[signing.TAG]
    for other in (version(2, signature=signature), version(1, signature=signature, model_id="m-2")):
        with pytest.raises(UntrustedModelError):
            fetch(other, files)


def test_an_honest_but_other_model_is_refused(files: Path, fetch: Fetch, tmp_path: Path) -> None:
    other = save(tmp_path / "other" / "model", depth=1)
    fetch(signed(other, 2), other)
    with pytest.raises(UntrustedModelError):
        fetch(signed(files), other)


def test_an_unsigned_version_is_refused(files: Path, fetch: Fetch) -> None:
    with pytest.raises(UntrustedModelError, match="'income' version 1 is not signed; train it"):
        fetch(version(), files)


def test_another_platforms_key_signs_nothing_here(files: Path, fetch: Fetch, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = signed(files)
    monkeypatch.setenv(signing.KEY_VARIABLE, "l" * 43)
    with pytest.raises(UntrustedModelError):
        fetch(entry, files)


@pytest.mark.parametrize("key", ["", "short"])
def test_without_a_key_nothing_is_signed_or_verified(key: str, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(signing.KEY_VARIABLE, key)
    with pytest.raises(SettingsError, match="MODEL_SIGNING_KEY"):
        signing.sign(files, "subject")
