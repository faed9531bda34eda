"""The platform on a Kubernetes cluster, from this machine: put it there, watch it, reach it, take it away.

kubectl, which comes as a wheel, renders and applies; the official client asks. The context's name is always shown, and
a context that looks like production is used only after a confirmation.
"""

from __future__ import annotations

import re
import subprocess
from base64 import b64decode
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from mlplatform.errors import ClusterError
from mlplatform.settings import Settings
from mlplatform_ops.cluster.api import api_errors, api_of, connect_to, find_context, looks_like_production
from mlplatform_ops.cluster.credentials import PREVIOUS, VALUES, write_secrets
from mlplatform_ops.cluster.forwards import DASK, SERVICES, Forward, Target, forwarded_settings, local_port
from mlplatform_ops.cluster.kubectl import Manifest, kubectl_command, render
from mlplatform_ops.cluster.overlay import FOLDER, missing_file, namespace_of, read_env, wanted_files
from mlplatform_ops.cluster.rollouts import STUCK_AFTER_S, Workload, is_ready
from mlplatform_ops.cluster.watch import PART_OF, Watch
from mlplatform_ops.console import Notify

Confirm = Callable[[str], bool]
FIELD_MANAGER = "mlplatform"
VALIDATION = "--validate=strict"
TIMEOUT_S = 900.0
# What kubectl's libraries log beside what kubectl says, such as "E1125 01:30:13.568616 ...".
_LOG_LINE = re.compile(r"[IWEF]\d{4} ")
_KINDS = (
    "cronjobs,deployments,statefulsets,jobs,services,configmaps,secrets,networkpolicies,poddisruptionbudgets,ingresses"
)


