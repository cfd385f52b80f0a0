"""The environment variables that configure HAProxy and the replicas' ports in Ray Serve."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from dat_service.ports import BLOCK, free_port

# The same for every service, on a Ray of its own or on a shared cluster, whose nodes need them when Ray is started.
SERVE = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    # With 0 the app is awaited with uvicorn's own receive and send: 19.9 ms instead of 23.4 ms for 2 x 19 MB.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    # An unhealthy replica has failed its requests already, and on a GPU its successor waits for its place.
    "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
    # The numbers that autoscale.py gets are at most so many seconds old.
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
    # How long a stopping replica still answers before it closes its port: HAProxy must be reloaded by then.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "3",
    # A dead HAProxy is started again after three of these periods: after 6 s instead of 30 s.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "2",
    # These checks notice a host that was cut off after at most 2 + 3 x 2 s. Faster checks would take a replica on a
    # busy machine for a dead one.
    "RAY_SERVE_HAPROXY_HEALTH_CHECK_INTER": "2s",
    "RAY_SERVE_HAPROXY_HEALTH_CHECK_FASTINTER": "500ms",
    "RAY_SERVE_HAPROXY_HEALTH_CHECK_FALL": "3",
    # Otherwise three refused connections in a row would also mark a replica as dead, and cut off its last responses
    # (haproxy_wrapper.py). A stopping replica does refuse connections: those of an HAProxy that was replaced, but
    # still has requests.
    "RAY_SERVE_HAPROXY_OBSERVE_MARK_DOWN_ENABLED": "0",
}


LOOPBACK = "127.0.0.1"  # Serve listens here if the service has started its Ray itself


def environment(folder: Path, host: str, port: int, first_port: int) -> dict[str, str]:
    """Returns the variables for a Ray that the service starts itself; HAProxy keeps its files in `folder`.

    `first_port` is the first port for replicas, from the block that ports.take_block reserves. Every path and port
    belongs to this service alone, so that two services can run side by side. Replicas listen on the address that
    Serve is given, so Serve gets LOOPBACK: otherwise replicas could be reached from other machines. dat-haproxy
    alone gets the real `host` and `port`. Writes the executable that Ray starts as its HAProxy.
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
        # With Ray's default of 5, the start fails on a busy machine: a proxy that is still starting counts as dead.
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "30",
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_port()),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(first_port),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(first_port + BLOCK - 1),  # exclusive
    }
