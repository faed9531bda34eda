"""The seccomp profile that `RuntimeDefault` means, as the OCI's `linux.seccomp`.

Container runtimes bring a profile that depends on machine, kernel and capabilities. Podman's and CRI-O's is a file that
Debian packages; containerd's is code, and lets fewer calls through. What is made here is the stricter of both.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

DEFAULT_PROFILE = Path("/usr/share/containers/seccomp.json")
MACHINES = {"x86_64": ("amd64", "SCMP_ARCH_X86_64"), "aarch64": ("arm64", "SCMP_ARCH_AARCH64")}
EPERM, ENOSYS = 1, 38
# containerd allows these to a container with CAP_SYS_ADMIN only, or to none.
CLOSED_BY_CONTAINERD = frozenset(
    {
        "fsconfig", "fsmount", "fsopen", "fspick", "keyctl", "mount", "mount_setattr", "move_mount", "open_tree",
        "pivot_root", "quotactl", "setdomainname", "sethostname", "setns", "syslog", "umount", "umount2", "unshare",
    }
)  # fmt: skip
# These two make threads and processes, which is allowed, and namespaces, which is not. clone3 hides its flags from the
# filter: told that there is no such call, libc falls back to clone.
NAMESPACE_FLAGS = 0x7E020000
NO_NEW_NAMESPACE = {"index": 0, "value": NAMESPACE_FLAGS, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}


def runtime_default(
    default: Mapping[str, Any],
    *,
    capabilities: Collection[str] = (),
    machine: str = platform.machine(),
    kernel: str = platform.release(),
) -> dict[str, Any]:
    """Return the filter for a container with these capabilities, on this machine and kernel."""
    arch, native = MACHINES[machine]
    admin = "CAP_SYS_ADMIN" in capabilities
    rules = []
    for rule in default["syscalls"]:
        if _applies(rule, capabilities, arch, kernel):
            closed = set() if admin else CLOSED_BY_CONTAINERD | {"clone", "clone3"}
            allowed = rule["action"] == "SCMP_ACT_ALLOW"
            names = [name for name in rule["names"] if not (allowed and name in closed)]
            if names:
                rules.append(_rule(names, rule["action"], rule.get("errnoRet"), rule.get("args")))
    if not admin:
        rules.append(_rule(["clone"], "SCMP_ACT_ALLOW", None, [NO_NEW_NAMESPACE]))
        rules.append(_rule(["clone3"], "SCMP_ACT_ERRNO", ENOSYS, None))
        rules.append(_rule(sorted(CLOSED_BY_CONTAINERD), "SCMP_ACT_ERRNO", EPERM, None))
    families = next(family for family in default["archMap"] if family["architecture"] == native)
    return {
        "defaultAction": default["defaultAction"],
        "defaultErrnoRet": default["defaultErrnoRet"],
        "architectures": [native, *families["subArchitectures"]],
        "syscalls": rules,
    }


def _applies(rule: Mapping[str, Any], capabilities: Collection[str], arch: str, kernel: str) -> bool:
    includes, excludes = rule.get("includes") or {}, rule.get("excludes") or {}
    if "minKernel" in includes and _version(kernel) < _version(includes["minKernel"]):
        return False
    if "arches" in includes and arch not in includes["arches"]:
        return False
    if not set(includes.get("caps", ())) <= set(capabilities):
        return False
    return not (arch in excludes.get("arches", ()) or set(excludes.get("caps", ())) & set(capabilities))


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])


def _rule(names: list[str], action: str, errno: int | None, args: list[Any] | None) -> dict[str, Any]:
    rule: dict[str, Any] = {"names": names, "action": action}
    if errno is not None:
        rule["errnoRet"] = errno
    return rule | ({"args": args} if args else {})
