"""Make every call of Feast's that reads or writes files, on a store in the object store."""

import os
import sys
from pathlib import Path

import pandas as pd
import pyarrow as pa
from feast import Entity, FeatureService, FeatureView, PushSource, ValueType
from feast.data_source import PushMode
from feast.feature_logging import LoggingConfig
from feast.infra.offline_stores.file_source import FileLoggingDestination, SavedDatasetFileStorage
from shop import FEBRUARY, JANUARY, MARCH, Shop

from mlplatform.settings import find_settings


def note(event: str, arguments: tuple[object, ...]) -> None:
    """Write down each name that Python looks up."""
    if event == "socket.getaddrinfo":
        with Path(os.environ["NAMES_ASKED"]).open("a") as file:
            file.write(f"{arguments[0]}\n")


sys.addaudithook(note)
shop = Shop("ours on S3", Path(sys.argv[1]), find_settings())
data = pd.DataFrame({"user_id": ["a", "b"], "at": [JANUARY, FEBRUARY], "n": [1, 2]})
source = shop.source("v", data)
user = Entity(name="user", join_keys=["user_id"], value_type=ValueType.STRING)
view = FeatureView(name="v", entities=[user], source=PushSource(name="push", batch_source=source))
provider = shop.store._get_provider()
provider.validate_data_source(shop.config, source)
assert dict(provider.get_table_column_names_and_types_from_data_source(shop.config, source))["n"] == "int64"
shop.store.apply([user, view])  # infers the schema
asked = pd.DataFrame({"user_id": ["a"], "event_timestamp": [MARCH]})
job = shop.store.get_historical_features(asked, ["v:n"])
assert job.to_df()["n"].tolist() == [1]
shop.store.create_saved_dataset(job, "saved", SavedDatasetFileStorage(path=shop.path("saved.parquet")))
assert len(shop.store.get_saved_dataset("saved").to_df()) == 1
shop.materialise()
shop.store.materialize_incremental(MARCH.to_pydatetime())
shop.store.push("push", data.assign(at=MARCH, n=3), to=PushMode.ONLINE_AND_OFFLINE)
assert shop.online(["v:n"], {"user_id": "a"})["n"] == [3]
shop.store.write_to_offline_store("v", data.assign(n=[7, 8]))
start, end = JANUARY.to_pydatetime(), MARCH.to_pydatetime()
assert len(shop.store.get_historical_features(None, ["v:n"], start_date=start, end_date=end).to_df()) == 4
pulled = provider.offline_store.pull_all_from_table_or_query(shop.config, source, ["user_id"], ["n"], "at")
assert len(pulled.to_df()) == 6
destination = FileLoggingDestination(path=shop.path("logs"))
service = FeatureService(name="s", features=[view], logging_config=LoggingConfig(destination=destination))
shop.store.apply([service])
logs = pa.table({"user_id": ["a"], "n": [1], "__log_timestamp": pa.array([MARCH], pa.timestamp("us", "UTC"))})
provider.offline_store.write_logged_features(shop.config, logs, None, service.logging_config, shop.store.registry)
assert provider.offline_store.get_monitoring_max_timestamp(shop.config, source, "at")
assert provider.offline_store.compute_monitoring_metrics(shop.config, source, [("n", "numeric")], "at")
