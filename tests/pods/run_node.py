"""Put an overlay on a real node of Kubernetes, without a registry: `python tests/pods/run_node.py`.

Debian 12 packages the source of Kubernetes 1.20 whole. API server, controllers, scheduler, kubelet and kube-proxy are
built from it once (`--folder` keeps them), and run beside Debian's etcd, containerd, CNI plugins and dnsmasq in network
and mounts of their own. What stands in for images (`images.py`) is imported under the images' names. Then the commands
that users type are put to the test: up, up again, a run of the notebooks through forwards while pods are deleted, a
broken image and its repair, down.

An old release, and the last whose source can be had from Debian: what it does not know is edited in a copy of the
manifests (`for_an_old_release`). It enforces no network policy and knows no Pod Security.
"""

# ruff: noqa: S607, T201 (it is a command of a developer's machine, whose PATH it trusts)

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from images import REPOSITORY, make_roots, stand_ins
from manifests import compose, containers, render, workloads
from run_pods import leave_the_machines_network, unshare_mounts

from mlplatform.clients.hastening import hasten_feast
from mlplatform.errors import ClusterError
from mlplatform_ops import runner as notebooks
from mlplatform_ops.cluster.cluster import Cluster
from pods import Image, PodError, run, short_name

PACKAGES = (
    "containerd", "containernetworking-plugins", "dnsmasq-base", "etcd-server", "golang-go", "iptables", "conntrack",
    "mmdebstrap", "openssl",
)  # fmt: skip
VERSION = "1.20.2"
PROGRAMS = ("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy")
ADDRESS = "10.77.0.1"
PAUSE = "registry.k8s.io/pause:3.2"
CONTEXT = "kind-node"


def build(folder: Path) -> None:
    """Build Kubernetes from Debian's source package; takes some seven minutes on two cores."""
    source = folder / "go" / "src" / "k8s.io" / "kubernetes"
    if not source.exists():
        apt = folder / "apt"
        for part in ("lists/partial", "cache/archives/partial"):
            (apt / part).mkdir(parents=True, exist_ok=True)
        where = run("apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages", "Suite: oldstable")
        where = where or run("apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages")
        (apt / "list").write_text(f"deb-src {where.split()[0]} bookworm main\n")
        options = [f"-oDir::State::lists={apt / 'lists'}", f"-oDir::Cache={apt / 'cache'}"]
        options += [f"-oDir::Etc::sourcelist={apt / 'list'}", "-oDir::Etc::sourceparts=/dev/null"]
        run("apt-get", *options, "update")
        run("apt-get", *options, "source", "--download-only", "kubernetes", cwd=apt)
        source.parent.mkdir(parents=True, exist_ok=True)
        run("tar", "-C", source.parent, "-xf", next(apt.glob("kubernetes_*.orig.tar.gz")))
        (source.parent / f"kubernetes-{VERSION}").rename(source)
    go = {**os.environ, "GOPATH": str(folder / "go"), "GO111MODULE": "off", "CGO_ENABLED": "0", "GOFLAGS": ""}
    go["GOCACHE"] = str(folder / "go-cache")

    def compile_one(package: str, program: Path) -> None:
        version = "k8s.io/kubernetes/vendor/k8s.io/component-base/version"
        flags = f"-s -w -X {version}.gitVersion=v{VERSION} -X {version}.gitMajor=1 -X {version}.gitMinor=20"
        run("go", "build", "-ldflags", flags, "-o", program, package, cwd=source, env=go)

    # The one generated file that the source lacks: the schemas of all objects.
    generator = folder / "bin" / "openapi-gen"
    compile_one("./vendor/k8s.io/kube-openapi/cmd/openapi-gen", generator)
    tagged = run("grep", "-rl", "--include=*.go", "+k8s:openapi-gen=true", "pkg", "staging/src", cwd=source)
    others = re.compile(r"sample-apiserver|/testdata/|_examples|/code-generator/|kube-openapi")
    files = [line.replace("staging/src", "vendor") for line in tagged.splitlines() if not others.search(line)]
    packages = {str(Path(file).parent) for file in files}
    run(
        generator, "-i", ",".join(f"k8s.io/kubernetes/{package}" for package in sorted(packages)),
        "-p", "k8s.io/kubernetes/pkg/generated/openapi", "-O", "zz_generated.openapi",
        "-h", "hack/boilerplate/boilerplate.generatego.txt", "-r", folder / "violations", cwd=source, env=go,
    )  # fmt: skip
    for program in PROGRAMS:
        compile_one(f"./cmd/{program}", folder / "bin" / program)


