"""The commands for a cluster: `python -m mlplatform_ops k8s-...`."""

from __future__ import annotations

import os
import shlex
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from mlplatform.settings import Settings, find_root
from mlplatform_ops.cluster.credentials import Group, write_secrets
from mlplatform_ops.console import confirm, say

if TYPE_CHECKING:
    from mlplatform_ops.cluster.cluster import Cluster


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class Target:
    """Which cluster a command is for.

    Attributes:
        overlay: A folder of deploy/overlays.
        context: A context of the kubeconfig; the current one by default. The name is shown.
        yes: Go on where the context looks like production.
    """

    overlay: str = "local"
    context: str | None = None
    yes: bool = False

    @property
    def folder(self) -> Path:
        """The overlay's folder."""
        return find_root() / "deploy" / "overlays" / self.overlay


CURRENT = Target()
_Groups = Annotated[Sequence[Group], Parameter(show_default=False)]


def secrets(target: Target = CURRENT, *, rotate: _Groups = (), retire: _Groups = ()) -> None:
    """Generate the secrets that are missing, or replace some.

    Args:
        target: Which cluster.
        rotate: Make new values, and keep the old ones valid beside them; may be repeated.
        retire: End the old values; may be repeated.
    """
    if not write_secrets(target.folder, rotate=rotate, retire=retire, notify=say):
        say("every secret is there and was kept")


def up(target: Target = CURRENT) -> None:
    """Put the platform on a cluster, or bring it up to date, and wait until it runs."""
    _cluster(target).up()
    say("everything runs; 'make run PLATFORM=k8s' runs the notebooks against it")


def forward(target: Target = CURRENT) -> None:
    """Forward the cluster's services to this machine until interrupted; prints shell exports."""
    with forwarded(target) as settings:
        for name, value in (settings.to_env() | {"REDIS_URL": settings.redis_url}).items():
            print(f"export {name}={shlex.quote(value)}", flush=True)
        say("forwarding; Ctrl-C ends it")
        threading.Event().wait()


def status(target: Target = CURRENT) -> int:
    """Show what runs on the cluster, and why the rest does not."""
    from mlplatform_ops.cluster.rollouts import describe

    workloads = _cluster(target).workloads()
    for workload in workloads:
        print(describe(workload))
    if not workloads:
        say("nothing of the platform is there; 'make k8s-up' puts it there")
    return int(not workloads or not all(workload.done for workload in workloads))


def down(
    target: Target = CURRENT,
    *,
    delete_data: Annotated[bool | None, Parameter(name="--delete-data", negative="--keep-data")] = None,
) -> None:
    """Remove the platform from the cluster; asks before it deletes data.

    Args:
        target: Which cluster.
        delete_data: Delete the volumes, or keep them, without a question.
    """
    _cluster(target).down(delete_data=delete_data)


@contextmanager
def forwarded(target: Target) -> Iterator[Settings]:
    """Forward the cluster's services while the block runs, and yield their settings on this machine."""
    with _cluster(target).forwarded(os.environ) as settings:
        yield settings


def _cluster(target: Target) -> Cluster:
    from mlplatform_ops.cluster.cluster import Cluster

    return Cluster(target.folder, context=target.context, yes=target.yes, confirm=confirm, notify=say)
