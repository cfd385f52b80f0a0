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

HAPROXY_CONNECTIONS = 4096  # of all clients together; RAY_SERVE_HAPROXY_MAXCONN is the same by default
NAME = "codec"  # the name of the single deployment in each application

# The environment variables that a replica's process reads. Unless OMP_WAIT_POLICY is PASSIVE, OpenMP's threads spin
# while they wait: next to a busy process, a replica on a CPU then computes 2 images per second instead of 10.
REPLICA = {"OMP_WAIT_POLICY": "PASSIVE"} | {
    name: haproxy.SERVE[name]
    for name in (
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD",
        "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S",
    )
}


def build(arguments: dict[str, Any]) -> Application:
    """Returns an application. `serve run` and `serve deploy` call this function dat_service.ray.deployments:build.

    >>> build({"codec": "identity"})     # doctest: +SKIP

    `arguments` are the settings of the codec. With replicas on GPUs, an update stops each old replica before it
    starts a new one, because unrelated applications may need the GPUs that are free now. If a GPU is sure to be
    free, set `max_surge_percent: 1` under `deployments` in the configuration, so that the new replica starts first.
    Raises UnsupportedRay, SettingsError and pydantic's ValidationError.
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
    if not gpus:
        # Ray does not hide the GPUs of a node from an actor that reserves none, and `auto` would use the first.
        settings = settings.model_copy(update={"device": "cpu"})
    if environment:
        deployment_options["ray_actor_options"]["runtime_env"] = {"env_vars": environment}
    deployment = serve.deployment(**deployment_options)(serve.ingress()(replica))
    bound: Application = deployment.bind(settings.model_dump(mode="json"))
    return bound


def options(settings: Settings, *, gpus: float, cpus: float, surge: bool = True) -> dict[str, Any]:
    """Returns the options of a deployment for `serve.deployment`.

    If `surge` is True, an update starts each new replica before it stops an old one, which needs the resources of
    one additional replica. Otherwise an update stops an old replica first, so a service with a single replica is
    down until the new replica is loaded.
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
                "downscale_delay_s": 60,  # loading a codec takes long, so a superfluous replica stays for a minute
                "policy": {
                    "policy_function": "dat_service.ray.autoscale:ByQueuedImages",
                    # about as many images as a replica computes in a second
                    "policy_kwargs": {"images_per_replica": 256 if gpus else 16},
                },
            }
        }
    return {
        "name": NAME,
        **scale,
        # The app refuses first, with Retry-After. A request whose body has not arrived takes none of the app's
        # slots, so there may be as many of them as HAProxy has connections.
        "max_ongoing_requests": 2 * settings.max_requests + HAPROXY_CONNECTIONS,
        "ray_actor_options": {"num_gpus": gpus, "num_cpus": cpus},
        "health_check_period_s": 2,
        "health_check_timeout_s": 10,  # Serve replaces a process that fails to answer three times in a row
        # this suffices for a stopping replica to finish its queue and its last batch
        "graceful_shutdown_timeout_s": settings.max_queue_s + 20,
        "graceful_shutdown_wait_loop_s": 0.2,
        "max_surge_percent": 1 if surge else 0,  # Serve rounds up to one replica
        "max_constructor_retry_count": 3,
    }


def replica_range(settings: Settings) -> tuple[int, int]:
    """Returns the minimum and the maximum number of replicas. Raises SettingsError for an impossible range.

    The minimum is at least 1. Images wait inside replicas, so without a replica no waiting image could be counted.
    """
    if settings.autoscale is None:
        return settings.replicas, settings.replicas
    least, most = (int(number) for number in settings.autoscale.split(":"))
    if not 1 <= least <= most:
        raise SettingsError(f"autoscale: {settings.autoscale!r} is not MIN:MAX with 1 <= MIN <= MAX")
    return least, most


def gpus_of(settings: Settings, present: float) -> float:
    """Returns the number of GPUs that one replica reserves, if all nodes together have `present` GPUs.

    A replica can use only the GPUs that it has reserved from Ray. Raises SettingsError for a device or a number of
    GPUs that Ray cannot provide.
    """
    device, gpus = settings.device, settings.gpus
    if device not in ("auto", "cpu", "cuda"):
        raise SettingsError(f"device is {device!r}, but on Ray it must be auto, cpu or cuda, as Ray picks the GPU")
    if gpus is not None and gpus > 1 and gpus != int(gpus):
        raise SettingsError(f"gpus is {gpus:g}, but it must be less than 1 or a whole number")
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
        raise SettingsError("codec: a codec is named more than once; name each codec only once")
    for settings in all_settings:
        replica_range(settings)
        gpus_of(settings, present=float("inf"))


def taken(gpus: float, replicas: int = 1) -> float:
    """Returns the number of GPUs that `replicas` replicas occupy, if each reserves `gpus` GPUs.

    For example, two replicas with 0.4 GPUs each fit on one GPU, and 0.2 of that GPU stays unused.
    """
    return replicas * (1 / int(1 / gpus) if 0 < gpus < 1 else gpus)


def routes(codecs: Sequence[str], *, alone: bool) -> dict[str, str]:
    """Returns the route prefix of each codec: "/" if there is only one codec and `alone` is True, else "/NAME".

    `alone` means that nothing else is served on the same Ray.
    """
    return {codec: "/" if alone and len(codecs) == 1 else f"/{codec}" for codec in codecs}


def serve_config(all_settings: Sequence[Settings]) -> dict[str, Any]:
    """Returns the configuration for `serve deploy`, which may run on any cluster; `build` counts the GPUs there.

    When Ray is started on a node of the cluster, the environment of that node must contain the variables of
    haproxy.SERVE, and RAY_SERVE_HAPROXY_BINARY_PATH must be the path of `dat-haproxy`. Raises SettingsError for
    settings that cannot be served on any cluster.
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
                # "deployments" is left out, because it would override the options that `build` returns
                "args": {"codec": settings.codec} | arguments,
            }
        )
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": first.host, "port": first.port},
        "applications": applications,
    }
