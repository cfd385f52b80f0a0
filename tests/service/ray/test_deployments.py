"""Settings become Ray Serve deployments; nothing is started."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from ray.serve.config import AutoscalingConfig, AutoscalingContext
from ray.serve.schema import ServeDeploySchema
from typer.testing import CliRunner

from dat_service.cli.main import app
from dat_service.ray.autoscale import ByQueuedImages
from dat_service.ray.deployments import application, build, gpus_of, options, replica_range, routes
from dat_service.ray.service import RayService, ServeFailed, shared
from dat_service.settings import Settings, SettingsError
from tests.conftest import free_port


@pytest.mark.parametrize(
    ("settings", "present", "gpus"),
    [
        ({}, 0, 0),
        ({}, 4, 1),
        ({"device": "cpu"}, 4, 0),
        ({"device": "cuda"}, 1, 1),
        ({"gpus": 0.5}, 1, 0.5),
        ({"gpus": 2}, 4, 2),
        ({"gpus": 0}, 4, 0),
    ],
)
def test_gpus_of_a_replica(settings: dict[str, Any], present: float, gpus: float) -> None:
    assert gpus_of(Settings(**settings), present) == gpus


@pytest.mark.parametrize(
    ("settings", "present", "why"),
    [
        ({"device": "cuda:1"}, 4, "cuda:1"),
        ({"device": "cuda"}, 0, "no node of this Ray has a GPU"),
        ({"gpus": 0.5}, 0, "no node of this Ray has a GPU"),
        ({"gpus": 1.5}, 4, "1.5"),
        ({"gpus": 1, "device": "cpu"}, 4, "device is 'cpu'"),
        ({"gpus": 0, "device": "cuda"}, 4, "gpus is 0"),
    ],
)
def test_gpus_that_ray_cannot_give(settings: dict[str, Any], present: float, why: str) -> None:
    with pytest.raises(SettingsError, match=why):
        gpus_of(Settings(**settings), present)


@pytest.mark.parametrize(
    ("settings", "gpus", "device"),
    [({"gpus": 0}, 0, "cpu"), ({}, 0, "cpu"), ({}, 1, "auto"), ({"gpus": 0.5, "device": "cuda"}, 0.5, "cuda")],
)
def test_a_replica_without_gpus_takes_none(settings: dict[str, Any], gpus: float, device: str) -> None:
    """Since Ray 2.60 such an actor sees all GPUs of its node, and `auto` would use the first of them."""
    bound = application(Settings(**settings), gpus=gpus, cpus=1)._bound_deployment
    assert Settings(**bound.init_args[0]).device == device


def test_range_of_replicas() -> None:
    assert replica_range(Settings(replicas=3)) == (3, 3)
    assert replica_range(Settings(replicas=3, autoscale="2:8")) == (2, 8)
    for wrong in ("0:2", "3:2", "0:0"):
        with pytest.raises(SettingsError, match=wrong):
            replica_range(Settings(autoscale=wrong))


@pytest.mark.parametrize(
    ("present", "several", "surge"),
    [
        (0, [{"replicas": 3}], [1]),
        (1, [{}], [0]),
        (1, [{"gpus": 0.5}], [1]),
        (1, [{"gpus": 0.1, "replicas": 9}], [1]),
        (4, [{"autoscale": "1:4"}], [0]),
        (5, [{"autoscale": "1:4"}], [1]),
        (2, [{}, {}], [0, 0]),  # either by itself would have room
        (3, [{}, {}], [1, 1]),  # one after the other
        (3, [{"gpus": 2}, {}], [0, 0]),
        (4, [{"gpus": 2}, {}], [0, 1]),
        (2, [{}, {}, {"gpus": 0}], [0, 0, 1]),
        (2, [{"gpus": 0.4, "replicas": 4}], [0]),  # 0.4 are left over, of each GPU 0.2
    ],
)
@pytest.mark.parametrize("address", [None, "10.0.0.1:6379"])
def test_room_for_an_update(
    present: float,
    several: list[dict[str, Any]],
    surge: list[int],
    address: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert updated(several, present, present, address, monkeypatch) == surge


def test_gpus_of_others_on_the_cluster_are_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    assert updated([{}], 8, 0, "10.0.0.1:6379", monkeypatch) == [0]
    assert updated([{}], 8, 1, "10.0.0.1:6379", monkeypatch) == [1]


def updated(
    several: list[dict[str, Any]], present: float, free: float, address: str | None, monkeypatch: pytest.MonkeyPatch
) -> list[int]:
    """Returns max_surge_percent of each codec in an update, with `present` GPUs of which `free` are free."""
    if address is None:
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
    else:
        monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.cluster_resources", lambda: {"GPU": present})
    monkeypatch.setattr("ray.available_resources", lambda: {"GPU": free})
    targets: list[Any] = []
    monkeypatch.setattr("ray.serve.run_many", lambda new_targets, **_: targets.extend(new_targets))
    service = RayService(*(Settings(codec=f"c{i}", **settings) for i, settings in enumerate(several)))
    service.prefixes = routes(list(service.settings), alone=False)
    with service._folder:
        service._deploy()
    return [target.target._bound_deployment._deployment_config.max_surge_percent for target in targets]


def test_more_replicas_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    for settings in ({"replicas": 3}, {"gpus": 0.6, "replicas": 3}):  # of 0.6 one fits on a GPU
        with pytest.raises(ServeFailed, match="replicas ask for 3 GPUs, and this machine has 2"):
            updated([settings], 2, 2, None, monkeypatch)


def test_replicas_on_one_machine_share_its_cores() -> None:
    cores = Settings().engine_config.cpu_threads
    assert shared(Settings(), 1) == cores
    assert shared(Settings(), 4 * cores) == 1
    assert shared(Settings(threads=7), 4) == 7


def test_routes() -> None:
    assert routes(["a"], alone=True) == {"a": "/"}
    assert routes(["a"], alone=False) == {"a": "/a"}
    assert routes(["a", "b"], alone=True) == {"a": "/a", "b": "/b"}


def test_each_codec_once() -> None:
    with pytest.raises(SettingsError, match="once"):
        RayService(Settings(codec="identity"), Settings(codec="identity"))


def context(queued: dict[str, float] | None, running: int, target: int) -> AutoscalingContext:
    return AutoscalingContext(
        deployment_id=None, deployment_name="codec", app_name="a", current_num_replicas=running,
        target_num_replicas=target, running_replicas=[SimpleNamespace(id=i) for i in range(running)],
        total_num_requests=0, total_queued_requests=0,
        aggregated_metrics=None if queued is None else {"queued_images": queued}, raw_metrics=None,
        capacity_adjusted_min_replicas=1, capacity_adjusted_max_replicas=8, policy_state={},
        last_scale_up_time=None, last_scale_down_time=None, current_time=0, config=None,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("queued", "running", "wanted"),
    [
        ({"a": 0.0}, 1, 0),  # Serve keeps the least
        ({"a": 16.0}, 1, 1),
        ({"a": 16.5}, 1, 2),
        ({"a": 100.0, "b": 28.0}, 2, 8),
        ({"a": 32.0}, 2, 4),  # the other has not reported yet
        ({}, 2, 5),
        (None, 2, 5),
    ],
)
def test_replicas_by_images_that_wait(queued: dict[str, float] | None, running: int, wanted: int) -> None:
    assert ByQueuedImages(images_per_replica=16)(context(queued, running, target=5))[0] == wanted


def test_serve_takes_the_policy() -> None:
    """Serve pickles the policy by value, for the controller's process."""
    config = AutoscalingConfig(**options(Settings(autoscale="1:4"), gpus=0, cpus=1)["autoscaling_config"])
    policy = config.policy.get_policy()(**config.policy.policy_kwargs)
    assert policy(context({"a": 40.0}, 1, 1))[0] == 3


