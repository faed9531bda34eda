"""What schemas and scanners miss. Each check takes rendered manifests and returns the problems it found."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from manifests import (
    Manifest,
    allows,
    containers,
    matches,
    name_of,
    of_kind,
    pod_labels,
    pod_spec,
    quantity_bytes,
    workloads,
)

PART_OF = "mlplatform"
COMPONENT = "app.kubernetes.io/component"
# Who must reach whom, by component and port; whatever is not listed must be refused.
TALKS = {
    ("buckets", "object-store", 9000),
    ("dask-scheduler", "dask-worker", 8788),
    ("dask-worker", "dask-scheduler", 8786),
    ("dask-worker", "dask-worker", 8788),
    ("dask-worker", "object-store", 9000),
    ("dask-worker", "online-store", 6379),
    ("drift", "object-store", 9000),
    ("drift", "online-store", 6379),
    ("drift", "tracking", 5000),
    ("endpoint", "object-store", 9000),
    ("endpoint", "online-store", 6379),
    ("endpoint", "tracking", 5000),
    ("feature-server", "object-store", 9000),
    ("feature-server", "online-store", 6379),
    ("notebooks", "dask-scheduler", 8786),
    ("notebooks", "endpoint", 3000),
    ("notebooks", "feature-server", 6566),
    ("notebooks", "object-store", 9000),
    ("notebooks", "online-store", 6379),
    ("notebooks", "tracking", 5000),
    ("schema", "database", 5432),
    ("tracking", "database", 5432),
    ("tracking", "object-store", 9000),
}
# XGBoost's workers and its tracker, which the scheduler runs: the first and the last port that Linux chooses.
TALKS |= {
    (source, target, port)
    for source, target in (
        ("dask-scheduler", "dask-worker"),
        ("dask-worker", "dask-scheduler"),
        ("dask-worker", "dask-worker"),
    )
    for port in (32768, 60999)
}
# Only where there are several nodes.
FAILOVER_TALKS = {("online-store", "online-store", 6379), ("online-store", "online-store", 26379)}
# Secrets whose name stays when their content changes, and why a server may name one all the same.
FIXED_SECRETS = {
    "dask": "the notebooks' Job's template can't change",
    "mlflow-schema": "its Job's template can't change",
    "platform-client": "the Jobs' templates can't change",
    "redis-users": "Redis reads its users again on ACL LOAD",
    "seaweedfs-identities": "SeaweedFS reads its identities again on SIGHUP",
}
HASHED = re.compile(r"-[a-z0-9]{10}$")
DEFAULT_PASSWORDS = {"admin", "changeme", "minioadmin", "minio123", "password", "password1234", "postgres", "redis"}


def check_references(manifests: list[Manifest]) -> Iterator[str]:
    """Everything named is there: Secrets and ConfigMaps with their keys, volumes, claims, Services."""
    there = {(manifest["kind"], manifest["metadata"]["name"]): manifest for manifest in manifests}
    for workload in workloads(manifests):
        where = name_of(workload)
        spec = pod_spec(workload)
        for kind, name, keys in _named_objects(workload):
            if (kind, name) not in there:
                yield f"{where} names {kind}/{name}, which is not there"
                continue
            for key in keys:
                if key not in there[kind, name].get("data", {}):
                    yield f"{where} names the key {key} of {kind}/{name}, which is not there"
        claims = {claim["metadata"]["name"] for claim in workload["spec"].get("volumeClaimTemplates", ())}
        volumes = {volume["name"] for volume in spec.get("volumes", ())} | claims
        mounted = {mount["name"] for container in containers(workload) for mount in container.get("volumeMounts", ())}
        for name in sorted(mounted - volumes):
            yield f"{where} mounts {name}, and has no such volume"
        for name in sorted(volumes - mounted):
            yield f"{where} has the volume {name}, and mounts it nowhere"
        service = workload["spec"].get("serviceName")
        if service and there.get(("Service", service), {}).get("spec", {}).get("clusterIP") != "None":
            yield f"{where} names the headless Service {service}, which is not there"
        for url in re.findall(r"(?:https?|tls)://([a-z0-9-]+):(\d+)", str(workload)):
            ports = there.get(("Service", url[0]), {}).get("spec", {}).get("ports", ())
            if int(url[1]) not in [port["port"] for port in ports]:
                yield f"{where} calls http://{url[0]}:{url[1]}, which no Service serves"


def check_ports(manifests: list[Manifest]) -> Iterator[str]:
    """Probes ask declared ports, Services lead to declared ports, every port is one."""
    for workload in workloads(manifests):
        for container in containers(workload):
            where = f"{name_of(workload)}/{container['name']}"
            declared = {port["containerPort"] for port in container.get("ports", ())}
            names = {port["name"] for port in container.get("ports", ())}
            for number in sorted(declared):
                if not 1 <= number <= 65535:
                    yield f"{where} declares port {number}"
            for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
                probe = container.get(kind, {})
                port = (probe.get("httpGet") or probe.get("tcpSocket") or {}).get("port")
                if port is not None and port not in declared | names:
                    yield f"{where}: {kind} asks port {port}, which is not declared"
    for service in of_kind(manifests, "Service"):
        for port in service["spec"]["ports"]:
            if not 1 <= port["port"] <= 65535:
                yield f"{name_of(service)} serves port {port['port']}"
            target = port.get("targetPort", port["port"])
            for workload in _selected(manifests, service["spec"]["selector"]):
                declared = {
                    name
                    for container in containers(workload)
                    for entry in container.get("ports", ())
                    for name in (entry["name"], entry["containerPort"])
                }
                if target not in declared:
                    yield f"{name_of(service)} leads to port {target}, which {name_of(workload)} does not declare"
    for ingress in of_kind(manifests, "Ingress"):
        for rule in ingress["spec"]["rules"]:
            for path in rule["http"]["paths"]:
                backend = path["backend"]["service"]
                services = {service["metadata"]["name"]: service for service in of_kind(manifests, "Service")}
                ports = services.get(backend["name"], {}).get("spec", {}).get("ports", ())
                if backend["port"].get("name") not in [port["name"] for port in ports]:
                    yield f"{name_of(ingress)} leads to {backend['name']}, which has no such port"


def check_selectors(manifests: list[Manifest]) -> Iterator[str]:
    """Every selector finds what it means, and nothing else."""
    for workload in workloads(manifests):
        selector = workload["spec"].get("selector")
        if selector and not matches(selector, pod_labels(workload)):
            yield f"{name_of(workload)} does not select its own pods"
    for service in of_kind(manifests, "Service"):
        found = _selected(manifests, service["spec"]["selector"])
        if len(found) != 1:
            yield f"{name_of(service)} selects {len(found)} workloads"
    for budget in of_kind(manifests, "PodDisruptionBudget"):
        found = _selected(manifests, budget["spec"]["selector"]["matchLabels"])
        if len(found) != 1:
            yield f"{name_of(budget)} selects {len(found)} workloads"
        elif found[0]["spec"]["replicas"] < 2:
            yield f"{name_of(budget)} guards a single pod, and so blocks every drain of its node"
    for policy in of_kind(manifests, "NetworkPolicy"):
        selector = policy["spec"]["podSelector"]
        if not any(matches(selector, pod_labels(workload)) for workload in workloads(manifests)):
            yield f"{name_of(policy)} selects nothing"
    # The target of a Service that is found by name is the pod behind it: two owners of a pod would fight over it.
    names = [pod_labels(workload)["app.kubernetes.io/name"] for workload in workloads(manifests)]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"two workloads are called {name}"


def check_quantities(manifests: list[Manifest]) -> Iterator[str]:
    """CPU, memory and sizes parse, no request is above its limit, and every container has a memory limit."""
    for workload in workloads(manifests):
        for container in containers(workload):
            where = f"{name_of(workload)}/{container['name']}"
            resources = container.get("resources", {})
            requests, limits = resources.get("requests", {}), resources.get("limits", {})
            if "memory" not in limits or "memory" not in requests or "cpu" not in requests:
                yield f"{where} lacks a memory limit, or a request for memory or CPU"
                continue
            if not re.fullmatch(r"\d+m?", str(requests["cpu"])):
                yield f"{where} asks for {requests['cpu']!r} CPU"
            try:
                if quantity_bytes(requests["memory"]) > quantity_bytes(limits["memory"]):
                    yield f"{where} asks for more memory than its limit"
            except ValueError as error:
                yield f"{where}: {error}"
        sizes = [volume.get("emptyDir", {}).get("sizeLimit") for volume in pod_spec(workload).get("volumes", ())]
        sizes += [claim["spec"]["resources"]["requests"]["storage"] for claim in _claims(workload)]
        for size in filter(None, sizes):
            try:
                quantity_bytes(size)
            except ValueError as error:
                yield f"{name_of(workload)}: {error}"
        for volume in pod_spec(workload).get("volumes", ()):
            if "emptyDir" in volume and not volume["emptyDir"].get("sizeLimit"):
                yield f"{name_of(workload)}: the volume {volume['name']} may fill its node"


def check_passwords(manifests: list[Manifest]) -> Iterator[str]:
    """No value of a secret is written anywhere but in a Secret, and none is one that is known."""
    values = set()
    for secret in of_kind(manifests, "Secret"):
        for key, encoded in secret.get("data", {}).items():
            value = base64.b64decode(encoded).decode()
            if value.lower() in DEFAULT_PASSWORDS:
                yield f"{name_of(secret)}: {key} is a default that everyone knows"
            if re.search(r"PASSWORD|SECRET|JWT", key) and len(value) < 24:
                yield f"{name_of(secret)}: {key} is short"
            values |= {word for word in re.findall(r"[\w-]{24,}", value) if word.startswith("p")}
    for manifest in manifests:
        if manifest["kind"] != "Secret":
            for value in sorted(values):
                if value in str(manifest):
                    yield f"{name_of(manifest)} holds a secret's value"
    for workload in workloads(manifests):
        for container in containers(workload):
            for entry in container.get("env", ()):
                if re.search(r"PASSWORD|SECRET|ACCESS_KEY|JWT|TOKEN", entry["name"]) and "value" in entry:
                    yield f"{name_of(workload)}/{container['name']}: {entry['name']} is written out"


def check_network(manifests: list[Manifest]) -> Iterator[str]:
    """Every pair of components that must talk may, and no other."""
    policies = of_kind(manifests, "NetworkPolicy")
    expected = TALKS | (FAILOVER_TALKS if _failover(manifests) else set())
    ports = sorted({port for _, _, port in expected} | {22, 80, 443, 8080, 8404, 32767, 61000})
    for source in workloads(manifests):
        for target in workloads(manifests):
            for port in ports:
                pair = (pod_labels(source)[COMPONENT], pod_labels(target)[COMPONENT], port)
                may = allows(policies, pod_labels(source), pod_labels(target), port)
                if may != (pair in expected):
                    yield f"{pair[0]} {'may' if may else 'may not'} reach {pair[1]}:{port}"
    for component in sorted({pod_labels(workload)[COMPONENT] for workload in workloads(manifests)}):
        if not any(component in pair for pair in expected):
            yield f"{component} is in no pair that must talk"
    for policy in policies:
        for rule in (*policy["spec"].get("ingress", ()), *policy["spec"].get("egress", ())):
            if not rule.get("ports") or not (rule.get("from") or rule.get("to")):
                yield f"{name_of(policy)} opens everything"


def check_restricted(manifests: list[Manifest]) -> Iterator[str]:
    """The fields that Pod Security's restricted level asks for, and those that we ask for beyond it."""
    for namespace in of_kind(manifests, "Namespace"):
        for mode in ("enforce", "audit", "warn"):
            if namespace["metadata"]["labels"].get(f"pod-security.kubernetes.io/{mode}") != "restricted":
                yield f"{name_of(namespace)} does not {mode} restricted"
    for workload in workloads(manifests):
        spec = pod_spec(workload)
        context = spec.get("securityContext", {})
        yield from _unless(
            name_of(workload),
            {
                "runs as root": context.get("runAsNonRoot") is True and context.get("runAsUser", 0) > 0,
                "has no seccomp profile": context.get("seccompProfile") == {"type": "RuntimeDefault"},
                "gets a token": spec.get("automountServiceAccountToken") is False,
                "gets service links": spec.get("enableServiceLinks") is False,
                "shares the node": not {"hostNetwork", "hostPID", "hostIPC"} & set(spec),
                "mounts the node": not any("hostPath" in volume for volume in spec.get("volumes", ())),
            },
        )
        for container in containers(workload):
            own = container.get("securityContext", {})
            yield from _unless(
                f"{name_of(workload)}/{container['name']}",
                {
                    "may escalate": own.get("allowPrivilegeEscalation") is False,
                    "may write its root": own.get("readOnlyRootFilesystem") is True,
                    "keeps capabilities": own.get("capabilities") == {"drop": ["ALL"]},
                    "is privileged": not own.get("privileged"),
                    "overrides its pod": not {"runAsUser", "runAsNonRoot", "seccompProfile"} & set(own),
                },
            )


