"""Whom the features are about."""

from feast import Entity, Project, ValueType

project = Project(name="income", description="Features of people in the 1994 census, for teaching")

user = Entity(
    name="user",
    join_keys=["user_id"],
    value_type=ValueType.STRING,
    description="A person in the census-income data, named by a UUID",
)