def serve_config(*arguments: str) -> ServeDeploySchema:
    finished = CliRunner().invoke(app, ["serve", *arguments, "--serve-config", "-"])
    assert finished.exit_code == 0, finished.output
    return ServeDeploySchema(**yaml.safe_load(finished.output))


def test_serve_config_is_what_serve_deploys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAT_MAX_IMAGES", "64")
    config = serve_config("--codec", "tiny-f8", "--host", "0.0.0.0", "--replicas", "3", "--gpus", "0.5")
    [application] = config.applications
    assert application.deployments == []  # they would override the options that `build` returns on the cluster
    assert config.http_options.model_dump(include={"host", "port"}) == {"host": "0.0.0.0", "port": 8000}
    assert (application.name, application.route_prefix) == ("tiny-f8", "/")
    assert application.args == {"codec": "tiny-f8", "replicas": 3, "gpus": 0.5, "max_images": 64}
    assert Settings(**application.args).max_images == 64
    module, name = application.import_path.split(":")
    assert getattr(__import__(module, fromlist=[name]), name) is build


@pytest.mark.parametrize(
    ("present", "gpus", "images", "surge"), [(0.0, 0, 16, 1), (2.0, 1, 256, 0), (5.0, 1, 256, 0)]
)
def test_built_for_what_the_cluster_has(
    present: float, gpus: float, images: int, surge: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    [application] = serve_config("--codec", "identity", "--autoscale", "1:2").applications
    monkeypatch.setattr("ray.cluster_resources", lambda: {"GPU": present})
    deployment = build(application.args)._bound_deployment
    assert deployment.ray_actor_options is not None
    assert deployment.ray_actor_options["num_gpus"] == gpus
    config = deployment._deployment_config
    assert config.max_surge_percent == surge
    assert config.autoscaling_config.policy.policy_kwargs == {"images_per_replica": images}


def test_key_file_is_found_from_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    [application] = serve_config("--codec", "identity", "--api-key-file", "keys/api_keys").applications
    assert application.args["api_key_file"] == str(tmp_path / "keys/api_keys")


def test_serve_config_of_several_codecs(tmp_path: Path) -> None:
    config = serve_config("--codec", "tiny-f8", "--codec", "identity", "--autoscale", "1:4", "--device", "cpu")
    assert {a.name: a.route_prefix for a in config.applications} == {"tiny-f8": "/tiny-f8", "identity": "/identity"}
    assert all(application.args["autoscale"] == "1:4" for application in config.applications)
    path = tmp_path / "serve.yaml"
    finished = CliRunner().invoke(app, ["serve", "--serve-config", str(path)])
    assert finished.exit_code == 0
    assert finished.output == ""
    assert ServeDeploySchema(**yaml.safe_load(path.read_text())).applications[0].name == "tiny-f8"


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--autoscale", "3:1"], "3:1"),
        (["--autoscale", "0:1"], "1 <= MIN"),
        (["--autoscale", "many"], "autoscale"),
        (["--gpus", "1.5"], "1.5"),
        (["--codec", "identity", "--codec", "identity"], "once"),
        (["--local", "--codec", "identity", "--codec", "tiny-f8"], "--local"),
        (["--local", "--replicas", "2"], "--local"),
        (["--local", "--autoscale", "1:2"], "--local"),
        (["--serve-config", "-", "--autoscale", "3:1"], "3:1"),
        (["--serve-config", "-", "--device", "cuda:1"], "cuda:1"),
        (["--serve-config", "/no/such/folder/serve.yaml"], "/no/such/folder"),
    ],
)
def test_flags_that_do_not_go_together(arguments: list[str], why: str) -> None:
    """The error is reported at once, before Ray is started."""
    finished = CliRunner().invoke(app, ["serve", "--port", str(free_port()), *arguments])
    assert finished.exit_code == 1
    assert "dat serve: " in finished.output
    assert why in finished.output