def pack(folder: Path, names: Iterable[str], roots: Path) -> Path:
    """Write an archive that containerd imports: the stand-ins, each under its image's name."""
    layers: dict[tuple[str, ...], tuple[Path, str]] = {}

    def layer(*arguments: str | Path) -> tuple[Path, str]:
        key = tuple(str(argument) for argument in arguments)
        if key not in layers:
            path = folder / f"{len(layers)}.tar"
            run("tar", "--numeric-owner", "--exclude=__pycache__", "-cf", path, *arguments)
            with path.open("rb") as file:
                layers[key] = path, hashlib.file_digest(file, "sha256").hexdigest()
        return layers[key]

    known = stand_ins(roots) | {"pause": Image(roots / "servers", entrypoint=("/bin/sleep", "infinity"))}
    manifest, configs = [], {}
    for name in (*names, PAUSE):
        image = known[short_name(name)]
        made = [layer("-C", image.root, "--exclude=./proc/*", "--exclude=./sys/*", "--exclude=./dev/*", ".")]
        same = [source for target, source in image.binds.items() if target == str(source)]
        moved = [source for target, source in image.binds.items() if target != str(source)]
        if same:
            made.append(layer("-C", "/", *(str(path)[1:] for path in same)))
        if moved:
            made.append(layer("--transform=s#^#app/#", "-C", REPOSITORY, *(path.name for path in moved)))
        config = {
            "architecture": "amd64",
            "os": "linux",
            "config": {
                "Env": [f"{key}={value}" for key, value in image.env.items()],
                "Entrypoint": list(image.entrypoint) or None,
            },
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}" for _, digest in made]},
        }
        body = json.dumps(config).encode()
        file = f"{hashlib.sha256(body).hexdigest()}.json"
        configs[file] = body
        full = name if "/" in name else f"docker.io/library/{name}"
        manifest.append({"Config": file, "RepoTags": [full], "Layers": [f"{digest}.tar" for _, digest in made]})
    archive = folder / "images.tar"
    with tarfile.open(archive, "w") as tar:
        for path, digest in layers.values():
            tar.add(path, f"{digest}.tar")
            path.unlink()
        for file, body in (configs | {"manifest.json": json.dumps(manifest).encode()}).items():
            entry = tarfile.TarInfo(file)
            entry.size = len(body)
            tar.addfile(entry, io.BytesIO(body))
    return archive


