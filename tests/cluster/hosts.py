"""Hosts on one machine: network namespaces on a bridge, each with its own address. They need root and iproute2."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.processes import clean_environment


@dataclass(frozen=True)
class Host:
    """One namespace, whose processes keep their files in `folder`."""

    name: str
    address: str
    link: str  # the bridge's end of its cable
    folder: Path

    def start(self, command: Sequence[str], env: Mapping[str, str], log: str) -> subprocess.Popen[bytes]:
        """Starts a process on this host, whose output goes to a file of that name in `folder`."""
        with (self.folder / log).open("ab") as file:
            return subprocess.Popen(
                self.command(command), env=clean_environment(env), stdout=file, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip

    def command(self, command: Sequence[str]) -> list[str]:
        """Returns the command line that runs the command on this host."""
        return ["ip", "netns", "exec", self.name, *command]

    def cut_off(self) -> None:
        """Pulls the cable: connections are not refused, and nothing answers."""
        ip("link", "set", self.link, "down")

    def reconnect(self) -> None:
        ip("link", "set", self.link, "up")

    def kill(self) -> int:
        """Sends SIGKILL to all its processes at once; returns how many there were."""
        killed = 0
        while pids := self.pids():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    killed += 1
            time.sleep(0.1)  # some were just starting more
        return killed

    def pids(self) -> list[int]:
        """Returns its processes that still run."""
        listed = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=False)
        return [pid for pid in map(int, listed.stdout.split()) if not is_zombie(pid)]


def is_zombie(pid: int) -> bool:
    """Returns whether a process has ended, even if its parent has not read its status yet."""
    try:
        return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True


def ip(*arguments: str) -> str:
    """Runs iproute2's command and returns its output. Raises RuntimeError with its message."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def free_network() -> str:
    """Returns the first three numbers of a network without a route; a killed run leaves its network behind."""
    routes = ip("-4", "route", "show", "table", "all")
    return next(network for i in range(256) if f"{(network := f'10.77.{i}')}.0/24 " not in routes)


def why_not() -> str:
    """Returns what is missing to create hosts; an empty text if nothing is."""
    if shutil.which("ip") is None:
        return "iproute2 is not installed"
    return "" if os.geteuid() == 0 else "network namespaces need root"


@contextlib.contextmanager
def hosts(names: Sequence[str], folder: Path) -> Iterator[list[Host]]:
    """Creates hosts that reach one another and are reached from here, and removes them after the block."""
    tag = f"dat{os.getpid() % 100_000}"  # interface names have 15 characters
    bridge = f"{tag}br"
    network = free_network()
    outside = f"{network}.254"  # this machine on the bridge
    created = [
        Host(f"{tag}-{name}", f"{network}.{i + 1}", f"{tag}{name}", folder / name) for i, name in enumerate(names)
    ]
    try:
        ip("link", "add", bridge, "type", "bridge")
        ip("addr", "add", f"{outside}/24", "dev", bridge)
        ip("link", "set", bridge, "up")
        for host in created:
            host.folder.mkdir()
            inside = f"{host.link}i"
            ip("netns", "add", host.name)
            ip("link", "add", host.link, "type", "veth", "peer", "name", inside)
            ip("link", "set", inside, "netns", host.name)
            ip("link", "set", host.link, "master", bridge, "up")
            ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", inside)
            ip("-n", host.name, "link", "set", inside, "up")
            ip("-n", host.name, "link", "set", "lo", "up")
            # nothing uses it, but programs ask the routes for their own address
            ip("-n", host.name, "route", "add", "default", "via", outside)
        yield created
    finally:
        for host in created:
            host.kill()
            for undo in (["link", "del", host.link], ["netns", "del", host.name]):
                with contextlib.suppress(RuntimeError):
                    ip(*undo)
        with contextlib.suppress(RuntimeError):
            ip("link", "del", bridge)
