"""Network namespaces on this machine: each machine of the cluster has an address and a link that can be cut.

Everything happens in a namespace of the benchmark, which ends with its last process: the system's network is not
changed, and nothing is left. Root is not needed if users may create namespaces.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from _chaos.relay import Relays

HERE = "10.77.0.1"
"""Address of the scheduler and the client."""

BRIDGE = "chaos"
INSIDE = "DISTKV_CHAOS_NETWORK"
"""Set in the environment of the process that has entered the namespace."""

_ENTER = 'read _; ip link set lo up; ip addr add "$0" dev eth0; ip link set eth0 up; exec "$@" </dev/null'


def _ip(*words: str, tool: str = "ip") -> None:
    done = subprocess.run([tool, *words], check=False, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{tool} {' '.join(words)}: {done.stderr.strip()}")


def enter() -> bool:
    """Restart this program in its own network namespace; False if that is not allowed."""
    if os.environ.get(INSIDE) == "1":
        _ip("link", "set", "lo", "up")
        _ip("link", "add", BRIDGE, "type", "bridge")
        _ip("addr", "add", f"{HERE}/24", "dev", BRIDGE)
        _ip("link", "set", BRIDGE, "up")
        return True
    unshare = ["unshare", "--net"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--net"]
    tools = all(map(shutil.which, ("unshare", "ip", "bridge")))
    if os.environ.get(INSIDE) == "0" or not tools:
        return False
    attempt = "ip link add chaos type bridge && ip link add veth type veth peer name other"
    if subprocess.run([*unshare, "sh", "-c", attempt], capture_output=True, check=False).returncode:
        return False
    sys.stdout.flush()
    os.execvpe(unshare[0], [*unshare, sys.executable, *sys.argv], os.environ | {INSIDE: "1"})


class Link:
    """A machine's link to the bridge.

    Parameters
    ----------
    number
        The machine's number, 2 or more.
    """

    def __init__(self, number: int) -> None:
        self.host = f"10.77.0.{number}"
        self._name = f"chaos{number}"

    def launch(self, command: Sequence[str], **options: object) -> subprocess.Popen[bytes]:
        """Start a command in a namespace at the other end of the link."""
        whole = ["unshare", "--net", "sh", "-c", _ENTER, f"{self.host}/24", *command]
        process: subprocess.Popen[bytes] = subprocess.Popen(whole, stdin=subprocess.PIPE, **options)  # type: ignore
        ours = os.readlink("/proc/self/ns/net")
        while os.readlink(f"/proc/{process.pid}/ns/net") == ours:
            time.sleep(0.01)
        _ip("link", "add", self._name, "type", "veth", "peer", "name", "eth0", "netns", str(process.pid))
        _ip("link", "set", self._name, "master", BRIDGE, "up")
        assert process.stdin is not None
        process.stdin.write(b"\n")
        process.stdin.close()
        return process

    def cut(self, broken: bool) -> None:
        """Silently drop everything that is sent over the link, or repair it."""
        _ip("link", "set", self._name, "down" if broken else "up")

    def isolate(self, alone: bool) -> None:
        """Cut this machine off from all other isolated ones; the scheduler's is never isolated."""
        _ip("link", "set", "dev", self._name, "isolated", "on" if alone else "off", tool="bridge")


class Loopback(Link):
    """An address of the loopback interface, if namespaces are not allowed; relays cut channels between workers."""

    def __init__(self, number: int, relays: Callable[[], Relays | None]) -> None:
        super().__init__(number)
        self.host = f"127.0.0.{number}"
        self._relays = relays

    def cut(self, broken: bool) -> None:
        """Drop what other workers send to the holder lanes here."""
        if (relays := self._relays()) is not None:
            relays.cut(self.host, broken)

    isolate = cut

    def launch(self, command: Sequence[str], **options: object) -> subprocess.Popen[bytes]:
        """Start a command."""
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, **options)  # type: ignore