class Node:
    """A control plane and one node of Kubernetes, in this process's network and mounts."""

    def __init__(self, programs: Path, folder: Path) -> None:
        self.programs, self.folder = programs, folder
        self.kubeconfig = folder / "admin.kubeconfig"
        self.cgroup = f"node-{secrets.token_hex(3)}"
        self._tokens = {user: secrets.token_hex(16) for user in ("admin", "system:node:node", "system:kube-proxy")}
        self._processes: list[subprocess.Popen[bytes]] = []
        self._stopping = threading.Event()

    def start(self, archive: Path) -> None:
        for part in ("certificates", "log", "network", "volumes"):
            (self.folder / part).mkdir()
        self._network()
        self._control_plane()
        self._runtime(archive)
        self._kubelet()
        threading.Thread(target=self._serve_names, daemon=True).start()
        self._until(lambda: " Ready" in self.kubectl("get", "nodes"), "the node is ready")

    def stop(self) -> None:
        self._stopping.set()
        for process in reversed(self._processes):
            process.terminate()
        for process in self._processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(20)
        # What a pod left behind, when the platform was not taken away before, and the shims that watch it.
        for file in Path("/sys/fs/cgroup").glob(f"*/{self.cgroup}/**/cgroup.procs"):
            for pid in file.read_text().split():
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
        subprocess.run(["pkill", "-f", f"containerd-shim.*{self.folder}"], check=False)
        for group in Path("/sys/fs/cgroup").glob(f"*/{self.cgroup}"):
            for folder, _, _ in os.walk(group, topdown=False):
                with suppress(OSError):
                    Path(folder).rmdir()

    def kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        command = [Path(sys.executable).parent / "kubectl", "--kubeconfig", self.kubeconfig, *arguments]
        return subprocess.run(command, input=stdin, capture_output=True, text=True, check=False).stdout

    def add_volumes(self, count: int) -> None:
        """Offer volumes, since nothing here provisions any."""
        for _ in range(count):
            name = f"volume-{secrets.token_hex(3)}"
            path = self.folder / "volumes" / name
            path.mkdir()
            here = {"key": "kubernetes.io/hostname", "operator": "In", "values": ["node"]}
            volume = {
                "apiVersion": "v1",
                "kind": "PersistentVolume",
                "metadata": {"name": name},
                "spec": {
                    "capacity": {"storage": "50Gi"},
                    "accessModes": ["ReadWriteOnce"],
                    "local": {"path": str(path)},
                    "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": [here]}]}},
                },
            }
            self.kubectl("apply", "-f", "-", stdin=json.dumps(volume))

    def pods(self, selector: str) -> set[str]:
        return set(self.kubectl("get", "pods", "-n", "mlplatform", "-l", selector, "-o", "name").split())

    def _run(self, program: str | Path, *arguments: str | Path) -> subprocess.Popen[bytes]:
        with (self.folder / "log" / Path(program).name).open("ab") as log:
            command = [str(part) for part in (program, *arguments)]
            self._processes.append(subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL))
        return self._processes[-1]

    def _until(self, done: Callable[[], bool], what: str, timeout_s: float = 120) -> None:
        deadline = time.monotonic() + timeout_s
        while not done():
            ended = [process for process in self._processes if process.poll() is not None]
            if ended:
                name = Path(next(iter(ended[0].args))).name  # type: ignore[arg-type]
                tail = (self.folder / "log" / name).read_text().splitlines()[-8:]
                raise PodError("\n      | ".join([f"{name} ended:", *(line[:300] for line in tail)]))
            if time.monotonic() > deadline:
                raise PodError(f"not in {timeout_s:.0f} s: {what}")
            time.sleep(0.5)

    def _network(self) -> None:
        run("ip", "link", "set", "lo", "up")
        # An interface that is up, with an address that routes lead through.
        run("ip", "link", "add", "node0", "type", "veth", "peer", "name", "node1")
        run("ip", "address", "add", f"{ADDRESS}/24", "dev", "node0")
        for name in ("node0", "node1"):
            run("ip", "link", "set", name, "up")
        run("ip", "route", "add", "default", "via", "10.77.0.254", "dev", "node0")
        Path("/proc/sys/net/ipv4/ip_forward").write_text("1")

    def _control_plane(self) -> None:
        key, certificates = self.folder / "accounts.key", self.folder / "certificates"
        run("openssl", "genrsa", "-out", key, "2048")
        tokens = self.folder / "tokens.csv"
        tokens.write_text("".join(f'{token},{user},{user},"system:masters"\n' for user, token in self._tokens.items()))
        etcd = "http://127.0.0.1:2379"
        self._run(
            "etcd", "--data-dir", self.folder / "etcd", "--listen-client-urls", etcd, "--advertise-client-urls", etcd,
            "--listen-peer-urls", "http://127.0.0.1:2380", "--unsafe-no-fsync",
        )  # fmt: skip
        self._run(
            self.programs / "kube-apiserver", f"--etcd-servers={etcd}", f"--advertise-address={ADDRESS}",
            f"--bind-address={ADDRESS}", "--secure-port=6443", "--insecure-port=0", f"--cert-dir={certificates}",
            "--service-account-issuer=https://kubernetes.default", f"--service-account-signing-key-file={key}",
            f"--service-account-key-file={key}", f"--token-auth-file={tokens}", "--authorization-mode=RBAC",
            "--service-cluster-ip-range=10.96.0.0/16", "--kubelet-preferred-address-types=InternalIP",
            "--allow-privileged=false",
        )  # fmt: skip
        self._until((certificates / "apiserver.crt").exists, "the API server has its certificate")
        self.kubeconfig.write_text(self._config("admin"))
        self._until(lambda: "ok" in self.kubectl("get", "--raw", "/readyz"), "the API server is ready")
        self._run(
            self.programs / "kube-controller-manager", f"--kubeconfig={self.kubeconfig}", "--leader-elect=false",
            f"--service-account-private-key-file={key}", f"--root-ca-file={certificates / 'apiserver.crt'}",
        )  # fmt: skip
        self._run(self.programs / "kube-scheduler", f"--kubeconfig={self.kubeconfig}", "--leader-elect=false")

    def _config(self, user: str) -> str:
        authority = str(self.folder / "certificates" / "apiserver.crt")
        return yaml.safe_dump(
            {
                "apiVersion": "v1",
                "kind": "Config",
                "current-context": CONTEXT,
                "clusters": [
                    {
                        "name": "node",
                        "cluster": {"server": f"https://{ADDRESS}:6443", "certificate-authority": authority},
                    }
                ],
                "users": [{"name": user, "user": {"token": self._tokens[user]}}],
                "contexts": [{"name": CONTEXT, "context": {"cluster": "node", "user": user}}],
            }
        )

    def _runtime(self, archive: Path) -> None:
        socket, network = self.folder / "containerd.sock", self.folder / "network"
        settings = self.folder / "containerd.toml"
        settings.write_text(
            f'version = 2\nroot = "{self.folder / "containerd"}"\nstate = "{self.folder / "containers"}"\n'
            f'[grpc]\naddress = "{socket}"\n'
            f'[plugins."io.containerd.grpc.v1.cri"]\nsandbox_image = "{PAUSE}"\n'
            # A sandbox of a CI machine may not lower the score by which the kernel chooses whom to end.
            "restrict_oom_score_adj = true\n"
            f'[plugins."io.containerd.grpc.v1.cri".cni]\nbin_dir = "/usr/lib/cni"\nconf_dir = "{network}"\n'
        )
        addresses = {
            "type": "host-local",
            "ranges": [[{"subnet": "10.88.0.0/16"}]],
            "routes": [{"dst": "0.0.0.0/0"}],
            "dataDir": str(self.folder / "addresses"),
        }
        bridge = {"type": "bridge", "bridge": "pods", "isGateway": True, "hairpinMode": True, "ipam": addresses}
        plugins = {"cniVersion": "0.4.0", "name": "pods", "plugins": [bridge]}
        (network / "10-pods.conflist").write_text(json.dumps(plugins))
        self._run("containerd", "--config", settings)
        self._until(socket.exists, "containerd listens")
        run("ctr", "--address", socket, "--namespace", "k8s.io", "images", "import", archive)
        archive.unlink()

    def _kubelet(self) -> None:
        (self.folder / "resolv.conf").write_text(f"nameserver {ADDRESS}\n")
        settings = {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "address": ADDRESS,
            "authentication": {"anonymous": {"enabled": True}, "webhook": {"enabled": False}},
            "authorization": {"mode": "AlwaysAllow"},
            "cgroupRoot": f"/{self.cgroup}",
            "clusterDNS": [ADDRESS],
            "clusterDomain": "cluster.local",
            "failSwapOn": False,
            "imageGCHighThresholdPercent": 100,
            "evictionHard": {"memory.available": "100Mi"},
            "resolvConf": str(self.folder / "resolv.conf"),
        }
        (self.folder / "kubelet.yaml").write_text(yaml.safe_dump(settings))
        for user, name in (("system:node:node", "kubelet"), ("system:kube-proxy", "kube-proxy")):
            (self.folder / f"{name}.kubeconfig").write_text(self._config(user))
        for hierarchy in Path("/sys/fs/cgroup").iterdir():
            if (hierarchy / "cgroup.procs").exists():
                (hierarchy / self.cgroup).mkdir(exist_ok=True)
        self._run(
            self.programs / "kubelet", f"--config={self.folder / 'kubelet.yaml'}", f"--node-ip={ADDRESS}",
            f"--kubeconfig={self.folder / 'kubelet.kubeconfig'}", "--hostname-override=node",
            "--container-runtime=remote", f"--container-runtime-endpoint=unix://{self.folder / 'containerd.sock'}",
            f"--root-dir={self.folder / 'kubelet'}",
        )  # fmt: skip
        self._run(
            self.programs / "kube-proxy", f"--kubeconfig={self.folder / 'kube-proxy.kubeconfig'}",
            "--hostname-override=node", "--proxy-mode=iptables", "--cluster-cidr=10.88.0.0/16",
            "--conntrack-max-per-core=0", "--conntrack-tcp-timeout-established=0s",
            "--conntrack-tcp-timeout-close-wait=0s",
        )  # fmt: skip

    def _serve_names(self) -> None:
        """Stand in for CoreDNS: the names of Services, and of the pods of headless ones."""
        hosts = self.folder / "hosts"
        hosts.touch()
        server = self._run(
            "dnsmasq", "--keep-in-foreground", "--no-resolv", "--no-hosts", f"--addn-hosts={hosts}", "--user=root",
            f"--listen-address={ADDRESS}", "--bind-interfaces", "--pid-file",
        )  # fmt: skip
        while not self._stopping.wait(1):
            with suppress(ValueError):
                found = json.loads(self.kubectl("get", "services,endpoints", "-A", "-o", "json"))["items"]
                text = "".join(f"{address} {name}.svc.cluster.local\n" for address, name in sorted(_names(found)))
                if text != hosts.read_text():
                    hosts.write_text(text)
                    server.send_signal(signal.SIGHUP)


