"""The app as a Ray Serve application: the replica is itself the HTTP ingress, behind HAProxy."""

from __future__ import annotations

import logging
import os
import socket
import tempfile
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from dat_service.settings import Settings

BLOCK = 100  # ports a service keeps for its replicas


class CodecReplica:
    """One Ray Serve replica: loads the codec, then builds the app, in a process of its own."""

    def __init__(self, settings: dict[str, Any]) -> None:
        from ray import serve

        from dat_service.worker import CodecWorker

        context = serve.get_replica_context()
        self.application = context.app_name
        self.worker = CodecWorker(Settings(**settings), replica=context.replica_id.unique_id)
        self.worker.load()

    def __serve_build_asgi_app__(self) -> FastAPI:
        from dat_service.app import create_app
        from dat_service.gather import Gather

        return create_app(self.worker, gather=Gather(self.worker.metrics, self.application))


class ServeFailed(RuntimeError):
    """Ray or the application on it did not start; the message says why."""


class RayService:
    """The service on Ray Serve, from start to stop.

    >>> service = RayService(Settings(port=8000))      # doctest: +SKIP
    >>> service.start()                                # doctest: +SKIP
    >>> service.stop()                                 # doctest: +SKIP

    Starts a Ray of its own on this machine, or joins the cluster that RAY_ADDRESS names. Every path and port
    of HAProxy is this service's own, so that two services run side by side.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.own_cluster = not os.environ.get("RAY_ADDRESS")
        self.prefix = "/" if self.own_cluster else f"/{settings.codec}"  # others may serve on that cluster
        self._folder = tempfile.TemporaryDirectory(prefix="dat-serve-")

    def start(self) -> None:
        """Returns when the codec is loaded and answers; raises ServeFailed."""
        os.environ.update(self._environment())
        import ray
        from ray import serve

        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        settings = self.settings
        try:
            ray.init(
                address="local" if self.own_cluster else os.environ["RAY_ADDRESS"],
                namespace="dat",
                include_dashboard=False,
                configure_logging=False,
                log_to_driver=False,
            )
            serve.start(
                proxy_location="HeadOnly" if self.own_cluster else "EveryNode",
                http_options={"host": settings.host, "port": settings.port},
            )
            resources = ray.cluster_resources()  # type: ignore[no-untyped-call]
            gpus = self._gpus(resources.get("GPU", 0))
            deployment = serve.deployment(
                name="codec",
                num_replicas=1,
                max_ongoing_requests=2 * settings.max_requests,  # the app refuses first, with a Retry-After
                ray_actor_options={"num_gpus": gpus},
                graceful_shutdown_timeout_s=5,
            )(serve.ingress()(CodecReplica))
            serve.run(
                deployment.bind(settings.model_dump()),
                name=settings.codec,
                route_prefix=self.prefix,
                blocking=False,
            )
        except ServeFailed:
            raise
        except Exception as error:
            why = self._why()
            raise ServeFailed(f"{why or error}") from error

    def _gpus(self, present: float) -> int:
        """GPUs of one replica. Ray shows a replica only those it asks for, so `auto` has to ask."""
        device = self.settings.device
        if device not in ("auto", "cpu", "cuda"):
            raise ServeFailed(f"device is {device!r}: on Ray it is auto, cpu or cuda, and Ray picks the GPU")
        if device == "cuda" and present < 1:
            raise ServeFailed("device is 'cuda', and no node of this Ray has a GPU")
        return 1 if device != "cpu" and present >= 1 else 0

    def _why(self) -> str | None:
        """The last line of the traceback that Serve keeps of a replica that would not start."""
        from ray import serve

        try:
            application = serve.status().applications[self.settings.codec]
        except Exception:
            return None
        text = application.message + "".join(d.message for d in application.deployments.values())
        lines = [line.strip() for line in text.splitlines() if "Error" in line]
        return lines[-1] if lines else text.strip() or None

    def stop(self) -> None:
        """Ends the application, and Ray where it is ours. Nothing is left running."""
        import ray
        from ray import serve

        if ray.is_initialized():
            if self.own_cluster:
                serve.shutdown()  # type: ignore[no-untyped-call]
            else:
                serve.delete(self.settings.codec)
            ray.shutdown()
        self._folder.cleanup()

    def _environment(self) -> dict[str, str]:
        folder = Path(self._folder.name)
        first = free_block(self.settings.port)
        variables = {
            "RAY_SERVE_ENABLE_HA_PROXY": "1",
            "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
            "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
            "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
            "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
            "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
            "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
            "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(first),
            "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(first + BLOCK),
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        # what the operator has set stands
        return {name: value for name, value in variables.items() if name not in os.environ}


def free_block(port: int) -> int:
    """The first of 100 ports for the replicas of the service on `port`.

    Ray numbers them from 30000 in every cluster and opens them with SO_REUSEPORT: of two clusters on one machine,
    each would get some of the other's requests. Blocks lie below the ports that Linux gives to connections.
    """
    for i in range(200):
        first = 10_000 + (port + i) % 200 * BLOCK
        if all(is_free(p) for p in range(first, first + BLOCK)):
            return first
    raise ServeFailed("no 100 free ports in a row between 10000 and 30000 for the replicas")


def is_free(port: int) -> bool:
    """Whether nobody on this machine listens on a TCP port."""
    with socket.socket() as s:
        try:
            s.bind(("", port))
        except OSError:
            return False
        return True


def free_port() -> int:
    """A TCP port that nobody listens on at this moment."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port
