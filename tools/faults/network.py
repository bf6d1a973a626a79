"""Network namespaces for experiments: a hub and some edges, each in one of its own, joined by a bridge in another.

Needs root. Nothing of the machine's own network is touched, and all of it is gone when the context is left.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path
from types import TracebackType

#: The environment variable that names the namespace a process is to enter; see `enter`.
NAMESPACE = "FAULTS_NAMESPACE"
_NEWNET = 0x40000000


def missing() -> str | None:
    """Why there can be no namespaces here; None when there can."""
    if os.geteuid() != 0:
        return "needs root for network namespaces"
    if any(shutil.which(tool) is None for tool in ("ip", "tc", "ss")):
        return "needs ip, tc and ss"
    try:
        with Network("probe") as network:
            network.shape("probe", 10)
    except OSError as error:
        return f"no network namespaces with shaped links can be made here: {error}"
    return None


def enter() -> None:
    """Put this process, which must have one thread, into the namespace that its environment names."""
    libc = ctypes.CDLL(None, use_errno=True)
    with Path("/run/netns", os.environ[NAMESPACE]).open() as space:
        if libc.setns(space.fileno(), _NEWNET):
            raise OSError(ctypes.get_errno(), "setns failed")


class Network:
    """Hosts on one bridge. `cut` loses every packet from and to a host, in silence: its ends keep their carrier."""

    def __init__(self, *hosts: str) -> None:
        self._prefix = f"fs{os.getpid()}"
        self._middle = f"{self._prefix}mid"
        self._hosts = hosts

    def __enter__(self) -> Network:
        try:
            self._make()
        except OSError:
            self._remove()
            raise
        return self

    def _make(self) -> None:
        _ip("netns", "add", self._middle)
        _ip("-n", self._middle, "link", "add", "bridge0", "type", "bridge")
        _ip("-n", self._middle, "link", "set", "bridge0", "up")
        for host in self._hosts:
            space = self.space(host)
            _ip("netns", "add", space)
            _ip("-n", space, "link", "add", "eth0", "type", "veth", "peer", "name", host, "netns", self._middle)
            _ip("-n", space, "addr", "add", f"{self.address(host)}/24", "dev", "eth0")
            _ip("-n", space, "link", "set", "lo", "up")
            _ip("-n", space, "link", "set", "eth0", "up")
            _ip("-n", self._middle, "link", "set", host, "master", "bridge0", "up")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def _remove(self) -> None:
        for space in (*map(self.space, self._hosts), self._middle):
            subprocess.run(["ip", "netns", "del", space], capture_output=True)

    def space(self, host: str) -> str:
        """The name of a host's namespace."""
        return f"{self._prefix}{host}"

    def env(self, host: str) -> dict[str, str]:
        """The environment of a process that is to `enter` a host."""
        return {NAMESPACE: self.space(host)}

    def address(self, host: str) -> str:
        """A host's address; the others reach it there."""
        return f"10.213.7.{1 + self._hosts.index(host)}"

    def cut(self, host: str) -> None:
        """From now on nothing passes."""
        _ip("-n", self._middle, "link", "set", host, "nomaster")

    def heal(self, host: str) -> None:
        """As before."""
        _ip("-n", self._middle, "link", "set", host, "master", "bridge0")

    def connections(self, host: str) -> int:
        """TCP connections that a host's kernel holds as established."""
        listed = ["ip", "netns", "exec", self.space(host), "ss", "-Htn", "state", "established"]
        return len(subprocess.run(listed, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines())

    def shape(self, host: str, megabits: float) -> None:
        """Let no more than so many Mbit/s pass to the host and from it."""
        for space, device in ((self.space(host), "eth0"), (self._middle, host)):
            limits = ["rate", f"{megabits}mbit", "burst", "16kb", "latency", "100ms"]
            _run("tc", "-n", space, "qdisc", "replace", "dev", device, "root", "tbf", *limits)


def _ip(*arguments: str) -> None:
    _run("ip", *arguments)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