def _names(found: list[Any]) -> Iterable[tuple[str, str]]:
    """Give address and name of each Service, and of each pod behind a headless one."""
    endpoints = {_full(item): item.get("subsets") or [] for item in found if item["kind"] == "Endpoints"}
    for service in (item for item in found if item["kind"] == "Service"):
        name, address = _full(service), service["spec"]["clusterIP"]
        if address != "None":
            yield address, name
        else:
            for subset in endpoints.get(name, ()):
                yield from ((entry["ip"], name) for entry in subset.get("addresses", ()))


def _full(item: Any) -> str:
    return f"{item['metadata']['name']}.{item['metadata']['namespace']}"


def for_an_old_release(deploy: Path) -> None:
    """Edit a copy of the manifests where Kubernetes 1.20 knows less, and where two cores are few."""
    for path in deploy.rglob("*.yaml"):
        text = path.read_text()
        for old, new in (
            (r"(targetPort: [\w-]+|containerPort: \d+)\}", r"\1, protocol: TCP}"),
            (r"apiVersion: policy/v1\n", "apiVersion: policy/v1beta1\n"),
            (r"sleep: \{seconds: 5\}", "exec: {command: [sleep, '5']}"),
            (r"cpu: 500m", "cpu: 100m"),
        ):
            text = re.sub(old, new, text)
        path.write_text(text)


