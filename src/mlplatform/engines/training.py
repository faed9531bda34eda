"""Fit a pipeline here, or its XGBoost on a Dask cluster; what comes out is a plain pipeline either way."""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pandas as pd
from sklearn.base import BaseEstimator
from sklearn.compose import ColumnTransformer
from sklearn.pipeline import Pipeline

from mlplatform import objectstore
from mlplatform.engines.cluster import cluster, scheduler_of, split_rows
from mlplatform.errors import DataError, ServiceDownError, SettingsError
from mlplatform.modeling import inputs, labels

# Settings of XGBClassifier that are for its own `fit`.
NOT_DISTRIBUTED = ("callbacks", "early_stopping_rounds", "feature_types", "feature_weights")
MEET_S = 60  # in which all workers must have begun; one that waits for a lost one is busy until then
NOTICED_S = 3  # in which a scheduler notices that a worker is gone


@contextmanager
def fitting(engine: str, estimator: BaseEstimator) -> Iterator[Callable[[Pipeline, pd.DataFrame, str], Pipeline]]:
    """Give a function that fits a pipeline to rows of which it is told the address too, once it is known that it can.

    Args:
        engine: One of `EngineName`.
        estimator: What comes after the encoder.

    Raises:
        SettingsError: There is no such engine, it cannot train this estimator, or as in `cluster`.
        ServiceDownError: As in `cluster`.
    """
    scheduler = scheduler_of(engine)
    if not scheduler:
        yield lambda model, train, _: model.fit(inputs(train), labels(train))
        return
    _check(estimator)
    with cluster(scheduler) as client:
        yield partial(fit, client)


def _check(estimator: BaseEstimator) -> None:
    from xgboost import XGBClassifier

    if type(estimator) is not XGBClassifier:
        kind = type(estimator).__name__
        raise SettingsError(f"the engine 'dask' trains an XGBClassifier and no {kind}; give engine='local'")
    given = [
        name
        for name, value in estimator.get_params().items()
        if callable(value) or (name in NOT_DISTRIBUTED and value is not None)
    ]
    if given:
        raise SettingsError(
            f"the engine 'dask' trains without {', '.join(given)}; leave it out, or give engine='local'"
        )


def fit(client: Any, model: Pipeline, train: pd.DataFrame, uri: str) -> Pipeline:
    """Fit the encoder here and XGBoost on a cluster, by its own distributed training.

    Each worker reads the data set from the object store, compares its bytes with the digest in its name, and encodes
    and keeps its part of the rows: no row goes from this process to a worker. It trains with its own threads, whatever
    `n_jobs` says. XGBoost adds up the workers' histograms in connections of its own between them, without encryption.

    Args:
        client: What `cluster` gave.
        model: A pipeline of `modeling.make_pipeline` with an `XGBClassifier`.
        train: The rows to fit on.
        uri: Where the same rows are in the object store.

    Returns:
        The same pipeline, fitted, without a trace of Dask.

    Raises:
        DataError: The rows are not in the object store.
        ServiceDownError: The cluster lost a worker, which XGBoost's training does not survive.
    """
    import dask.dataframe as dd
    from distributed import wait
    from distributed.comm import get_address_host
    from xgboost.collective import Config
    from xgboost.dask import DaskDMatrix, DaskQuantileDMatrix
    from xgboost.dask import train as train_booster

    if not uri.startswith("s3://"):
        raise DataError(f"the training rows are at {uri or 'no address'}; store them with tracking.write_datasets")
    encoder, estimator = model.named_steps["encoder"], model.named_steps["estimator"]
    encoded = encoder.fit(inputs(train)).transform(inputs(train.head(1)))
    known = client.scheduler_info()
    # In the order of XGBoost's ranks, so that the same cluster trains the same model again.
    workers = sorted(known["workers"], key=lambda address: str(known["workers"][address]["name"]))
    parts = [
        client.submit(read_part, uri, encoder, rows, pure=False, workers=[worker], allow_other_workers=True)
        for worker, rows in zip(workers, split_rows(range(len(train)), len(workers)), strict=False)
    ]
    columns, target = (
        dd.from_delayed([client.submit(operator.getitem, part, place) for part in parts], meta=meta, verify_meta=False)
        for place, meta in enumerate((encoded.head(0), pd.Series(labels(train.head(0)))))
    )
    binned = estimator.tree_method in (None, "auto", "hist")
    # Dask's `wait` and XGBoost ask for the client of the context.
    with client.as_current(), _noticing_lost_workers(client, workers):
        for part in wait(parts).done:
            if part.status == "error":
                part.result()  # raises what went wrong, which XGBoost would not say
        data = (DaskQuantileDMatrix if binned else DaskDMatrix)(
            client, columns, target, missing=estimator.missing, **({"max_bin": estimator.max_bin} if binned else {})
        )
        trained = train_booster(
            client,
            {name: value for name, value in estimator.get_xgb_params().items() if name != "n_jobs"},
            data,
            estimator.get_num_boosting_rounds(),
            # By itself XGBoost's tracker listens on another address than the scheduler.
            coll_cfg=Config(tracker_host_ip=get_address_host(known["address"]), tracker_timeout=MEET_S),
        )
    trained["booster"].set_param({"nthread": estimator.n_jobs or 0})
    # What `XGBClassifier.fit` leaves; its `load_model` would also change parameters.
    estimator._Booster, estimator.n_classes_ = trained["booster"], 2
    return model


def read_part(uri: str, encoder: ColumnTransformer, rows: range) -> tuple[pd.DataFrame, pd.Series[int]]:
    """Read a part of a data set and encode it; this is what a worker does."""
    part = objectstore.read_frame(uri).iloc[rows.start : rows.stop]
    encoded = encoder.transform(inputs(part))
    return encoded, pd.Series(labels(part), index=encoded.index)


@contextmanager
def _noticing_lost_workers(client: Any, workers: list[str]) -> Iterator[None]:
    """Say that a worker was lost where one was, whatever XGBoost and Dask each say of it."""
    from distributed.client import FutureCancelledError
    from xgboost.core import XGBoostError

    try:
        yield
    except (FutureCancelledError, XGBoostError, AssertionError, RuntimeError, ValueError) as error:
        deadline = time.monotonic() + NOTICED_S
        while set(workers) <= set(client.nthreads()):
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
        raise ServiceDownError(
            "the Dask cluster lost a worker while XGBoost trained, which its training does not survive; run it again"
        ) from error
