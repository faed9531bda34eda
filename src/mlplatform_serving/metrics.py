"""What the endpoint counts, for Prometheus."""

from __future__ import annotations

import time
from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from mlplatform.serving.predictor import Prediction, Predictor

_DAY_S = 86_400.0

# A registry of its own: BentoML and others write into the default one.
REGISTRY = CollectorRegistry()
REQUESTS = Counter("endpoint_requests", "Requests answered", ("path", "status"), registry=REGISTRY)
SECONDS = Histogram(
    "endpoint_request_seconds",
    "Time from a request's first byte to the answer's last, in seconds",
    ("path",),
    buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0),
    registry=REGISTRY,
)
PREDICTIONS = Counter("endpoint_predictions", "Scores given, by version of the model", ("version",), registry=REGISTRY)
UNKNOWN = Counter("endpoint_unknown_users", "Users of whom the online store holds nothing", registry=REGISTRY)
MODEL = Gauge("endpoint_model_version", "Version of the champion that is loaded; 0 for none", registry=REGISTRY)
AGE = Histogram(
    "endpoint_feature_age_seconds",
    "Age of the oldest online feature used for a score, in seconds",
    buckets=(3_600.0, _DAY_S, 7 * _DAY_S, 30 * _DAY_S, 90 * _DAY_S, 365 * _DAY_S, 730 * _DAY_S, 1_460 * _DAY_S),
    registry=REGISTRY,
)


COMPARED = Gauge("endpoint_shadow_compared", "Scores of the challenger held against the champion's", registry=REGISTRY)
DIFFERENCE = Gauge("endpoint_shadow_difference", "Greatest difference between the two", registry=REGISTRY)
NOT_MIRRORED = Gauge("endpoint_shadow_skipped", "Requests that the challenger was too slow for", registry=REGISTRY)
NOT_LOGGED = Gauge("endpoint_log_dropped", "Rows that the log or the shadow's had no room for", registry=REGISTRY)


def follow(predictor: Predictor) -> None:
    """Let the figures of the model, of the shadow and of the logs be read when somebody asks."""
    MODEL.set_function(lambda: predictor.version)
    COMPARED.set_function(lambda: predictor.compared)
    DIFFERENCE.set_function(lambda: predictor.greatest_difference)
    NOT_MIRRORED.set_function(lambda: predictor.not_mirrored)
    NOT_LOGGED.set_function(lambda: predictor.not_logged)


def count(predictions: Sequence[Prediction]) -> None:
    """Count what one request was answered."""
    now = time.time()
    for prediction in predictions:
        if prediction.score is None:
            UNKNOWN.inc()
            continue
        PREDICTIONS.labels(str(prediction.version)).inc()
        if prediction.oldest:
            AGE.observe(now - prediction.oldest)


def page() -> bytes:
    """Give all figures in Prometheus' text form."""
    return generate_latest(REGISTRY)
