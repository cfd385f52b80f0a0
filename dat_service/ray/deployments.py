"""Turns settings into Ray Serve applications, one for each codec."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ray import serve
from ray.serve import Application

from dat_service.ray import haproxy
from dat_service.ray.replica import CodecReplica
from dat_service.ray.version import check_version
from dat_service.settings import Settings, SettingsError

NAME = "codec"  # of the single deployment in each application

# Variables that a replica's process reads. OpenMP's threads spin while they wait unless they are PASSIVE: next to a
# busy process, a replica on a CPU computes 2 images per second with spinning threads, and 10 without.
REPLICA = {"OMP_WAIT_POLICY": "PASSIVE"} | {
    name: haproxy.SERVE[name]
    for name in (
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD",
        "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S",
    )
}


def build(arguments: dict[str, Any]) -> Application:
    """Builds an application for `serve run` and `serve deploy`, which call it dat_service.ray.deployments:build.

    >>> build({"codec": "identity"})     # doctest: +SKIP

    On GPUs an update stops an old replica before it starts a new one, because other applications may need the GPUs
    that are free now. If a GPU is sure to be free, set `max_surge_percent: 1` under `deployments` in the
    configuration: then the new replica starts first.
    """
    import ray

    check_version(ray.__version__)
    settings = Settings(**arguments)
    present = ray.cluster_resources().get("GPU", 0)  # type: ignore[no-untyped-call]
    gpus = gpus_of(settings, present)
    return application(settings, gpus=gpus, cpus=settings.threads or 1, surge=not gpus)


def application(
    settings: Settings,
    *,
    gpus: float,
    cpus: float,
    surge: bool = True,
    environment: dict[str, str] | None = None,
    replica: type[CodecReplica] = CodecReplica,
) -> Application:
    """Returns the application of one codec; each of its replicas reserves `gpus` and `cpus` from Ray."""
    deployment_options = options(settings, gpus=gpus, cpus=cpus, surge=surge)
    if environment:
        deployment_options["ray_actor_options"]["runtime_env"] = {"env_vars": environment}
    deployment = serve.deployment(**deployment_options)(serve.ingress()(replica))
    bound: Application = deployment.bind(settings.model_dump(mode="json"))
    return bound


def options(settings: Settings, *, gpus: float, cpus: float, surge: bool = True) -> dict[str, Any]:
    """Returns the options of a deployment for `serve.deployment`.

    `surge`: an update starts a new replica before it stops an old one, which needs the resources of one more.
    Otherwise it stops an old one first, so a service with a single replica is down until the new one is loaded.
    """
    scale: dict[str, Any] = {"num_replicas": settings.replicas}
    if settings.autoscale is not None:
        least, most = replica_range(settings)
        scale = {
            "autoscaling_config": {
                "min_replicas": least,
                "max_replicas": most,
                "look_back_period_s": 12,
                "upscale_delay_s": 3,
                "downscale_delay_s": 60,  # loading a codec takes long: keep a superfluous replica for a minute
                "policy": {
                    "policy_function": "dat_service.ray.autoscale:ByQueuedImages",
                    # about what a replica computes in a second
                    "policy_kwargs": {"images_per_replica": 256 if gpus else 16},
                },
            }
        }
    return {
        "name": NAME,
        **scale,
        "max_ongoing_requests": 2 * settings.max_requests,  # twice: the app should refuse first, with Retry-After
        "ray_actor_options": {"num_gpus": gpus, "num_cpus": cpus},
        "health_check_period_s": 2,
        "health_check_timeout_s": 10,  # a process that does not answer three times in a row is replaced
        # a stopping replica finishes its queue and the last batch
        "graceful_shutdown_timeout_s": settings.max_queue_s + 20,
        "graceful_shutdown_wait_loop_s": 0.2,
        "max_surge_percent": 1 if surge else 0,  # Serve rounds up to one replica
        "max_constructor_retry_count": 3,
    }


def replica_range(settings: Settings) -> tuple[int, int]:
    """Returns the minimum and maximum number of replicas; raises SettingsError for an impossible range.

    The minimum is 1 or more: images wait inside replicas, so without any replica none could be seen waiting.
    """
    if settings.autoscale is None:
        return settings.replicas, settings.replicas
    least, most = (int(number) for number in settings.autoscale.split(":"))
    if not 1 <= least <= most:
        raise SettingsError(f"autoscale: {settings.autoscale!r} is not MIN:MAX with 1 <= MIN <= MAX")
    return least, most


def gpus_of(settings: Settings, present: float) -> float:
    """Returns the GPUs that one replica reserves, with `present` GPUs on all nodes.

    Ray shows a replica only the GPUs that it reserves. Raises SettingsError for a device or a number of GPUs that
    Ray cannot provide.
    """
    device, gpus = settings.device, settings.gpus
    if device not in ("auto", "cpu", "cuda"):
        raise SettingsError(f"device is {device!r}, must be auto, cpu or cuda on Ray, which picks the GPU itself")
    if gpus is not None and gpus > 1 and gpus != int(gpus):
        raise SettingsError(f"gpus is {gpus:g}, must be a fraction of one GPU or a whole number")
    if gpus and device == "cpu":
        raise SettingsError(f"gpus is {gpus:g}, but device is 'cpu'")
    if gpus == 0 and device == "cuda":
        raise SettingsError("gpus is 0, but device is 'cuda'")
    if present < 1 and (device == "cuda" or gpus):
        why = "device is 'cuda'" if device == "cuda" else f"gpus is {gpus:g}"
        raise SettingsError(f"{why}, but no node of this Ray has a GPU")
    if gpus is not None:
        return gpus
    return 1 if device != "cpu" and present >= 1 else 0


def check(all_settings: Sequence[Settings]) -> None:
    """Raises SettingsError for settings that cannot be served on any Ray cluster."""
    if len({s.codec for s in all_settings}) < len(all_settings):
        raise SettingsError("codec: each codec can be served only once")
    for settings in all_settings:
        replica_range(settings)
        gpus_of(settings, present=float("inf"))


def taken(gpus: float, replicas: int = 1) -> float:
    """Returns the GPUs that `replicas` occupy: of replicas with 0.4 GPUs two fit on one, and 0.2 stays unused."""
    return replicas * (1 / int(1 / gpus) if 0 < gpus < 1 else gpus)


def routes(codecs: Sequence[str], *, alone: bool) -> dict[str, str]:
    """Returns the route prefix of each codec: "/" for a single one that is `alone` on its Ray, else "/NAME"."""
    return {codec: "/" if alone and len(codecs) == 1 else f"/{codec}" for codec in codecs}


def serve_config(all_settings: Sequence[Settings]) -> dict[str, Any]:
    """Returns the configuration for `serve deploy` on another cluster, where `build` counts the GPUs.

    When Ray is started on the cluster's nodes, their environment must have the variables of haproxy.SERVE, and the
    path of `dat-haproxy` as RAY_SERVE_HAPROXY_BINARY_PATH.
    """
    check(all_settings)
    first = all_settings[0]
    prefixes = routes([s.codec for s in all_settings], alone=True)
    applications = []
    for settings in all_settings:
        arguments = settings.model_dump(mode="json", exclude={"host", "port"}, exclude_defaults=True)
        applications.append(
            {
                "name": settings.codec,
                "route_prefix": prefixes[settings.codec],
                "import_path": "dat_service.ray.deployments:build",
                "runtime_env": {"env_vars": dict(REPLICA)},
                # no "deployments": they would override the options that `build` returns
                "args": {"codec": settings.codec} | arguments,
            }
        )
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": first.host, "port": first.port},
        "applications": applications,
    }