class OldCluster(Cluster):
    """A cluster whose controllers own what they default, so that applying again is a conflict: mended in 1.22."""

    def _kubectl(self, *arguments: str, stdin: list[dict[str, Any]] | None = None) -> list[str]:
        force = ("--force-conflicts",) if arguments[0] == "apply" else ()
        return super()._kubectl(*arguments, *force, stdin=stdin)


def show(node: Node, overlay: Path, output: Path) -> None:
    """Do what users do, and what happens to them."""
    cluster = OldCluster(overlay, notify=lambda line: print(f"    {line[:200]}", flush=True))

    def step(what: str) -> None:
        print(f"  {what} ({time.monotonic() - begun:.0f} s)", flush=True)

    begun = time.monotonic()
    step("k8s-up")
    cluster.up()
    step("k8s-up again, which changes nothing")
    servers = "app.kubernetes.io/component notin (buckets,schema,notebooks)"
    before = node.pods(servers)
    cluster.up()
    if not before or node.pods(servers) != before:
        raise PodError(f"k8s-up again replaced pods: {before ^ node.pods(servers)}")

    step("the notebooks through forwards, while pods that they use are deleted")
    with cluster.forwarded({}) as settings:
        os.environ.update(settings.to_env())
        hasten_feast()
        deleted: list[str] = []
        deleting = threading.Thread(target=delete_pods, args=(node, deleted), daemon=True)
        deleting.start()
        chain = notebooks.find_notebooks(REPOSITORY / "notebooks")
        for execution in notebooks.run_all(chain, output, notify=print):
            if execution.error or execution.skipped:
                raise PodError(f"{execution.name}: {execution.error or 'not run'}")
        deleting.join()
        if not deleted:
            raise PodError("no pod was deleted while the notebooks ran")

    step("an image that is not there, and its repair")
    files = [
        path for path in overlay.parents[1].rglob("*.yaml") if "image: docker.io/library/redis:" in path.read_text()
    ]
    kept = {path: path.read_text() for path in files}
    for path, text in kept.items():
        path.write_text(re.sub(r"(library/redis:)\S+", r"\1not-there", text))
    try:
        cluster.up(stuck_after_s=20)
    except ClusterError as error:
        print(f"    as it must: {error}")
        if "ImagePull" not in str(error):
            raise
    else:
        raise PodError("an image that is not there came up")
    for path, text in kept.items():
        path.write_text(text)
    cluster.up(stuck_after_s=20)

    step("k8s-down, which keeps data; k8s-up without the secrets, which is refused; down with the data")
    cluster.down(delete_data=False)
    shutil.move(overlay / "secrets", overlay / "away")
    try:
        cluster.up()
    except ClusterError as error:
        print(f"    as it must: {error}")
        if "other secrets" not in str(error):
            raise
    else:
        raise PodError("k8s-up made new secrets for old data")
    cluster.down(delete_data=True)
    step("done")


