"""What the feature store offers: a source and a view for each view of data/table.toml, and a service of all of them."""

from datetime import timedelta

from entity import TABLE, user
from feast import FeatureService, FeatureView, Field, FileSource
from feast.types import Float64, String

# One team keeps the repository; a view that another team keeps names that team.
AUTHORS = "mlplatform"
USED_BY = TABLE.model
# A value older than this is no longer offered for training. Online, `expire_online` in feature_store.yaml decides.
TTL = timedelta(days=365)
TYPES = {"category": String, "number": Float64}


def define_source(name: str) -> FileSource:
    """Say where the values of a view lie, and which column says since when they hold."""
    return FileSource(
        name=f"{name}_source",
        path=f"s3://feature-data-sets/{name}.parquet",
        timestamp_field="event_timestamp",
        description=TABLE.views[name].source,
    )


def define_view(name: str) -> FeatureView:
    """Say which columns of a source are features, and of what type."""
    return FeatureView(
        name=name,
        entities=[user],
        ttl=TTL,
        schema=[
            Field(name=TABLE.features[column], dtype=TYPES[TABLE.kinds[column]]) for column in TABLE.views[name].columns
        ],
        source=define_source(name),
        tags={"authors": AUTHORS, "description": TABLE.views[name].description, "used_by": USED_BY},
    )


views = [define_view(name) for name in TABLE.views]
# Feast registers what has a name of its own in this file.
globals().update({f"{view.name}_view": view for view in views})

# A model version names the service it was trained on. A model that needs other inputs gets a service of its own.
service = FeatureService(
    name=TABLE.service,
    features=views,
    description=f"The exact inputs of the model {TABLE.model}",
    tags={"authors": AUTHORS, "used_by": USED_BY},
)