def check_probes(manifests: list[Manifest]) -> Iterator[str]:
    """Every server has its three probes; MLflow's ask the one path that needs neither login nor a known host."""
    for workload in of_kind(manifests, "Deployment", "StatefulSet"):
        for container in pod_spec(workload)["containers"]:
            where = f"{name_of(workload)}/{container['name']}"
            kinds = {kind for kind in ("readinessProbe", "livenessProbe") if kind not in container}
            for kind in sorted(kinds):
                yield f"{where} has no {kind}"
            for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
                path = container.get(kind, {}).get("httpGet", {}).get("path")
                if container["name"] == "mlflow" and path != "/health":
                    yield f"{where}: {kind} asks {path}"


def check_jobs(manifests: list[Manifest]) -> Iterator[str]:
    """A Job names only what keeps its name, and a server only what does not, unless it reads changes by itself."""
    for workload in workloads(manifests):
        for kind, name, _ in _named_objects(workload):
            hashed = bool(HASHED.search(name))
            if workload["kind"] == "Job" and hashed:
                yield f"{name_of(workload)} names {kind}/{name}, and so can't be applied again once that changed"
            if workload["kind"] != "Job" and kind == "Secret" and not hashed and name not in FIXED_SECRETS:
                yield f"{name_of(workload)} would not notice that {kind}/{name} changed"
        if workload["kind"] == "Job" and "ttlSecondsAfterFinished" not in workload["spec"]:
            yield f"{name_of(workload)} stays forever"


