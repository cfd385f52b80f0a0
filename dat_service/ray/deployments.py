"""Settings into Ray Serve applications: one for each codec."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ray import serve
from ray.serve import Application

from dat_service.ray.haproxy import SERVE
from dat_service.ray.replica import CodecReplica
from dat_service.ray.version import check_version
from dat_service.settings import Settings, SettingsError

NAME = "codec"  # of the one deployment in each application

# what a replica's own process reads. OpenMP's threads spin while they wait: beside a busy process a replica on a
# CPU does 2 images a second so, and 10 otherwise.
REPLICA = {"OMP_WAIT_POLICY": "PASSIVE"} | {
    name: SERVE[name]
    for name in (
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD",
        "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S",
    )
}


def build(arguments: dict[str, Any]) -> Application:
    """An application from settings, for `serve run` and `serve deploy`: dat_service.ray.deployments:build.

    >>> build({"codec": "identity"})     # doctest: +SKIP

    On GPUs an update stops an old replica first: what other applications will take of them is not known here. Where
    one is sure to be free, `max_surge_percent: 1` under the configuration's `deployments` lets it wait.
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
    """The application of one codec, a replica of which takes so many GPUs and CPUs of Ray's."""
    deployment_options = options(settings, gpus=gpus, cpus=cpus, surge=surge)
    if environment:
        deployment_options["ray_actor_options"]["runtime_env"] = {"env_vars": environment}
    deployment = serve.deployment(**deployment_options)(serve.ingress()(replica))
    bound: Application = deployment.bind(settings.model_dump(mode="json"))
    return bound


def options(settings: Settings, *, gpus: float, cpus: float, surge: bool = True) -> dict[str, Any]:
    """Options of a deployment, as `serve.deployment` takes them.

    `surge`: an update starts a new replica before it stops an old one, and needs the room for it. Without, it stops
    an old one first: one replica by itself is away until the new one is loaded.
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
                "downscale_delay_s": 60,  # a codec takes its time to load: rather one too many for a minute
                "policy": {
                    "policy_function": "dat_service.ray.autoscale:ByQueuedImages",
                    # about what a replica does in a second
                    "policy_kwargs": {"images_per_replica": 256 if gpus else 16},
                },
            }
        }
    return {
        "name": NAME,
        **scale,
        "max_ongoing_requests": 2 * settings.max_requests,  # the app refuses first, with a Retry-After
        "ray_actor_options": {"num_gpus": gpus, "num_cpus": cpus},
        "health_check_period_s": 2,
        "health_check_timeout_s": 10,  # of a process that is stuck and does not answer; three times
        # a replica that leaves finishes what it has taken: the queue, and the last batch
        "graceful_shutdown_timeout_s": settings.max_queue_s + 20,
        "graceful_shutdown_wait_loop_s": 0.2,
        "max_surge_percent": 1 if surge else 0,  # rounded up: one replica more
        "max_constructor_retry_count": 3,
    }


def replica_range(settings: Settings) -> tuple[int, int]:
    """Fewest and most replicas. Raises SettingsError for a range that is none.

    Never none at all: images wait in a replica, so without one nobody would see that another is needed.
    """
    if settings.autoscale is None:
        return settings.replicas, settings.replicas
    least, most = (int(number) for number in settings.autoscale.split(":"))
    if not 1 <= least <= most:
        raise SettingsError(f"autoscale: {settings.autoscale!r} is not MIN:MAX with 1 <= MIN <= MAX")
    return least, most


def gpus_of(settings: Settings, present: float) -> float:
    """GPUs of one replica, `present` being on all nodes. Ray shows a replica only those it asks for.

    Raises SettingsError for a device or a fraction that Ray cannot give.
    """
    device, gpus = settings.device, settings.gpus
    if device not in ("auto", "cpu", "cuda"):
        raise SettingsError(f"device is {device!r}: on Ray it is auto, cpu or cuda, and Ray picks the GPU")
    if gpus is not None and gpus > 1 and gpus != int(gpus):
        raise SettingsError(f"gpus is {gpus:g}: a part of one GPU, or whole ones")
    if gpus and device == "cpu":
        raise SettingsError(f"gpus is {gpus:g}, and device is 'cpu'")
    if gpus == 0 and device == "cuda":
        raise SettingsError("gpus is 0, and device is 'cuda'")
    if present < 1 and (device == "cuda" or gpus):
        why = "device is 'cuda'" if device == "cuda" else f"gpus is {gpus:g}"
        raise SettingsError(f"{why}, and no node of this Ray has a GPU")
    if gpus is not None:
        return gpus
    return 1 if device != "cpu" and present >= 1 else 0


def check(all_settings: Sequence[Settings]) -> None:
    """Raises SettingsError for what no Ray could serve."""
    if len({s.codec for s in all_settings}) < len(all_settings):
        raise SettingsError("codec: each codec is served once")
    for settings in all_settings:
        replica_range(settings)
        gpus_of(settings, present=float("inf"))


def taken(gpus: float, replicas: int = 1) -> float:
    """GPUs that are gone when so many replicas run: of 0.4 of one two fit on each, and 0.2 stays with nobody."""
    return replicas * (1 / int(1 / gpus) if 0 < gpus < 1 else gpus)


def routes(codecs: Sequence[str], *, alone: bool) -> dict[str, str]:
    """Route prefix of each codec: "/" for a single one that is `alone` on its Ray, else "/NAME"."""
    return {codec: "/" if alone and len(codecs) == 1 else f"/{codec}" for codec in codecs}


def serve_config(all_settings: Sequence[Settings]) -> dict[str, Any]:
    """What `serve deploy` takes, for a cluster that is not here: `build` looks there which GPUs it has.

    The cluster's nodes themselves need haproxy.SERVE and RAY_SERVE_HAPROXY_BINARY_PATH, the path of `dat-haproxy`,
    in their environment when Ray is started there.
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
                # and no "deployments": they would stand over the options that `build` makes
                "args": {"codec": settings.codec} | arguments,
            }
        )
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": first.host, "port": first.port},
        "applications": applications,
    }