def delete_pods(node: Node, deleted: list[str]) -> None:
    """Delete a pod of each kind that a run leans on and has two of, as a drain does, once the run is under way."""
    for name in ("mlflow", "redis-proxy", "redis"):
        time.sleep(20)
        pods = sorted(node.pods(f"app.kubernetes.io/name={name}"))
        if len(pods) > 1:
            print(f"    deleting {pods[0]}", flush=True)
            deleted += node.kubectl("delete", "-n", "mlplatform", pods[0]).splitlines()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--overlay", default="production", help="which overlay (default: production)")
    parser.add_argument("--component", action="append", default=[], help="a component to add; may be repeated")
    parser.add_argument("--folder", type=Path, help="where to build, and to find what was built before")
    options = parser.parse_args()
    missing = [
        name
        for name in ("etcd", "containerd", "go", "dnsmasq", "iptables", "mmdebstrap", "openssl")
        if not shutil.which(name)
    ]
    if os.geteuid() or missing:
        print(f"error: this needs root on Debian 12 and its packages {' '.join(PACKAGES)}", file=sys.stderr)
        return 1
    if Path("/sys/fs/cgroup/cgroup.controllers").exists():
        print("error: this needs control groups v1: boot with systemd.unified_cgroup_hierarchy=0", file=sys.stderr)
        return 1
    warnings.filterwarnings("ignore", category=ResourceWarning)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    scratch = Path(tempfile.mkdtemp(prefix="node-", dir="/var/tmp"))
    folder = (options.folder or scratch).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    node = Node(folder / "bin", scratch / "node")
    begun = time.monotonic()
    # The kubelet's mounts have to reach the containers, and none of them the machine.
    unshare_mounts()
    run("mount", "--make-rshared", "/")
    try:
        if not all((folder / "bin" / program).exists() for program in PROGRAMS):
            build(folder)
            print(f"Kubernetes {VERSION} is built after {time.monotonic() - begun:.0f} s", flush=True)
        overlay = compose(scratch / "manifests", overlay=options.overlay, components=options.component)
        for_an_old_release(overlay.parents[1])
        make_roots(scratch / "roots")
        images = {container["image"] for workload in workloads(render(overlay)) for container in containers(workload)}
        archive = pack(scratch, sorted(images), scratch / "roots")
        print(f"images are packed after {time.monotonic() - begun:.0f} s", flush=True)
        leave_the_machines_network()
        node.folder.mkdir()
        node.start(archive)
        print(f"the node is ready after {time.monotonic() - begun:.0f} s", flush=True)
        node.add_volumes(8)
        os.environ |= {"KUBECONFIG": str(node.kubeconfig), "HOME": str(scratch)}
        show(node, overlay, scratch / "notebooks")
    except (ClusterError, PodError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    finally:
        node.stop()
        run("mount", "--make-rprivate", "/")
        for line in reversed(Path("/proc/self/mounts").read_text().splitlines()):
            if line.split()[1].startswith(str(scratch)):
                subprocess.run(["umount", "--lazy", line.split()[1]], check=False)
        shutil.rmtree(scratch, ignore_errors=True)
    print(f"node: all passed in {time.monotonic() - begun:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
