"""Three hosts with a real `ray start` on each: one is cut off and one killed, while 8 trainers compare answers.

    python -m tests.cluster.three_hosts   # as root; DAT_CLUSTER_S=60 seconds of load

Host a is Ray's head and runs `dat serve`; every host has a proxy and, while there are three, a replica. Trainers
talk to a and b. First c is cut off: the answers that were under way there never arrive. Then its cable is plugged
in and Ray started there again, as an operator would do. At last b is killed, after its trainers have moved to a.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.processes import clean_environment
from dat_client import Client
from dat_service.launch import DAT, running_process
from dat_service.ray import haproxy
from tests.cluster.hosts import Host, hosts, why_not
from tests.load.answers import CODEC, SERVE, Answers, compute_answers
from tests.load.traffic import Traffic, show

SECONDS = float(os.environ.get("DAT_CLUSTER_S", "60"))
TRAINERS = 8
PORT, GCS_PORT = 8000, 6379
RAY = [sys.executable, "-m", "ray.scripts.scripts"]
TOKEN = secrets.token_hex(32)
CPUS = 2  # of each host for Ray, so that another host can take the replica of one that is gone


def three_hosts(seconds: float = SECONDS) -> dict[str, Any]:
    """Returns the figures; `errors` holds the errors of the trainers."""
    answers = compute_answers()
    with tempfile.TemporaryDirectory(prefix="dat-hosts-") as folder, hosts("abc", Path(folder)) as (a, b, c):
        try:
            with cluster(a, b, c) as service:
                figures = under_load(a, b, c, answers, seconds)
                figures["dat serve wrote"] = [line.strip() for line in service.lines[1:]][-5:]
                return figures
        except BaseException:
            for log in sorted([*Path(folder).glob("*/*.log"), *Path(folder).rglob("session_2*/logs/serve/*.log")]):
                print(f"--- {log.relative_to(folder)}\n{log.read_text()[-3000:]}", file=sys.stderr)
            raise


@contextlib.contextmanager
def cluster(a: Host, b: Host, c: Host) -> Iterator[Any]:
    """Starts Ray on all three, and `dat serve` on a."""
    start_ray(a, "--head", f"--port={GCS_PORT}")
    for host in (b, c):
        start_ray(host, f"--address={a.address}:{GCS_PORT}")
    command = [*DAT, "serve", *SERVE, "--host", "0.0.0.0", "--port", str(PORT), "--replicas", "3"]
    env = node_environment(a) | {"RAY_ADDRESS": f"{a.address}:{GCS_PORT}"}
    with running_process(a.command(command), url(a), env=clean_environment(env)) as service:
        for host in (a, b, c):
            with Client(url(host), CODEC) as client:
                client.wait_ready(120)
        yield service


def under_load(a: Host, b: Host, c: Host, answers: Answers, seconds: float) -> dict[str, Any]:
    """Runs 8 trainers for so many seconds; c is cut off in the first half, b killed in the second."""
    half = TRAINERS // 2
    with Traffic([url(a)] * half, answers) as on_a:
        with Traffic([url(b)] * half, answers) as on_b:
            time.sleep(seconds / 8)
            c.cut_off()
            before = on_a.answered + on_b.answered
            time.sleep(3 * seconds / 8)
            answered_without_c = on_a.answered + on_b.answered - before
        c.kill()  # Ray's processes there still believe in the cluster, which has given them up
        c.reconnect()
        with Traffic([url(a)] * half, answers) as moved:
            start_ray(c, f"--address={a.address}:{GCS_PORT}")
            time.sleep(seconds / 8)
            killed = b.kill()
            before = on_a.answered + moved.answered
            time.sleep(3 * seconds / 8)
            answered_without_b = on_a.answered + moved.answered - before
    parts = {"a": on_a.figures(), "b": on_b.figures(), "a, after b": moved.figures()}
    return {
        "seconds": seconds,
        "calls": sum(p["calls"] for p in parts.values()),
        "answered while c was cut off": answered_without_c,
        "answered after b was killed": answered_without_b,
        "processes killed on b": killed,
        "repeated by the client": sum(p["repeated by the client"] for p in parts.values()),
        "longest call, s": max(p.get("longest_s", 0.0) for p in parts.values()),
        "errors": [f"trainers of {name}: {error}" for name, p in parts.items() for error in p["errors"]],
    }


def url(host: Host) -> str:
    """Returns the codec's address: on a cluster that `dat serve` joins, it has a path of its own."""
    return f"http://{host.address}:{PORT}/{CODEC}"


def start_ray(host: Host, *arguments: str) -> None:
    """Runs `ray start` on a host where nothing else runs yet; returns when its raylet is up.

    Ray gives its own processes 30 s to start, which is too short on a busy machine, so it is tried three times.
    """
    command = [
        *RAY, "start", *arguments, f"--node-ip-address={host.address}", f"--num-cpus={CPUS}", "--num-gpus=0",
        f"--object-store-memory={128 << 20}", "--disable-usage-stats",
    ]  # fmt: skip
    if "--head" in arguments:
        command.append("--include-dashboard=false")
    for _ in range(3):
        process = host.start(command, node_environment(host), "ray.log")
        try:
            if process.wait(120) == 0:
                return
        except subprocess.TimeoutExpired:
            pass
        host.kill()
    raise RuntimeError(f"ray start on {host.name}: {(host.folder / 'ray.log').read_text()[-2000:]}")


def node_environment(host: Host) -> dict[str, str]:
    """Returns the environment for Ray on this host, with its files in the host's own folder.

    Real hosts have a /tmp each; these share one.
    """
    folder = host.folder
    return haproxy.SERVE | {
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(dat_haproxy(folder)),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_TMPDIR": str(folder),
        "RAY_AUTH_MODE": "token",  # Ray's default, which needs the same token on all nodes
        "RAY_AUTH_TOKEN": TOKEN,
        "RAY_worker_niceness": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def dat_haproxy(folder: Path) -> Path:
    """Returns the command that is installed beside Python, or a script that does the same."""
    installed = Path(sys.executable).with_name("dat-haproxy")
    if installed.exists():
        return installed
    script = folder / "dat-haproxy"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -m dat_service.ray.haproxy_wrapper "$@"\n')
    script.chmod(0o700)
    return script


if __name__ == "__main__":
    missing = why_not()
    if missing:
        raise SystemExit(missing)
    show("three hosts", three_hosts())
