"""`dat serve` on Ray Serve, from start to stop."""

from __future__ import annotations

import logging
import os
import socket
import tempfile
import threading
from pathlib import Path
from typing import Any

import psutil
import ray
from ray import serve
from ray.serve.context import _get_global_client

from dat_service import ports
from dat_service.processes import descendants, end, mentioning
from dat_service.ray import deployments, haproxy
from dat_service.ray.replica import CodecReplica
from dat_service.ray.version import check_version
from dat_service.settings import Settings
from dat_workers.system.signals import delayed_signals

log = logging.getLogger("dat_service")


class ServeFailed(RuntimeError):
    """Ray, or an application on it, did not start or stop; the message says why."""


class RayService:
    """Serves one or more codecs on Ray Serve, each as an application with replicas of its own.

    >>> service = RayService(Settings(port=8000))      # doctest: +SKIP
    >>> service.start()                                # doctest: +SKIP
    >>> service.stop()                                 # doctest: +SKIP

    Starts a Ray of its own on this machine; if RAY_ADDRESS names a cluster, joins it instead and leaves everything
    else that is served there alone. All settings must have the same host and port. `replica_class` is for stand-ins
    in tests. Raises SettingsError for settings that cannot be served on any Ray cluster.
    """

    def __init__(self, *settings: Settings, replica_class: type[CodecReplica] = CodecReplica) -> None:
        deployments.check(settings)
        self.settings = {s.codec: s for s in settings}
        self.host, self.port = settings[0].host, settings[0].port
        self.own_cluster = not os.environ.get("RAY_ADDRESS")
        self.prefixes: dict[str, str] = {}
        self._replica_class = replica_class
        self._variables: dict[str, str] = {}  # added to this process's environment
        self._running: list[str] = []  # names of our applications
        self._roots: set[psutil.Process] = set()  # processes that Ray started here
        self._folder = tempfile.TemporaryDirectory(prefix="dat-serve-")
        self._block: socket.socket | None = None  # reserves the replicas' ports
        self._stopping = False
        self._changes = threading.Lock()  # held while calling Serve, which nothing may do after stop()

    @property
    def urls(self) -> dict[str, str]:
        """The address of each codec, as `Client` takes it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return {codec: f"http://{host}:{self.port}{p.rstrip('/')}" for codec, p in self.prefixes.items()}

    def start(self) -> None:
        """Returns when all codecs are loaded and answer; raises ServeFailed."""
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
                # Ray waits 30 s for its own processes, which is not always enough on a busy machine.
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
                # if Serve ran on that cluster before, it keeps its address whatever the settings are
                client: Any = _get_global_client()
                self.host, self.port = client.http_config.host, client.http_config.port
            self.prefixes = deployments.routes(list(self.settings), alone=self.own_cluster)
            self.update()
        except ServeFailed:
            raise
        except Exception as error:
            raise ServeFailed(self._why(error)) from error

    def update(self) -> None:
        """Loads all codecs from the store again, replica by replica. Raises ServeFailed; then the old ones stay.

        Requests are served meanwhile: old replicas answer until as many new ones do. If no GPU is free for one more
        replica, each old one is stopped first: a service with a single replica is then down until the new one is
        loaded, and stays down if that fails.
        """
        try:
            with self._changes:
                self._deploy()
                client: Any = _get_global_client()
            # serve.run_many can wait too, but would keep the lock as long, and stop() with it
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
        """Asks Serve for new replicas of all codecs, without waiting for them."""
        if self._stopping or not ray.is_initialized():  # otherwise Serve would start another Ray
            raise ServeFailed("the service is stopping")
        present = ray.cluster_resources().get("GPU", 0)  # type: ignore[no-untyped-call]
        gpus = {codec: deployments.gpus_of(s, present) for codec, s in self.settings.items()}
        most = {codec: deployments.replica_range(s)[1] for codec, s in self.settings.items()}
        needed = sum(deployments.taken(gpus[codec], most[codec]) for codec in self.settings)
        if self.own_cluster and needed > present:
            raise ServeFailed(f"replicas ask for {needed:g} GPUs, and this machine has {present:g}; see --gpus")
        # The codecs may take turns with one spare GPU for their new replicas: each gives it back afterwards.
        spare = present - needed
        if not self.own_cluster:  # other applications use GPUs too
            spare = min(spare, ray.available_resources().get("GPU", 0))  # type: ignore[no-untyped-call]
        on_cpu = sum(most[codec] for codec in self.settings if not gpus[codec])
        targets = []
        for codec, settings in self.settings.items():
            cpus: float = settings.threads or 1
            if self.own_cluster:
                # nothing else asks this Ray for cores, so it need not count them, and replicas can share them
                cpus = 0
                if not gpus[codec]:
                    settings = settings.model_copy(update={"threads": shared(settings, on_cpu)})
            app = deployments.application(
                settings,
                gpus=gpus[codec],
                cpus=cpus,
                surge=not gpus[codec] or deployments.taken(gpus[codec]) <= spare + 1e-4,  # Ray's resolution
                environment=None if self.own_cluster else deployments.REPLICA,
                replica=self._replica_class,
            )
            targets.append(serve.RunTarget(app, name=codec, route_prefix=self.prefixes[codec]))
        self._running = list(self.settings)
        serve.run_many(targets, blocking=False, wait_for_applications_running=False)

    def _start_ray(self) -> None:
        before = set(psutil.Process().children())
        try:
            with delayed_signals():
                ray.init(
                    address="local" if self.own_cluster else os.environ["RAY_ADDRESS"],
                    namespace="dat",
                    include_dashboard=False,
                    configure_logging=False,
                    log_to_driver=False,
                )
        finally:
            self._roots = set(psutil.Process().children()) - before

    def _check_not_served(self) -> None:
        """Raises ServeFailed if one of the codecs is already served on the cluster."""
        try:
            applications = serve.status().applications
        except Exception:  # Serve does not run there yet
            return
        for codec in self.settings:
            if codec in applications:
                raise ServeFailed(
                    f"{codec} is already served on this cluster; send SIGHUP to its `dat serve` to update it. "
                    f"If that has ended: python -c 'from ray import serve; serve.delete(\"{codec}\")'"
                )

    def _why(self, error: Exception) -> str:
        """Returns the last line of the traceback that Serve keeps of a failed replica, else the error's message."""
        try:
            with self._changes:
                if self._stopping or not ray.is_initialized():  # Serve would start another Ray
                    return str(error)
                applications = serve.status().applications
            mine = [applications[codec] for codec in self.settings if codec in applications]
        except Exception:
            return str(error)
        texts = [a.message + "".join(d.message for d in a.deployments.values()) for a in mine]
        lines = [line.strip() for line in "\n".join(texts).splitlines() if "Error" in line]
        return lines[-1] if lines else "; ".join(text.strip() for text in texts if text.strip()) or str(error)

    def stop(self) -> None:
        """Lets requests finish, stops the applications, and Ray if it is our own. Leaves no process running.

        Raises ServeFailed if Serve, on a shared cluster, does not stop an application.
        """
        # taken first, because the descendants of a process can only be found while it runs
        ours = self._processes()
        failures: dict[str, Exception] = {}
        self._stopping = True
        started = ray.is_initialized()
        try:
            with self._changes:  # a running update hands its applications to Serve first; no other begins now
                pass
            if started:
                # serve.shutdown ends HAProxy at once, and with it the responses that replicas are still sending
                for codec in self._running:
                    try:
                        serve.delete(codec)
                    except Exception as error:  # the others must be stopped all the same
                        failures[codec] = error
                self._running = []
                if self.own_cluster:
                    failures.clear()
                    serve.shutdown()  # type: ignore[no-untyped-call]
        finally:
            ours |= self._processes()
            ray.shutdown()
            # Processes end late on a busy machine, and HAProxy may have been started again meanwhile. If Ray did
            # not start, none of them was asked to end, so there is nothing to wait for.
            for process in end(ours | self._processes(), patience_s=10 if started else 0):
                log.debug("process %d, started by Ray, did not end without a signal", process.pid)
            self._folder.cleanup()
            for name in self._variables:  # another service in this process sets its own
                os.environ.pop(name, None)
            if self._block is not None:
                self._block.close()
        if failures:
            texts = "; ".join(f"{codec}: {error}" for codec, error in failures.items())
            raise ServeFailed(f"these applications may still run on the cluster: {texts}")

    def _processes(self) -> set[psutil.Process]:
        return descendants(self._roots) | mentioning(self._folder.name)

    def _environment(self) -> dict[str, str]:
        """Returns the variables to add to this process's environment, which Ray's processes inherit."""
        variables = {"RAY_USAGE_STATS_ENABLED": "0"} | haproxy.SERVE
        if self.own_cluster:
            self._block = ports.take_block(self.port)
            first_port = self._block.getsockname()[1] + 1
            variables |= haproxy.environment(Path(self._folder.name), self.host, self.port, first_port)
            variables |= deployments.REPLICA
            variables["RAY_worker_niceness"] = "0"  # with Ray's default of 15, every other process has priority
            # Ray would store a record of its last 100,000 calls, several of which Serve makes per second by itself,
            # and metrics of what HAProxy logs: 20 MB more after 20,000 requests. Ours are in /metrics.
            variables["RAY_task_events_report_interval_ms"] = "0"
            variables["RAY_enable_metrics_collection"] = "0"
        # variables that the operator has set take precedence
        return {name: value for name, value in variables.items() if name not in os.environ}


def shared(settings: Settings, replicas: int) -> int:
    """Returns the CPU threads for each of several replicas that share this machine."""
    return settings.threads or max(1, settings.engine_config.cpu_threads // replicas)
