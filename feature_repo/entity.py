"""Whom the features are about."""

from feast import Entity, Project, ValueType

from mlplatform import table

# What data/table.toml says of the table: its columns, which views they are in, and the texts for Feast's UI.
TABLE = table.current()

project = Project(name="income", description=TABLE.text("project"))

user = Entity(
    name=TABLE.entity.name,
    join_keys=[TABLE.entity.key],
    value_type=ValueType.STRING,
    description=TABLE.text("entity"),
)