class Cluster:
    """One namespace of one cluster.

    Args:
        overlay: The overlay's folder, such as `deploy/overlays/local`.
        context: A context of the kubeconfig; the current one by default.
        yes: Whether to go on where the context looks like production.
        confirm: Asks a question and gives the answer; the default is no, since nobody is there to ask.
        notify: Called with a line for each step worth showing.

    Raises:
        ClusterError: There is no such overlay, no kubeconfig or no such context in it, it looks like production and
            was not confirmed, or the cluster does not answer.
    """

    def __init__(
        self,
        overlay: Path,
        *,
        context: str | None = None,
        yes: bool = False,
        confirm: Confirm = lambda _: False,
        notify: Notify = lambda _: None,
    ) -> None:
        self.overlay = overlay
        self._yes = yes
        self._confirm = confirm
        self._notify = notify
        self.namespace = namespace_of(overlay)
        found = find_context(context)
        self.context = found.name
        notify(f"context {found.name} (cluster {found.cluster}, {found.server}), namespace {self.namespace}")
        if looks_like_production(found.name, found.cluster, found.user, found.server) and not self._agrees(
            f"{found.name} looks like production. Go on?"
        ):
            raise ClusterError(
                f"the context {found.name} looks like production; name another with --context, or add --yes"
            )
        self._client = connect_to(found)
        self._watch = Watch(self._client, self.context, self.namespace, notify)

    def up(self, *, timeout_s: float = TIMEOUT_S, stuck_after_s: float = STUCK_AFTER_S) -> None:
        """Make secrets that are missing, apply the overlay, wait until everything runs.

        Raises:
            ClusterError: It can't be rendered or applied, the cluster's secrets are not here, or a workload does not
                come up, as `Watch.wait` says.
        """
        self._check_secrets()
        write_secrets(self.overlay, notify=self._notify)
        manifests = render(self.overlay)
        self._delete_jobs(manifests)
        self._notify(f"applying {len(manifests)} objects")
        options = ("--server-side", f"--field-manager={FIELD_MANAGER}", VALIDATION)
        for line in self._kubectl("apply", *options, "-f", "-", stdin=manifests):
            if not line.endswith((" unchanged", " serverside-applied")):
                self._notify(line)
        names = _workload_names(manifests)
        self._watch.wait(names, timeout_s=timeout_s, stuck_after_s=stuck_after_s)
        # kubectl knows every rule of a rollout. It waits in silence, so it is asked when nothing is left to explain.
        rollouts = [f"{kind.lower()}/{name}" for kind, name in names if kind != "Job"]
        self._kubectl("rollout", "status", "-n", self.namespace, f"--timeout={timeout_s:.0f}s", *rollouts)

    def workloads(self) -> list[Workload]:
        """Ask for every workload of the platform.

        Raises:
            ClusterError: The cluster does not answer, or refuses.
        """
        return self._watch.workloads()

    def down(self, *, delete_data: bool | None = None) -> None:
        """Remove the platform; keep its volumes and namespace unless their deletion is confirmed.

        Args:
            delete_data: Whether to delete the data too; asks when not said.

        Raises:
            ClusterError: The cluster does not answer, or refuses.
        """
        for line in self._kubectl(
            "delete", _KINDS, "-n", self.namespace, "-l", PART_OF, "--ignore-not-found", "--wait"
        ):
            self._notify(line)
        if delete_data is None:
            # `--yes` answers for the context, not for the data.
            delete_data = self._confirm(
                f"Delete every volume of {self.namespace} on {self.context}, with all data in them?"
            )
        if delete_data:
            for line in self._kubectl("delete", "namespace", self.namespace, "--ignore-not-found", "--wait"):
                self._notify(line)
        else:
            self._notify(f"kept the namespace {self.namespace} and its volumes; 'make k8s-up' finds them again")

    @contextmanager
    def forwarded(self, environ: Mapping[str, str]) -> Iterator[Settings]:
        """Reach the platform's services on ports of this machine, for as long as the block runs.

        When a pod ends, its forward goes on to another pod, on the same local port.

        Args:
            environ: Where local ports that the user set are looked up; others are free ones.

        Yields:
            The platform's settings, with the credentials of the overlay's secret files.

        Raises:
            ClusterError: A secret file is missing, or a service has no ready pod.
            PortTakenError: A local port that was asked for is in use.
        """
        client_secrets = read_env(self.overlay / FOLDER / "client.env")
        dask_config = (self.overlay / FOLDER / "dask.yaml").resolve()
        forwards: dict[str, Forward] = {}
        try:
            for service in self._services():
                if service == DASK and not dask_config.exists():
                    raise ClusterError(missing_file(dask_config))
                variable, port = SERVICES[service]
                local = local_port(service, port, environ.get(variable), variable)
                forwards[service] = Forward(
                    service, local, self._target(service, port), self._forward_command, self._notify
                )
            for forward in forwards.values():
                forward.start()
            ports = {name: forward.port for name, forward in forwards.items()}
            yield forwarded_settings(client_secrets, ports, dask_config)
        finally:
            for forward in forwards.values():
                forward.stop()

    def _services(self) -> list[str]:
        with api_errors(self.context):
            core = api_of(self._client, "CoreV1Api")
            found = core.list_namespaced_service(self.namespace, label_selector=PART_OF).items
        names = [name for name in SERVICES if name in {service.metadata.name for service in found}]
        if not {"minio-service", "redis", "mlflow"} <= set(names):
            raise ClusterError(
                f"the platform is not in the namespace {self.namespace} of {self.context}; run 'make k8s-up'"
            )
        return names

    def _target(self, service: str, port: int) -> Target:
        """Make a function that finds the running pods behind a service."""

        def find() -> list[tuple[str, int, bool]]:
            core = api_of(self._client, "CoreV1Api")
            with api_errors(self.context):
                spec = core.read_namespaced_service(service, self.namespace).spec
                selector = ",".join(f"{key}={value}" for key, value in spec.selector.items())
                pods = core.list_namespaced_pod(self.namespace, label_selector=selector).items
            target = next(entry.target_port for entry in spec.ports if entry.port == port)
            running = [pod for pod in pods if pod.status.phase == "Running" and not pod.metadata.deletion_timestamp]
            numbers = [target if isinstance(target, int) else _named_port(pod, target) for pod in running]
            return sorted(
                (str(pod.metadata.name), number, is_ready(pod)) for pod, number in zip(running, numbers, strict=True)
            )

        return find

    def _forward_command(self, pod: str, local: int, remote: int) -> list[str]:
        return [
            *kubectl_command(self.context), "port-forward", "--namespace", self.namespace, "--address", "127.0.0.1",
            f"pod/{pod}", f"{local}:{remote}",
        ]  # fmt: skip

    def _check_secrets(self) -> None:
        """Refuse to give a platform other secrets than it has, which would lock everybody out of its data."""
        if not wanted_files(self.overlay):
            return
        file = self.overlay / FOLDER / VALUES
        values = read_env(file) if file.exists() else {}
        with api_errors(self.context):
            core = api_of(self._client, "CoreV1Api")
            claims = core.list_namespaced_persistent_volume_claim(self.namespace).items
            found = core.list_namespaced_secret(self.namespace, field_selector="metadata.name=platform-client").items
        keys = {b64decode(secret.data["AWS_ACCESS_KEY_ID"]).decode() for secret in found}
        ours = {values.get("S3_ACCESS_KEY"), values.get("S3_ACCESS_KEY" + PREVIOUS)}
        if (claims and not values) or not keys <= ours:
            raise ClusterError(
                f"the platform on {self.context} was made with other secrets than {file.parent} holds; "
                "put that folder back from where your team keeps it"
            )

    def _delete_jobs(self, manifests: list[Manifest]) -> None:
        """Delete an earlier run's Jobs and their pods: a Job's template can't change, and the Job must run again."""
        names = [name for kind, name in _workload_names(manifests) if kind == "Job"]
        if names:
            self._kubectl("delete", "job", *names, "-n", self.namespace, "--ignore-not-found", "--cascade=foreground")

    def _kubectl(self, *arguments: str, stdin: list[Manifest] | None = None) -> list[str]:
        outcome = subprocess.run(
            [*kubectl_command(self.context), *arguments],
            input=yaml.safe_dump_all(stdin) if stdin is not None else None,
            capture_output=True,
            text=True,
            check=False,
        )
        if outcome.returncode:
            said = [line for line in outcome.stderr.splitlines() if not _LOG_LINE.match(line)]
            reason = " ".join(" ".join(said).split())[:500] or f"exit status {outcome.returncode}"
            raise ClusterError(f"kubectl {arguments[0]} on {self.context} failed: {reason}")
        return outcome.stdout.splitlines()

    def _agrees(self, question: str) -> bool:
        return self._yes or self._confirm(question)


def _workload_names(manifests: list[Manifest]) -> list[tuple[str, str]]:
    kinds = ("Deployment", "StatefulSet", "Job")
    return [(item["kind"], item["metadata"]["name"]) for item in manifests if item["kind"] in kinds]


def _named_port(pod: Any, name: str) -> int:
    for container in pod.spec.containers:
        for port in container.ports or ():
            if port.name == name:
                return int(port.container_port)
    raise ClusterError(f"the pod {pod.metadata.name} has no port {name}")
