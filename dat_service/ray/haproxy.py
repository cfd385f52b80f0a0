"""What Ray Serve is told about HAProxy and its replicas' ports, in the variables that it reads."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from dat_service.ports import BLOCK, free_port

# The same for every service, on a Ray of its own or on another's; `dat serve --serve-config` names them too.
SERVE = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    # the app is awaited with uvicorn's own receive and send: 19.9 ms instead of 23.4 for 2 x 19 MB
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    # a replica that says it is unhealthy has failed its requests already; on a GPU the next one waits for its place
    "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
    # what autoscale.py sees is at most so old
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
    # a replica that leaves answers for so long before it closes its port: by then HAProxy has to be reloaded
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "3",
    # an HAProxy that died is started anew after three of these: after 6 s instead of 30
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "2",
    # A host that was cut off is seen by these checks, after at most 2 + 3 x 2 s. Faster ones take a replica whose
    # machine is busy for a dead one.
    "RAY_SERVE_HAPROXY_HEALTH_CHECK_INTER": "2s",
    "RAY_SERVE_HAPROXY_HEALTH_CHECK_FASTINTER": "500ms",
    "RAY_SERVE_HAPROXY_HEALTH_CHECK_FALL": "3",
    # Three refused connections in a row would also count as a dead replica, and its last answers be cut off
    # (haproxy_wrapper.py), in an HAProxy that was replaced but still has requests: a replica that leaves refuses.
    "RAY_SERVE_HAPROXY_OBSERVE_MARK_DOWN_ENABLED": "0",
}


LOOPBACK = "127.0.0.1"  # where Serve is told to listen on a Ray of one's own


def environment(folder: Path, host: str, port: int, first: int) -> dict[str, str]:
    """Variables for a Ray of one's own, whose HAProxy keeps its files in `folder` and serves on `host` and `port`.

    `first` is the first port for replicas, of those that ports.take_block holds.
    Every path and port is this service's own, so that two services run side by side. Serve would have its replicas
    listen where HAProxy does, open to strangers: it is told LOOPBACK, and dat-haproxy the real host. Writes the
    executable that Ray starts as its HAProxy.
    """
    binary = folder / "dat-haproxy"
    command = shlex.join([sys.executable, "-m", "dat_service.ray.haproxy_wrapper", "--listen", f"{host}:{port}"])
    binary.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
    binary.chmod(0o700)
    return SERVE | {
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(binary),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        # Ray's own choice is 5: on a busy machine it takes a proxy for dead that has not begun, and the start fails
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "30",
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_port()),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(first),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(first + BLOCK - 1),  # left out itself
    }
