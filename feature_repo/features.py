"""What the feature store offers: three sources, three views, and the service that names a model's exact inputs."""

from datetime import timedelta

from entity import user
from feast import FeatureService, FeatureView, Field, FileSource
from feast.types import String

# One team keeps the repository; a view that another team keeps names that team.
AUTHORS = "mlplatform"
USED_BY = "income-above-50k"
# A value older than this is no longer offered for training. Online, `expire_online` in feature_store.yaml decides.
TTL = timedelta(days=365)

demographic_source = FileSource(
    name="demographic_source",
    path="s3://feature-data-sets/demographic.parquet",
    timestamp_field="event_timestamp",
    description="Sex, race and country of birth, as parquet in the object store",
)

relationship_source = FileSource(
    name="relationship_source",
    path="s3://feature-data-sets/relationship.parquet",
    timestamp_field="event_timestamp",
    description="Marital status and role in the household, as parquet in the object store",
)

occupation_source = FileSource(
    name="occupation_source",
    path="s3://feature-data-sets/occupation.parquet",
    timestamp_field="event_timestamp",
    description="Employer, education and occupation, as parquet in the object store",
)

demographic = FeatureView(
    name="demographic",
    entities=[user],
    ttl=TTL,
    schema=[
        Field(name="Sex", dtype=String),
        Field(name="Race", dtype=String),
        Field(name="Native_country", dtype=String),
    ],
    source=demographic_source,
    tags={
        "authors": AUTHORS,
        "description": "What never changes about a user; sensitive, see data/README.md",
        "used_by": USED_BY,
    },
)

relationship = FeatureView(
    name="relationship",
    entities=[user],
    ttl=TTL,
    schema=[
        Field(name="Marital_Status", dtype=String),
        Field(name="Relationship", dtype=String),
    ],
    source=relationship_source,
    tags={
        "authors": AUTHORS,
        "description": "Whom a user lives with, and how",
        "used_by": USED_BY,
    },
)

occupation = FeatureView(
    name="occupation",
    entities=[user],
    ttl=TTL,
    schema=[
        Field(name="Workclass", dtype=String),
        Field(name="Education", dtype=String),
        Field(name="Occupation", dtype=String),
    ],
    source=occupation_source,
    tags={
        "authors": AUTHORS,
        "description": "What a user learned and does for a living",
        "used_by": USED_BY,
    },
)

# A model version names the service it was trained on. A model that needs other inputs gets a service of its own.
income_v1 = FeatureService(
    name="income_v1",
    features=[demographic, relationship, occupation],
    description="The exact inputs of the model income-above-50k",
    tags={"authors": AUTHORS, "used_by": USED_BY},
)
