"""Hosts on one machine: network namespaces on a bridge, each with its own address. Needs root and iproute2."""

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
        """A process on this host; what it writes goes to a file of that name in `folder`."""
        with (self.folder / log).open("ab") as file:
            return subprocess.Popen(
                self.command(command), env=clean_environment(env), stdout=file, stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip

    def command(self, command: Sequence[str]) -> list[str]:
        """As this machine runs it there."""
        return ["ip", "netns", "exec", self.name, *command]

    def cut_off(self) -> None:
        """Pulls the cable: nothing is refused, nothing answers."""
        ip("link", "set", self.link, "down")

    def reconnect(self) -> None:
        ip("link", "set", self.link, "up")

    def kill(self) -> int:
        """SIGKILL to all its processes at once; how many there were."""
        killed = 0
        while pids := self.pids():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    killed += 1
            time.sleep(0.1)  # some were just starting others
        return killed

    def pids(self) -> list[int]:
        """Its processes that still run."""
        listed = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=False)
        return [pid for pid in map(int, listed.stdout.split()) if not is_zombie(pid)]


def is_zombie(pid: int) -> bool:
    """Whether a process has ended (and its parent has not looked yet)."""
    try:
        return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True


def ip(*arguments: str) -> str:
    """What iproute2's command writes; raises RuntimeError with what it says."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def free_network() -> str:
    """The first three numbers of a network that has no route: one that was killed leaves its own behind."""
    routes = ip("-4", "route", "show", "table", "all")
    return next(network for i in range(256) if f"{(network := f'10.77.{i}')}.0/24 " not in routes)


def why_not() -> str:
    """What is missing for hosts of one's own; empty where nothing is."""
    if shutil.which("ip") is None:
        return "iproute2 is not installed"
    return "" if os.geteuid() == 0 else "network namespaces need root"


@contextlib.contextmanager
def hosts(names: Sequence[str], folder: Path) -> Iterator[list[Host]]:
    """So many hosts, that reach one another and are reached from here; all of it goes with the block."""
    tag = f"dat{os.getpid() % 100_000}"  # interface names have 15 characters
    bridge = f"{tag}br"
    network = free_network()
    outside = f"{network}.254"  # this machine on the bridge
    made = [
        Host(f"{tag}-{name}", f"{network}.{i + 1}", f"{tag}{name}", folder / name) for i, name in enumerate(names)
    ]
    try:
        ip("link", "add", bridge, "type", "bridge")
        ip("addr", "add", f"{outside}/24", "dev", bridge)
        ip("link", "set", bridge, "up")
        for host in made:
            host.folder.mkdir()
            inside = f"{host.link}i"
            ip("netns", "add", host.name)
            ip("link", "add", host.link, "type", "veth", "peer", "name", inside)
            ip("link", "set", inside, "netns", host.name)
            ip("link", "set", host.link, "master", bridge, "up")
            ip("-n", host.name, "addr", "add", f"{host.address}/24", "dev", inside)
            ip("-n", host.name, "link", "set", inside, "up")
            ip("-n", host.name, "link", "set", "lo", "up")
            # nothing goes there, but programs ask the routes for their own address
            ip("-n", host.name, "route", "add", "default", "via", outside)
        yield made
    finally:
        for host in made:
            host.kill()
            for undo in (["link", "del", host.link], ["netns", "del", host.name]):
                with contextlib.suppress(RuntimeError):
                    ip(*undo)
        with contextlib.suppress(RuntimeError):
            ip("link", "del", bridge)
