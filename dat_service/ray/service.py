"""Starts, updates and stops the applications of `dat serve` on Ray Serve."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import ray
from ray import serve
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE
from ray.serve.context import _check_cached_client_alive, _disconnect, _get_global_client

from dat_service import ports
from dat_service.processes import descendants, end, mentioning
from dat_service.ray import deployments, haproxy
from dat_service.ray.replica import CodecReplica
from dat_service.ray.version import check_version
from dat_service.settings import Settings
from dat_workers.system.ray_cluster import connect_ray

log = logging.getLogger("dat_service")


class ServeFailed(RuntimeError):
    """Ray, or an application on it, could not be started, updated or stopped. The message gives the reason."""


class RayService:
    """Serves one or more codecs on Ray Serve, each as an application with its own replicas.

    >>> service = RayService(Settings(port=8000))      # doctest: +SKIP
    >>> service.start()                                # doctest: +SKIP
    >>> service.stop()                                 # doctest: +SKIP

    If RAY_ADDRESS names a cluster, the service joins that cluster and does not change any unrelated application on
    it. Otherwise, the service starts its own Ray on this machine. All settings must have the same host and port.
    Tests may pass their own `replica_class`. Raises SettingsError for settings that cannot be served on any
    cluster.
    """

    def __init__(self, *settings: Settings, replica_class: type[CodecReplica] = CodecReplica) -> None:
        deployments.check(settings)
        self.settings = {s.codec: s for s in settings}
        self.host, self.port = settings[0].host, settings[0].port
        self.own_cluster = not os.environ.get("RAY_ADDRESS")
        self.prefixes = deployments.routes(list(self.settings), alone=self.own_cluster)
        self._replica_class = replica_class
        self._variables: dict[str, str] = {}  # variables that were added to this process's environment
        self._running: list[str] = []  # names of the applications that this service has started
        self._roots: set[psutil.Process] = set()  # processes that Ray started here
        self._folder = tempfile.TemporaryDirectory(prefix="dat-serve-")
        self._block: socket.socket | None = None  # this socket reserves the ports of the replicas
        self._stopping = False
        self._changes = threading.Lock()  # held during calls to Serve; after stop(), no such call may begin

    @property
    def urls(self) -> dict[str, str]:
        """The address of each codec, in the form that `Client` takes."""
        base = ports.http_url(self.host, self.port)
        return {codec: base + prefix.rstrip("/") for codec, prefix in self.prefixes.items()}

    def start(self) -> None:
        """Starts Ray and Serve, and returns when all codecs answer. Raises ServeFailed if that does not succeed."""
        try:
            check_version(ray.__version__)
            self._variables = self._environment()
            os.environ.update(self._variables)
            logging.getLogger("ray.serve").setLevel(logging.WARNING)
            try:
                self._start_ray()
            except Exception as error:
                if "timed out during startup" not in str(error):
                    raise
                # Ray waits 30 s for its own processes to start, which is not always enough on a busy machine.
                log.warning("Ray did not start within its time limit; trying once more")
                ray.shutdown()
                end(self._processes(), patience_s=0)
                self._start_ray()
            if not self.own_cluster:
                self._check_not_served()
            serve.start(
                proxy_location="HeadOnly" if self.own_cluster else "EveryNode",
                http_options={"host": haproxy.LOOPBACK if self.own_cluster else self.host, "port": self.port},
            )
            if not self.own_cluster:
                # if Serve already ran on that cluster, it keeps its own address, whatever the settings say
                client: Any = _get_global_client()
                self.host, self.port = client.http_config.host, client.http_config.port
            self.update()
        except ServeFailed:
            raise
        except Exception as error:
            raise ServeFailed(self._why(error)) from error

    def update(self) -> None:
        """Loads all codecs from the store again, replica by replica.

        Requests are served meanwhile: each old replica answers until a new replica takes its place. However, if no
        GPU is free for an additional replica, each old replica is stopped before its successor starts. A service
        with a single replica is then down until the new replica is loaded, and stays down if loading fails.

        Raises ServeFailed if the new replicas do not start; old replicas that have not been stopped then stay.
        """
        try:
            with self._changes:
                self._deploy()
                client: Any = _get_global_client()
            # serve.run_many could wait too, but it would hold the lock while it waits, and so delay stop()
            for codec in self.settings:
                client._wait_for_application_running(codec)
            client.wait_for_proxies_serving()
        except ServeFailed:
            raise
        except Exception as error:
            if self._stopping:
                raise ServeFailed("the service is stopping") from error
            raise ServeFailed(self._why(error)) from error

    def _deploy(self) -> None:
        """Makes Serve start new replicas of all codecs, but does not wait for them. Raises ServeFailed."""
        if self._stopping or not ray.is_initialized():  # otherwise Serve would start a new Ray
            raise ServeFailed("the service is stopping")
        present = ray.cluster_resources().get("GPU", 0)  # type: ignore[no-untyped-call]
        gpus = {codec: deployments.gpus_of(s, present) for codec, s in self.settings.items()}
        most = {codec: deployments.replica_range(s)[1] for codec, s in self.settings.items()}
        needed = sum(deployments.taken(gpus[codec], most[codec]) for codec in self.settings)
        if self.own_cluster and needed > present:
            raise ServeFailed(f"replicas ask for {needed:g} GPUs, and this machine has {present:g}; see --gpus")
        # One spare GPU is enough for all codecs: their new replicas start in turns, and each frees a GPU
        # afterwards.
        spare = present - needed
        if not self.own_cluster:  # unrelated applications on the cluster use GPUs too
            spare = min(spare, ray.available_resources().get("GPU", 0))  # type: ignore[no-untyped-call]
        on_cpu = sum(most[codec] for codec in self.settings if not gpus[codec])
        targets = []
        for codec, settings in self.settings.items():
            cpus: float = settings.threads or 1
            if self.own_cluster:
                # Only this service uses this Ray, so Ray need not count CPU cores, and replicas can share them.
                cpus = 0
                if not gpus[codec]:
                    settings = settings.model_copy(update={"threads": shared(settings, on_cpu)})
            app = deployments.application(
                settings,
                gpus=gpus[codec],
                cpus=cpus,
                # 1e-4 is the resolution with which Ray counts GPUs
                surge=not gpus[codec] or deployments.taken(gpus[codec]) <= spare + 1e-4,
                environment=None if self.own_cluster else deployments.REPLICA,
                replica=self._replica_class,
            )
            targets.append(serve.RunTarget(app, name=codec, route_prefix=self.prefixes[codec]))
        self._running = list(self.settings)
        serve.run_many(targets, blocking=False, wait_for_applications_running=False)

    def _start_ray(self) -> None:
        if not self.own_cluster:
            connect_ray(os.environ["RAY_ADDRESS"])
            return
        before = set(psutil.Process().children())
        try:
            connect_ray(None)
        finally:
            self._roots = set(psutil.Process().children()) - before

    def _check_not_served(self) -> None:
        """Raises ServeFailed if one of the codecs is already served on the cluster."""
        try:
            applications = serve.status().applications
        except Exception:  # Serve does not run on that cluster yet
            return
        for codec in self.settings:
            if codec in applications:
                raise ServeFailed(
                    f"{codec} is already served on this cluster; send SIGHUP to its `dat serve` to update it. "
                    f"If that process has ended, run: python -c 'from ray import serve; serve.delete(\"{codec}\")'"
                )

    def _why(self, error: Exception) -> str:
        """Returns the reason for a failure.

        This is the last line of the traceback that Serve has stored for a failed replica, if there is one.
        Otherwise it is the message of Serve's applications or, if they have none, that of the error.
        """
        try:
            with self._changes:
                if self._stopping or not ray.is_initialized():  # Serve would start a new Ray
                    return str(error)
                applications = serve.status().applications
            mine = [applications[codec] for codec in self.settings if codec in applications]
        except Exception:
            return str(error)
        texts = [a.message + "".join(d.message for d in a.deployments.values()) for a in mine]
        lines = [line.strip() for line in "\n".join(texts).splitlines() if "Error" in line]
        return lines[-1] if lines else "; ".join(text.strip() for text in texts if text.strip()) or str(error)

    def stop(self) -> None:
        """Lets requests finish and stops the applications; also stops Ray, if the service has started it itself.

        All processes that the service has started have then ended. Raises ServeFailed if an application on a shared
        cluster cannot be stopped.
        """
        # This comes first, because the descendants of a process can only be found while the process runs.
        ours = self._processes()
        failures: dict[str, Exception] = {}
        self._stopping = True
        started = ray.is_initialized()
        try:
            with self._changes:  # wait until a running update has passed its applications to Serve
                pass
            if started:
                # Applications are deleted first: serve.shutdown ends HAProxy at once, and so the responses in
                # progress.
                for codec in self._running:
                    try:
                        serve.delete(codec)
                    except Exception as error:  # the remaining applications must still be stopped
                        failures[codec] = error
                self._running = []
                if self.own_cluster:
                    failures.clear()
                    _shut_down_serve()
        finally:
            ours |= self._processes()
            ray.shutdown()
            # On a busy machine, processes end late, and HAProxy may have been started again meanwhile. If Ray did
            # not start, no process has been told to end, so there is nothing to wait for.
            for process in end(ours | self._processes(), patience_s=10 if started else 0):
                log.debug("process %d, which Ray had started, did not end without a signal", process.pid)
            self._folder.cleanup()
            for name in self._variables:  # so that the next service in this process sets its own values
                os.environ.pop(name, None)
            if self._block is not None:
                self._block.close()
        if failures:
            texts = "; ".join(f"{codec}: {error}" for codec, error in failures.items())
            raise ServeFailed(f"these applications may still run on the cluster: {texts}")

    def _processes(self) -> set[psutil.Process]:
        return descendants(self._roots) | mentioning(self._folder.name)

    def _environment(self) -> dict[str, str]:
        """Returns the variables to add to this process's environment, from which Ray's processes inherit them."""
        variables = {"RAY_USAGE_STATS_ENABLED": "0"} | haproxy.SERVE
        if self.own_cluster:
            self._block = ports.take_block(self.port)
            first_port = self._block.getsockname()[1] + 1
            variables |= haproxy.environment(
                Path(self._folder.name), self.host, self.port, first_port, self.prefixes.values()
            )
            variables |= deployments.REPLICA
            # With Ray's default of 15, all other processes would have priority.
            variables["RAY_worker_niceness"] = "0"
            # Otherwise, Ray would store a record of its last 100,000 calls (Serve alone makes several per second)
            # and metrics from HAProxy's log, which take 20 MB after 20,000 requests. /metrics has the service's
            # own.
            variables["RAY_task_events_report_interval_ms"] = "0"
            variables["RAY_enable_metrics_collection"] = "0"
        # variables that the operator has set already keep their values
        return {name: value for name, value in variables.items() if name not in os.environ}


def _shut_down_serve(timeout_s: float = 30.0) -> None:
    """Ends Serve's actors, HAProxy among them, and returns when its controller has ended.

    serve.shutdown() does the same, but it waits inside a call to the controller, and when the controller ends, Ray
    prints that this call failed and will be repeated. Logs a warning if the controller does not end in time.
    """
    client: Any = _check_cached_client_alive()[0]
    if client is None:  # Serve was not started, or its Ray has ended
        return
    client.shutdown_cached_handles()
    deadline = time.monotonic() + timeout_s
    with contextlib.suppress(ray.exceptions.RayActorError):  # it has ended already
        ray.get(client._controller.graceful_shutdown.remote(wait=False), timeout=timeout_s)
    while time.monotonic() < deadline:
        try:
            ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
        except ValueError:
            break
        time.sleep(0.05)
    else:
        log.warning("Ray Serve's controller did not end within %g s", timeout_s)
    _disconnect()  # type: ignore[no-untyped-call]


def shared(settings: Settings, replicas: int) -> int:
    """Returns the number of CPU threads for each replica, if `replicas` replicas share this machine."""
    return settings.threads or max(1, settings.engine_config.cpu_threads // replicas)