def check_images(manifests: list[Manifest]) -> Iterator[str]:
    """Every image has a registry and a version, and the same image has the same version everywhere."""
    versions: dict[str, set[str]] = {}
    for workload in workloads(manifests):
        for container in containers(workload):
            image = container["image"]
            name, _, tag = image.partition("@")[0].rpartition(":")
            where = f"{name_of(workload)}/{container['name']}"
            if not name or "/" in tag or not re.search(r"\d+\.\d+|\d{4}-\d\d-\d\d", tag):
                yield f"{where}: {image} has no version"
            if "/" not in name and name != PART_OF:
                yield f"{where}: {image} names no registry"
            versions.setdefault(name, set()).add(tag)
    for name, tags in versions.items():
        if len(tags) > 1:
            yield f"{name} is used in the versions {', '.join(sorted(tags))}"


def check_labels(manifests: list[Manifest]) -> Iterator[str]:
    """The standard labels are on everything, and everything is in one namespace."""
    for manifest in manifests:
        labels = manifest["metadata"].get("labels", {})
        if labels.get("app.kubernetes.io/part-of") != PART_OF:
            yield f"{name_of(manifest)} is part of nothing"
        if manifest["kind"] != "Namespace" and manifest["metadata"].get("namespace") != PART_OF:
            yield f"{name_of(manifest)} is in another namespace"
    for manifest in (*workloads(manifests), *of_kind(manifests, "Service", "PodDisruptionBudget")):
        if not {"app.kubernetes.io/name", COMPONENT} <= set(manifest["metadata"]["labels"]):
            yield f"{name_of(manifest)} has no name or component"


