"""`dat serve` on Ray Serve, from start to stop."""

from __future__ import annotations

import logging
import os
import socket
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from dat_service import ports
from dat_service.ray import haproxy
from dat_service.ray.processes import descendants, end, mentioning
from dat_service.ray.version import check_version
from dat_service.settings import Settings
from dat_workers.system.signals import delayed_signals

if TYPE_CHECKING:
    from dat_service.ray.replica import CodecReplica

log = logging.getLogger("dat_service")


class ServeFailed(RuntimeError):
    """Ray or an application on it did not start; the message says why."""


class RayService:
    """One or more codecs on Ray Serve, each an application with replicas of its own.

    >>> service = RayService(Settings(port=8000))      # doctest: +SKIP
    >>> service.start()                                # doctest: +SKIP
    >>> service.stop()                                 # doctest: +SKIP

    Starts a Ray of its own on this machine, or joins the cluster that RAY_ADDRESS names, and leaves what else is
    served there alone. All settings have the same host and port; `replica_class` is for stand-ins under test.
    Raises SettingsError for settings that no Ray could serve.
    """

    def __init__(self, *settings: Settings, replica_class: type[CodecReplica] | None = None) -> None:
        from dat_service.ray.deployments import check

        check(settings)
        self.settings = {s.codec: s for s in settings}
        self.host, self.port = settings[0].host, settings[0].port
        self.own_cluster = not os.environ.get("RAY_ADDRESS")
        self.prefixes: dict[str, str] = {}
        self._replica_class = replica_class
        self._variables: dict[str, str] = {}  # what we added to this process's environment
        self._running: list[str] = []  # names of our applications on a cluster that is not ours
        self._roots: set[psutil.Process] = set()  # what Ray began here
        self._folder = tempfile.TemporaryDirectory(prefix="dat-serve-")
        self._block: socket.socket | None = None  # holds our replicas' ports
        self._stopping = False
        self._changes = threading.Lock()  # held by who asks Serve for something: after stop() nobody may

    @property
    def urls(self) -> dict[str, str]:
        """Address of each codec, as `Client` takes it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return {codec: f"http://{host}:{self.port}{p.rstrip('/')}" for codec, p in self.prefixes.items()}

    def start(self) -> None:
        """Returns when all codecs are loaded and answer; raises ServeFailed."""
        try:
            self._variables = self._environment()
            os.environ.update(self._variables)
            import ray
            from ray import serve

            check_version(ray.__version__)
            from dat_service.ray.deployments import routes

            logging.getLogger("ray.serve").setLevel(logging.WARNING)
            try:
                self._start_ray()
            except Exception as error:
                if "timed out during startup" not in str(error):
                    raise
                # Ray waits 30 s for its own processes, which a machine with much to do may need longer for
                log.warning("Ray did not start in its time: once more")
                ray.shutdown()
                end(self._processes(), patience_s=0)
                self._start_ray()
            if not self.own_cluster:
                self._look_around()
            serve.start(
                proxy_location="HeadOnly" if self.own_cluster else "EveryNode",
                http_options={"host": haproxy.LOOPBACK if self.own_cluster else self.host, "port": self.port},
            )
            if not self.own_cluster:
                self._read_address()
            self.prefixes = routes(list(self.settings), alone=self.own_cluster)
            self.update()
        except ServeFailed:
            raise
        except Exception as error:
            why = self._why()
            raise ServeFailed(f"{why or error}") from error

    def update(self) -> None:
        """Loads all codecs anew from the store, replica by replica; raises ServeFailed, and the old ones stay.

        Requests go on meanwhile: old replicas answer until as many new ones do. Where no GPU is left for one more
        replica, each old one is stopped first: a service of one replica is then away until the new one is loaded,
        and stays away where that does not load.
        """
        from ray.serve.context import _get_global_client

        try:
            with self._changes:
                self._deploy()
                client: Any = _get_global_client()
            for codec in self.settings:
                client._wait_for_application_running(codec)
            client.wait_for_proxies_serving()
        except ServeFailed:
            raise
        except Exception as error:
            if self._stopping:
                raise ServeFailed("the service is stopping") from error
            why = self._why()
            raise ServeFailed(f"{why or error}") from error

    def _deploy(self) -> None:
        """Asks Serve for new replicas of all codecs, and does not wait for them."""
        import ray
        from ray import serve

        from dat_service.ray.deployments import REPLICA, application, gpus_of, replica_range, taken
        from dat_service.ray.replica import CodecReplica

        if self._stopping or not ray.is_initialized():  # Serve would start another Ray
            raise ServeFailed("the service is stopping")
        present = ray.cluster_resources().get("GPU", 0)  # type: ignore[no-untyped-call]
        gpus = {codec: gpus_of(s, present) for codec, s in self.settings.items()}
        asked = sum(taken(gpus[codec], replica_range(s)[1]) for codec, s in self.settings.items())
        if self.own_cluster and asked > present:
            raise ServeFailed(f"replicas ask for {asked:g} GPUs, and this machine has {present:g}; see --gpus")
        # the codecs' extra replicas may share one place: whose turn it is gives it back
        spare = present - asked
        if not self.own_cluster:  # others' work has its GPUs too
            spare = min(spare, ray.available_resources().get("GPU", 0))  # type: ignore[no-untyped-call]
        on_cpu = sum(replica_range(s)[1] for codec, s in self.settings.items() if not gpus[codec])
        targets = []
        for codec, settings in self.settings.items():
            cpus: float = settings.threads or 1
            if self.own_cluster:
                # Ray need not count cores that nobody else asks it for, and replicas share them
                cpus = 0
                if not gpus[codec]:
                    settings = settings.model_copy(update={"threads": shared(settings, on_cpu)})
            app = application(
                settings,
                gpus=gpus[codec],
                cpus=cpus,
                surge=not gpus[codec] or taken(gpus[codec]) <= spare + 1e-4,  # what Ray resolves
                environment=None if self.own_cluster else REPLICA,
                replica=self._replica_class or CodecReplica,
            )
            targets.append(serve.RunTarget(app, name=codec, route_prefix=self.prefixes[codec]))
        self._running = list(self.settings)
        serve.run_many(targets, blocking=False, wait_for_applications_running=False)

    def _start_ray(self) -> None:
        import ray

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

    def _look_around(self) -> None:
        """Raises ServeFailed where a codec is served on the cluster already."""
        from ray import serve

        try:
            applications = serve.status().applications
        except Exception:  # no Serve there yet
            return
        for codec in self.settings:
            if codec in applications:
                raise ServeFailed(
                    f"{codec} is served on this cluster already; its `dat serve` updates it on SIGHUP, and "
                    f"if that one is gone: python -c 'from ray import serve; serve.delete(\"{codec}\")'"
                )

    def _read_address(self) -> None:
        """Where Serve listens: if it ran on that cluster before, then not where the settings say."""
        from ray.serve.context import _get_global_client

        client: Any = _get_global_client()
        self.host, self.port = client.http_config.host, client.http_config.port

    def _why(self) -> str | None:
        """The last line of the traceback that Serve keeps of a replica that would not start."""
        import ray
        from ray import serve

        try:
            with self._changes:
                if self._stopping or not ray.is_initialized():  # asking would start another Ray
                    return None
                applications = serve.status().applications
            mine = [applications[codec] for codec in self.settings if codec in applications]
        except Exception:
            return None
        texts = [a.message + "".join(d.message for d in a.deployments.values()) for a in mine]
        lines = [line.strip() for line in "\n".join(texts).splitlines() if "Error" in line]
        return lines[-1] if lines else "; ".join(text.strip() for text in texts if text.strip()) or None

    def stop(self) -> None:
        """Lets requests end, ends the applications, and Ray where it is ours. Nothing is left running.

        Raises ServeFailed where Serve, on a cluster that is not ours, does not end an application.
        """
        import ray
        from ray import serve

        # before all else: where something came from is known only while its parents run
        ours = self._processes()
        left: dict[str, Exception] = {}
        self._stopping = True
        started = ray.is_initialized()
        try:
            with self._changes:  # an update that has begun to ask has asked; none begins any more
                pass
            if started:
                # Serve's own shutdown ends HAProxy at once, and with it what the replicas are still answering
                for codec in self._running:
                    try:
                        serve.delete(codec)
                    except Exception as error:  # the others are to end all the same
                        left[codec] = error
                self._running = []
                if self.own_cluster:
                    left.clear()
                    serve.shutdown()  # type: ignore[no-untyped-call]
        finally:
            ours |= self._processes()
            ray.shutdown()
            # each takes its time on a busy machine, and HAProxy may have been started anew meanwhile; where Ray
            # did not start, nothing of it has been told to end
            for process in end(ours | self._processes(), patience_s=10 if started else 0):
                log.debug("process %d, begun by Ray, did not end by itself", process.pid)
            self._folder.cleanup()
            for name in self._variables:  # another service in this process has its own
                os.environ.pop(name, None)
            if self._block is not None:
                self._block.close()
        if left:
            said = "; ".join(f"{codec}: {error}" for codec, error in left.items())
            raise ServeFailed(f"on the cluster there may still be {said}")

    def _processes(self) -> set[psutil.Process]:
        return descendants(self._roots) | mentioning(self._folder.name)

    def _environment(self) -> dict[str, str]:
        from dat_service.ray.deployments import REPLICA

        variables = {"RAY_USAGE_STATS_ENABLED": "0"} | haproxy.SERVE
        if self.own_cluster:
            self._block = ports.take_block(self.port)
            first = self._block.getsockname()[1] + 1
            variables |= haproxy.environment(Path(self._folder.name), self.host, self.port, first) | REPLICA
            variables["RAY_worker_niceness"] = "0"  # Ray's own choice is 15: anything beside it comes first
            # Ray would keep a record of its last 100,000 calls, of which Serve makes some a second by itself, and
            # figures of what HAProxy logs: 20 MB more after 20,000 requests. Ours are in /metrics.
            variables["RAY_task_events_report_interval_ms"] = "0"
            variables["RAY_enable_metrics_collection"] = "0"
        # what the operator has set stands
        return {name: value for name, value in variables.items() if name not in os.environ}


def shared(settings: Settings, replicas: int) -> int:
    """CPU threads of each of so many replicas on this machine."""
    return settings.threads or max(1, settings.engine_config.cpu_threads // replicas)
