"""The alert rules ask for figures that the endpoint and the drift watch give, under the names that they have."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from mlplatform_serving import metrics

RULES = Path(__file__).parents[2] / "deploy" / "monitoring" / "alerts.yaml"


def test_every_figure_of_the_endpoint_that_a_rule_names_is_on_its_page() -> None:
    groups = {group["name"]: group["rules"] for group in yaml.safe_load(RULES.read_text())["groups"]}
    asked = {name for rule in groups["endpoint"] for name in re.findall(r"\bendpoint_\w+", rule["expr"])}
    assert {"endpoint_feature_age_seconds_bucket", "endpoint_requests_total"} <= asked
    kinds = dict(re.findall(r"^# TYPE (\w+) (\w+)$", metrics.page().decode(), re.MULTILINE))
    endings = {"histogram": ("_bucket", "_count", "_sum"), "counter": ("",), "gauge": ("",)}
    given = {name + ending for name, kind in kinds.items() for ending in endings[kind]}
    assert asked <= given, asked - given
