"""The commands for a cluster: `python -m mlplatform_ops k8s-...`."""

from __future__ import annotations

import argparse
import os
import shlex
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlplatform.settings import Settings, find_root
from mlplatform_ops.cluster.credentials import GROUPS, write_secrets
from mlplatform_ops.console import confirm, say

if TYPE_CHECKING:
    from mlplatform_ops.cluster.cluster import Cluster


def add_commands(commands: Any) -> None:
    """Add the cluster's commands to a command line.

    Args:
        commands: What `argparse.ArgumentParser.add_subparsers` returned; each command sets `command` to its function.
    """
    for command in (secrets, up, forward, status, down, digests):
        words = (command.__doc__ or "").strip().splitlines()[0]
        parser = commands.add_parser(f"k8s-{command.__name__}", help=words, description=words)
        add_options(parser)
        parser.set_defaults(command=command)
        if command is secrets:
            for name, what in (
                ("--rotate", "make new values, and keep the old ones valid"),
                ("--retire", "end the old ones"),
            ):
                parser.add_argument(name, action="append", default=[], choices=sorted(GROUPS), help=what)
        if command is down:
            choice = parser.add_mutually_exclusive_group()
            choice.add_argument("--delete-data", action="store_true", default=None, help="delete the volumes unasked")
            choice.add_argument("--keep-data", action="store_false", dest="delete_data", help="keep them unasked")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which cluster is meant."""
    parser.add_argument("--overlay", default="local", help="a folder of deploy/overlays (default: local)")
    parser.add_argument("--context", help="a context of the kubeconfig (default: the current one, which is shown)")
    parser.add_argument("--yes", action="store_true", help="go on where the context looks like production")


def secrets(options: argparse.Namespace) -> None:
    """Generate the secrets that are missing, or replace some."""
    if not write_secrets(overlay_of(options), rotate=options.rotate, retire=options.retire, notify=say):
        say("every secret is there and was kept")


def up(options: argparse.Namespace) -> None:
    """Put the platform on a cluster, or bring it up to date, and wait until it runs."""
    _cluster(options).up()
    say("everything runs; 'make run PLATFORM=k8s' runs the notebooks against it")


def forward(options: argparse.Namespace) -> None:
    """Forward the cluster's services to this machine until interrupted; prints shell exports."""
    with forwarded(options) as settings:
        for name, value in (settings.to_env() | {"REDIS_URL": settings.redis_url}).items():
            print(f"export {name}={shlex.quote(value)}", flush=True)
        say("forwarding; Ctrl-C ends it")
        threading.Event().wait()


def status(options: argparse.Namespace) -> int:
    """Show what runs on the cluster, and why the rest does not."""
    from mlplatform_ops.cluster.rollouts import describe

    workloads = _cluster(options).workloads()
    for workload in workloads:
        print(describe(workload))
    if not workloads:
        say("nothing of the platform is there; 'make k8s-up' puts it there")
    return int(not workloads or not all(workload.done for workload in workloads))


def down(options: argparse.Namespace) -> None:
    """Remove the platform from the cluster; asks before it deletes data."""
    _cluster(options).down(delete_data=options.delete_data)


def digests(options: argparse.Namespace) -> None:
    """Ask the registries for the images' digests, and print them as a block for an overlay."""
    from mlplatform_ops.cluster.image_digests import kustomization_block, resolve
    from mlplatform_ops.cluster.kubectl import images, render

    print(kustomization_block(resolve(images(render(overlay_of(options))))), end="")


@contextmanager
def forwarded(options: argparse.Namespace) -> Iterator[Settings]:
    """Reach the cluster's services for as long as the block runs; yields their settings on this machine."""
    with _cluster(options).forwarded(os.environ) as settings:
        yield settings


def overlay_of(options: argparse.Namespace) -> Path:
    """Find the overlay's folder."""
    return find_root() / "deploy" / "overlays" / str(options.overlay)


def _cluster(options: argparse.Namespace) -> Cluster:
    from mlplatform_ops.cluster.cluster import Cluster

    return Cluster(overlay_of(options), context=options.context, yes=options.yes, confirm=confirm, notify=say)
