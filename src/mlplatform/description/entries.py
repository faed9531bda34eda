"""What `data/table.toml` may say of a table, what follows from that, and which entries contradict each other."""

from __future__ import annotations

import re
import tomllib
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError, model_validator

from mlplatform.errors import DataError, MissingObjectError


class Target(BaseModel, frozen=True, extra="forbid"):
    """What the model predicts: a column that holds one of two values."""

    column: str
    positive: str
    negative: str


class Entity(BaseModel, frozen=True, extra="forbid"):
    """Whom a row is about, since when, and where both come from: the file, nowhere, or the rules for the census."""

    name: str
    key: str
    time: str
    history: Literal["census", "file", "invented"]
    start: date
    end: date


class View(BaseModel, frozen=True, extra="forbid"):
    """A feature view: its columns, and what people read of it and of its file."""

    columns: tuple[str, ...]
    description: str = "described nowhere"
    source: str = "A parquet file in the object store"


class Table(BaseModel, frozen=True, extra="forbid"):
    """A description, as `data/table.toml` gives it; the file that is shipped says what each entry means."""

    folder: Path
    name: str = Field(pattern=r"^[A-Za-z][\w-]*$")
    file: str
    model: str = Field(pattern=r"^[\w .-]+$")  # MLflow's filters put it between quotes
    kinds: dict[str, Literal["category", "number"]] = Field(alias="columns", min_length=1)
    target: Target
    entity: Entity
    views: dict[str, View] = {}
    groups: tuple[str, ...] = ()
    texts: dict[str, str] = {}

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """The model's inputs."""
        return tuple(self.kinds)

    @cached_property
    def numbers(self) -> tuple[str, ...]:
        """The inputs that are numbers; all of them are floats."""
        return tuple(column for column, kind in self.kinds.items() if kind == "number")

    @cached_property
    def categories(self) -> tuple[str, ...]:
        """The inputs that are text."""
        return tuple(column for column, kind in self.kinds.items() if kind == "category")

    @cached_property
    def features(self) -> dict[str, str]:
        """The feature of each column."""
        return {column: feature_name(column) for column in self.kinds}

    @property
    def experiment(self) -> str:
        """MLflow's experiment of the training runs."""
        return f"{self.name}-classifier"

    @property
    def service(self) -> str:
        """The feature service that offers the model's exact inputs."""
        return f"{feature_name(self.name)}_v1"

    @property
    def usual_texts(self) -> dict[str, str]:
        """What can be said to people where `texts` says nothing."""
        is_positive = f"{self.target.column} is {self.target.positive}"
        return {
            "model": f"Probability that {is_positive}, from {len(self.kinds)} columns.",
            "does": f"It gives the probability that {is_positive}.",
            "purpose": "Nobody has said: `purpose` is missing among the texts of data/table.toml.",
            "data": f"{self.file}.",
            "inputs": f"It knows {len(self.kinds)} columns.",
            "positives": f"rows whose {is_positive}",
            "rows": "rows",
            "entity": f"What {self.entity.key} names",
            "project": f"Features of {self.name}",
            "restore": "correct it, or data/table.toml",
        }

    def text(self, what: str) -> str:
        """Give a text for people."""
        return (self.usual_texts | self.texts)[what]

    def only_census(self, what: str) -> None:
        """Refuse what is told about the census, and would be wrong about any other table.

        Raises:
            DataError: The table is another one.
        """
        if self.entity.history != "census":
            raise DataError(f"{what} is for the census and not for {self.name!r}; see docs/your-own-data.md")

    @model_validator(mode="before")
    @classmethod
    def _one_view_for_all(cls, said: dict[str, Any]) -> dict[str, Any]:
        whole = {feature_name(str(said.get("name"))): {"columns": list(said.get("columns", ()))}}
        return {"views": whole, **said}

    @model_validator(mode="after")
    def _agrees(self) -> Table:
        entity, names = self.entity, list(self.features.values())
        taken = {self.target.column, entity.key, entity.time, "event_timestamp"}
        viewed = [column for view in self.views.values() for column in view.columns]
        wrong = {
            "the target's two values are one": self.target.positive == self.target.negative,
            "start is not before end": entity.start >= entity.end,
            "the target, the key or the time is a column too": not taken.isdisjoint([*names, *self.kinds]),
            "a column's name does not begin with a letter": not all(name.isidentifier() for name in names),
            "the key or a view is no single word": not all(name.isidentifier() for name in (entity.key, *self.views)),
            "two columns differ in blanks and signs only": len(set(names)) < len(names),
            "the views do not hold each column once": sorted(viewed) != sorted(self.kinds),
            "a group is no category": not set(self.groups) <= set(self.categories),
            "texts has an entry that nobody reads": not set(self.texts) <= set(self.usual_texts),
        }
        if found := next((problem for problem, holds in wrong.items() if holds), None):
            raise ValueError(found)
        return self


def feature_name(column: str) -> str:
    """Give a name that needs no quotes in SQL: whatever is no letter, digit or underscore becomes an underscore."""
    return re.sub(r"\W+", "_", column)


def describe(path: Path) -> Table:
    """Read a description; the table's own file lies beside it.

    Raises:
        MissingObjectError: There is no such file.
        DataError: It is no TOML, something is missing, unknown or of another kind, or it contradicts itself.
    """
    try:
        return Table(folder=path.parent, **tomllib.loads(path.read_text()))
    except FileNotFoundError as error:
        raise MissingObjectError(f"{path} is not there; write it as docs/your-own-data.md shows") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = f"{'.'.join(map(str, first['loc']))}: " if first["loc"] else ""
        raise DataError(f"{path} says {where}{first['msg']}; docs/your-own-data.md shows what it holds") from error
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path} cannot be read as TOML ({error}); correct it") from error