def check_allowed_hosts(manifests: list[Manifest]) -> Iterator[str]:
    """MLflow accepts every name under which it is reached, with and without a port, and no pattern for all."""
    for workload in workloads(manifests):
        for container in containers(workload):
            environment = {entry["name"]: entry.get("value", "") for entry in container.get("env", ())}
            if "ALLOWED_HOSTS" not in environment:
                continue
            given = environment["ALLOWED_HOSTS"].split(",")
            names = ["mlflow", "mlflow.mlplatform", "mlflow.mlplatform.svc", "mlflow.mlplatform.svc.cluster.local"]
            wanted = [pattern for name in (*names, "localhost", "127.0.0.1") for pattern in (name, f"{name}:*")]
            wanted += [rule["host"] for ingress in of_kind(manifests, "Ingress") for rule in ingress["spec"]["rules"]]
            for host in sorted(set(wanted) - set(given)):
                yield f"{name_of(workload)} refuses the name {host}"
            origins = str(environment.get("MLFLOW_SERVER_CORS_ALLOWED_ORIGINS")).split(",")
            for ingress in of_kind(manifests, "Ingress"):
                for rule in ingress["spec"]["rules"]:
                    if f"https://{rule['host']}" not in origins:
                        yield f"{name_of(workload)} refuses what browsers send from https://{rule['host']}"
            for host in sorted({"*", "*:*"} & set(given)):
                yield f"{name_of(workload)} accepts every name ({host})"


