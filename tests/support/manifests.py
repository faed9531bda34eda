"""Render overlays and component combinations, and read what was rendered as Kubernetes would."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from mlplatform_ops.cluster.credentials import changed_values, write_secrets

DEPLOY = Path(__file__).parents[2] / "deploy"
KUBECTL = Path(sys.executable).parent / "kubectl"
Manifest = dict[str, Any]
NAMESPACE = "kubernetes.io/metadata.name"  # a label that Kubernetes gives a namespace; here pods of others have it
OURS = "mlplatform"
# Which generated secrets a component needs beside those of the local overlay; the entries are production's, or these.
COMPONENT_SECRETS = {
    "seaweedfs": ("seaweedfs-identities", "seaweedfs-signing"),
    "postgres": ("postgres", "mlflow-database", "mlflow-schema"),
    "dask": ("dask",),
}
# Those of what no overlay has, as the README has them.
OPTIONAL_SECRETS = ({"name": "dask", "files": ["secrets/dask.yaml"], "options": {"disableNameSuffixHash": True}},)


def compose(folder: Path, *, overlay: str = "local", components: Iterable[str] = ()) -> Path:
    """Copy the manifests, add components to an overlay and generate its secrets.

    Returns:
        The overlay's folder in the copy.
    """
    shutil.copytree(DEPLOY, folder / "deploy", ignore=shutil.ignore_patterns("secrets"))
    path = folder / "deploy" / "overlays" / overlay
    file = path / "kustomization.yaml"
    kustomization = yaml.safe_load(file.read_text())
    production = yaml.safe_load((DEPLOY / "overlays" / "production" / "kustomization.yaml").read_text())
    generators = {entry["name"]: entry for entry in (*production["secretGenerator"], *OPTIONAL_SECRETS)}
    for component in components:
        reference = f"../../components/{component}"
        if reference not in kustomization["components"]:
            # Feast and the notebooks patch nothing; what replaces something comes first.
            kustomization["components"].append(reference)
            kustomization["secretGenerator"] += [generators[name] for name in COMPONENT_SECRETS.get(component, ())]
    file.write_text(yaml.safe_dump(kustomization, sort_keys=False))
    (path / "secrets").mkdir(mode=0o700)
    (path / "secrets" / "values.env").write_text("".join(f"{key}={value}\n" for key, value in _values().items()))
    write_secrets(path)
    return path


@cache
def _values() -> dict[str, str]:
    """Values shared by everything that one process composes, so that equal manifests are equal."""
    return changed_values({})


def render(overlay: Path) -> list[Manifest]:
    """Render with the kubectl that the package's users have."""
    outcome = subprocess.run([KUBECTL, "kustomize", str(overlay)], capture_output=True, text=True, check=False)
    if outcome.returncode:
        raise RuntimeError(outcome.stderr.strip())
    return [document for document in yaml.load_all(outcome.stdout, yaml.CSafeLoader) if document]


def name_of(manifest: Manifest) -> str:
    return f"{manifest['kind']}/{manifest['metadata']['name']}"


def of_kind(manifests: Iterable[Manifest], *kinds: str) -> list[Manifest]:
    return [manifest for manifest in manifests if manifest["kind"] in kinds]


def workloads(manifests: Iterable[Manifest]) -> list[Manifest]:
    """Give what makes pods; a CronJob counts as the Job that it makes."""
    chosen = of_kind(manifests, "Deployment", "StatefulSet", "Job", "CronJob")
    return [
        entry | {"kind": "Job", "spec": entry["spec"]["jobTemplate"]["spec"]} if entry["kind"] == "CronJob" else entry
        for entry in chosen
    ]


def pod_spec(workload: Manifest) -> dict[str, Any]:
    return workload["spec"]["template"]["spec"]


def pod_labels(workload: Manifest) -> dict[str, str]:
    return workload["spec"]["template"]["metadata"]["labels"]


def containers(workload: Manifest) -> Iterator[dict[str, Any]]:
    spec = pod_spec(workload)
    yield from spec.get("initContainers", ())
    yield from spec["containers"]


def matches(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    """Apply a label selector; an empty one matches everything."""
    for key, value in selector.get("matchLabels", {}).items():
        if labels.get(key) != value:
            return False
    for rule in selector.get("matchExpressions", ()):
        present = rule["key"] in labels
        chosen = labels.get(rule["key"]) in rule.get("values", ())
        if not {"In": chosen, "NotIn": not chosen, "Exists": present, "DoesNotExist": not present}[rule["operator"]]:
            return False
    return True


def allows(policies: Iterable[Manifest], source: Mapping[str, str], target: Mapping[str, str], port: int) -> bool:
    """Say whether network policies let a pod connect to a port of another pod, as Kubernetes does.

    A direction in which some policy chooses the pod is closed but for what those policies list; both must be open.
    Pods are of the platform's namespace, or have `NAMESPACE` among their labels.
    """
    policies = list(policies)
    leaves = _direction(policies, "Egress", source, target, port)
    return leaves and _direction(policies, "Ingress", target, source, port)


def _direction(
    policies: Iterable[Manifest], direction: str, pod: Mapping[str, str], peer: Mapping[str, str], port: int
) -> bool:
    key, side = ("egress", "to") if direction == "Egress" else ("ingress", "from")
    own = {NAMESPACE: pod.get(NAMESPACE, OURS)}
    chosen = [
        policy["spec"]
        for policy in policies
        if direction in policy["spec"]["policyTypes"]
        and policy["metadata"]["namespace"] == own[NAMESPACE]
        and matches(policy["spec"]["podSelector"], pod)
    ]
    rules = [rule for spec in chosen for rule in spec.get(key, ())]
    peer = {NAMESPACE: OURS, **peer}
    return not chosen or any(_peer(rule.get(side), peer, own) and _port(rule.get("ports"), port) for rule in rules)


def _peer(peers: list[dict[str, Any]] | None, labels: Mapping[str, str], own: Mapping[str, str]) -> bool:
    # An ipBlock names what is no pod.
    return peers is None or any(
        "ipBlock" not in peer
        and matches(peer.get("namespaceSelector", {"matchLabels": own}), labels)
        and matches(peer.get("podSelector", {}), labels)
        for peer in peers
    )


def _port(ports: list[dict[str, Any]] | None, port: int) -> bool:
    return ports is None or any(entry["port"] <= port <= entry.get("endPort", entry["port"]) for entry in ports)


def quantity_bytes(text: str) -> int:
    """Parse a memory quantity.

    Raises:
        ValueError: It is none.
    """
    units = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "k": 10**3, "M": 10**6, "G": 10**9, "": 1}
    digits = text.rstrip("KMGTik")
    unit = text[len(digits) :]
    if unit not in units or not digits.isdigit():
        raise ValueError(f"{text!r} is no memory quantity")
    return int(digits) * units[unit]
