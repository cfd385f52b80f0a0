"""Defines the environment variables with which Ray Serve configures HAProxy and the ports of replicas."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable
from pathlib import Path

from dat_service.ports import BLOCK

# These are the same for every service. On a shared cluster, the nodes need them in their environment when Ray is
# started.
SERVE = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    # With 0, the app gets uvicorn's own receive and send: 2 x 19 MB take 19.9 ms instead of 23.4 ms.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    # An unhealthy replica need not finish any request: it has failed them all already. On a GPU, its successor can
    # only start when the GPU is free.
    "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
    # The numbers that autoscale.py gets are at most this many seconds old.
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
    # A stopping replica still answers for this many seconds before it closes its port. By then, HAProxy must have
    # loaded a configuration without it.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "3",
    # A dead HAProxy is started again after three of these periods, which is 6 s instead of 30 s.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "2",
    # With these checks, HAProxy notices within 2 + 3 x 2 s that a host has been cut off. With faster checks, a
    # replica on a busy machine would be mistaken for a dead one.
    "RAY_SERVE_HAPROXY_HEALTH_CHECK_INTER": "2s",
    "RAY_SERVE_HAPROXY_HEALTH_CHECK_FASTINTER": "500ms",
    "RAY_SERVE_HAPROXY_HEALTH_CHECK_FALL": "3",
    # Otherwise, three refused connections in a row would also mark a replica as dead, and its last responses would
    # be cut off (haproxy_wrapper.py). A stopping replica does refuse connections: those of an old HAProxy process
    # that has been replaced but still has requests.
    "RAY_SERVE_HAPROXY_OBSERVE_MARK_DOWN_ENABLED": "0",
}


LOOPBACK = "127.0.0.1"  # Serve listens on this address if the service has started its Ray itself


def environment(folder: Path, host: str, port: int, first_port: int, prefixes: Iterable[str]) -> dict[str, str]:
    """Returns the environment variables for a Ray that the service starts itself.

    Also writes the executable `dat-haproxy` into `folder`, which Ray starts as its HAProxy. HAProxy keeps its files
    in the same folder. `first_port` is the first port for replicas, from the block that ports.take_block reserves.
    `prefixes` are the routes of the codecs (deployments.routes). No path and no port is shared with a second
    service, so that two services can run side by side.

    Replicas listen on the same address as Serve. That address must be LOOPBACK, because otherwise replicas could be
    reached from remote machines. Only dat-haproxy listens on the real `host` and `port`.
    """
    binary = folder / "dat-haproxy"
    own = ",".join([f"{host}:{port}", *prefixes])
    command = shlex.join([sys.executable, "-m", "dat_service.ray.haproxy_wrapper", "--own", own])
    binary.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    binary.chmod(0o700)
    return SERVE | {
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(binary),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        # With Ray's default of 5 s, the start fails on a busy machine, because a proxy that is still starting
        # counts as dead.
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "30",
        # Serve's own proxy listens on the last port of the block. It needs its port again after a fault, and an
        # ephemeral port could belong to any connection by then.
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(first_port + BLOCK - 2),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(first_port),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(first_port + BLOCK - 2),  # the maximum is exclusive
    }