CHECKS = (
    check_references,
    check_ports,
    check_selectors,
    check_quantities,
    check_passwords,
    check_network,
    check_restricted,
    check_probes,
    check_jobs,
    check_images,
    check_labels,
    check_allowed_hosts,
)


def problems(manifests: list[Manifest]) -> list[str]:
    return [problem for check in CHECKS for problem in check(manifests)]


def _unless(where: str, facts: Mapping[str, bool]) -> Iterator[str]:
    for problem, fine in facts.items():
        if not fine:
            yield f"{where} {problem}"


def _selected(manifests: Iterable[Manifest], labels: Mapping[str, str]) -> list[Manifest]:
    # The controller adds this label to each pod of a StatefulSet.
    wanted = {key: value for key, value in labels.items() if key != "statefulset.kubernetes.io/pod-name"}
    return [workload for workload in workloads(manifests) if matches({"matchLabels": wanted}, pod_labels(workload))]


def _failover(manifests: Iterable[Manifest]) -> bool:
    return any(workload["metadata"]["name"] == "redis-proxy" for workload in workloads(manifests))


def _claims(workload: Manifest) -> list[dict[str, Any]]:
    return list(workload["spec"].get("volumeClaimTemplates", ()))


def _named_objects(workload: Manifest) -> Iterator[tuple[str, str, list[str]]]:
    """Give kind, name and keys of every object that a workload's pods name."""
    for container in containers(workload):
        for source in container.get("envFrom", ()):
            for kind, reference in (("Secret", source.get("secretRef")), ("ConfigMap", source.get("configMapRef"))):
                if reference and not reference.get("optional"):
                    yield kind, reference["name"], []
        for entry in container.get("env", ()):
            reference = entry.get("valueFrom", {}).get("secretKeyRef")
            if reference:
                yield "Secret", reference["name"], [reference["key"]]
    for volume in pod_spec(workload).get("volumes", ()):
        if "secret" in volume and not volume["secret"].get("optional"):
            yield "Secret", volume["secret"]["secretName"], [item["key"] for item in volume["secret"].get("items", ())]
        if "configMap" in volume:
            yield "ConfigMap", volume["configMap"]["name"], []
        if "persistentVolumeClaim" in volume:
            yield "PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"], []
