"""KubeRay's RayService and Ray's cluster launcher: schemas, and every name in them that is ours."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft7Validator

from dat_service.settings import Settings
from tests.deploy.files import DEPLOY, ROOT, document, documents, problems, unknown_flags
from tests.deploy.test_images import environment, stages

IMAGES = {f"dat-service:0.1.0-{target}" for target in ("cpu", "cuda")}
BINARY = "/opt/dat/bin/dat-haproxy"


@pytest.fixture(scope="module")
def service() -> Any:
    return next(d for d in documents("kuberay.yaml") if d["kind"] == "RayService")


@pytest.fixture(scope="module")
def serve_config(service: Any) -> Any:
    return yaml.safe_load(service["spec"]["serveConfigV2"])


def pods(service: Any) -> dict[str, Any]:
    """Pod specs by group."""
    cluster = service["spec"]["rayClusterConfig"]
    groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    return {
        name: group["template"]["spec"] for name, group in ({"head": cluster["headGroupSpec"]} | groups).items()
    }


def command_in_comment(name: str) -> list[str]:
    """The words of the `dat serve ...` that a file's comments give."""
    text = " ".join(re.findall(r"^ *#(.*)", (DEPLOY / name).read_text(), re.M))
    found = re.search(r"dat serve [^'&]*?--serve-config [\w.-]+", text)
    assert found is not None
    return shlex.split(found[0])[2:]


def written_by(words: list[str]) -> Any:
    """What `dat serve WORDS` prints."""
    from typer.testing import CliRunner

    from dat_service.cli.main import app

    finished = CliRunner().invoke(app, ["serve", *words])
    assert finished.exit_code == 0, finished.output
    return yaml.safe_load(finished.output)


def test_rayservice_keeps_to_its_schema(service: Any) -> None:
    assert problems(service, "rayservice") == []
    text = yaml.safe_dump(service).replace("minReplicas", "minimumReplicas")
    assert problems(yaml.safe_load(text), "rayservice")


def test_serve_takes_its_part(serve_config: Any) -> None:
    from ray.serve.schema import ServeDeploySchema

    ServeDeploySchema.model_validate(serve_config)


def test_serve_part_is_what_the_command_writes(serve_config: Any) -> None:
    assert written_by(command_in_comment("kuberay.yaml")) == serve_config


def test_settings_in_it_exist_and_fit_the_pods(service: Any, serve_config: Any) -> None:
    (application,) = serve_config["applications"]
    settings = Settings(**application["args"])
    worker = pods(service)["gpu"]
    group = service["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]
    assert settings.autoscale == f"{group['minReplicas']}:{group['maxReplicas']}"  # a GPU each
    mounts = {m["name"]: m["mountPath"] for m in worker["containers"][0]["volumeMounts"]}
    assert settings.api_key_file is not None
    assert settings.api_key_file.parent == Path(mounts["keys"])
    assert f"--from-file={settings.api_key_file.name}" in (DEPLOY / "kuberay.yaml").read_text()
    assert mounts["codecs"] == environment("cuda")["DAT_HOME"]
    assert worker["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1
    (pull,) = worker["initContainers"]
    assert pull["command"] == ["dat", "codecs", "pull", settings.codec]
    assert {m["name"]: m["mountPath"] for m in pull["volumeMounts"]} == {"codecs": mounts["codecs"]}
    for pod in pods(service).values():
        declared = {volume["name"] for volume in pod.get("volumes", ())}
        for container in (*pod["containers"], *pod.get("initContainers", ())):
            assert {m["name"] for m in container.get("volumeMounts", ())} <= declared


def test_command_that_pulls_exists() -> None:
    import typer.main

    from dat_service.cli.main import app
    from dat_workers.codecs.registry import REGISTRY

    group: Any = typer.main.get_command(app)
    assert "pull" in group.commands["codecs"].commands
    assert "vqgan-openimages-f8-16384" in REGISTRY


def test_pods(service: Any, serve_config: Any) -> None:
    port = serve_config["http_options"]["port"]
    for name, pod in pods(service).items():
        assert pod["securityContext"]["runAsNonRoot"]
        assert str(pod["securityContext"]["runAsUser"]) == dict(stages()["cuda"])["USER"].partition(":")[0]
        (container,) = pod["containers"]
        assert container["image"] in IMAGES
        assert {p["containerPort"] for p in container["ports"] if p["name"] == "serve"} == {port}, name
        assert container["env"] == [{"name": "RAY_SERVE_HAPROXY_BINARY_PATH", "value": BINARY}]
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert service["spec"]["rayClusterConfig"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_versions_are_this_projects(service: Any) -> None:
    pinned = re.findall(r"^ray==(.*)", (ROOT / "constraints.txt").read_text(), re.M)
    assert [service["spec"]["rayClusterConfig"]["rayVersion"]] == pinned
    (version,) = re.findall(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)
    for name in ("kuberay.yaml", "ray-cluster.yaml", "compose.yaml", "Dockerfile"):
        tags = re.findall(r"dat-service:(\S+?)-(?:cpu|cuda)\b", (DEPLOY / name).read_text())
        assert set(tags) == {version}, name


def test_binary_is_installed_where_it_is_looked_for() -> None:
    scripts = re.findall(r"^(dat[\w-]*) = ", (ROOT / "pyproject.toml").read_text(), re.M)
    assert Path(BINARY).name in scripts
    assert f"{Path(BINARY).parent}:" in environment("cuda")["PATH"]
    assert str(Path(BINARY).parent.parent) in " ".join(text for word, text in stages()["cuda"] if word == "COPY")


def test_network_policy_opens_one_port(serve_config: Any) -> None:
    policy = next(d for d in documents("kuberay.yaml") if d["kind"] == "NetworkPolicy")
    assert problems(policy, "networkpolicy") == []
    to_all = [rule for rule in policy["spec"]["ingress"] if "from" not in rule]
    assert [port["port"] for rule in to_all for port in rule["ports"]] == [serve_config["http_options"]["port"]]


# ray-cluster.yaml


def test_cluster_keeps_to_rays_own_schema() -> None:
    import ray.autoscaler

    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    validator = Draft7Validator(schema)
    config = document("ray-cluster.yaml")
    assert [error.message for error in validator.iter_errors(config)] == []
    assert list(validator.iter_errors(config | {"minimum_workers": 1}))


def test_ray_takes_the_cluster() -> None:
    """What `ray up` does before it reaches for the machines."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    given = document("ray-cluster.yaml")
    assert given["max_workers"] == len(given["provider"]["worker_ips"])
    validate_config(prepare_config(given))


def test_cluster_of_machines() -> None:
    config = document("ray-cluster.yaml")
    assert config["docker"]["image"] in IMAGES
    options = [word for option in config["docker"]["run_options"] for word in shlex.split(option)]
    variables = dict(word.split("=", 1) for word in options if re.match("[A-Z_]+=", word))
    assert variables["RAY_SERVE_HAPROXY_BINARY_PATH"] == BINARY
    assert variables["RAY_AUTH_MODE"] == "token"
    volumes = [word.split(":") for word in options if ":/" in word]
    assert ["dat-codecs", environment("cuda")["DAT_HOME"]] in volumes
    assert Path(variables["RAY_AUTH_TOKEN_PATH"]).is_relative_to(next(v[1] for v in volumes if v[0] == "/etc/dat"))
    ports = {*re.findall(r"--port=(\d+)", " ".join(config["head_start_ray_commands"]))}
    assert ports == {*re.findall(r"RAY_HEAD_IP:(\d+)", " ".join(config["worker_start_ray_commands"]))}


def test_ray_takes_the_flags_of_its_start() -> None:
    from ray.scripts.scripts import cli

    known = {flag for option in cli.commands["start"].params for flag in option.opts}
    config = document("ray-cluster.yaml")
    for command in (*config["head_start_ray_commands"], *config["worker_start_ray_commands"]):
        given = [word.partition("=")[0] for word in command.split() if word.startswith("--")]
        assert set(given) <= known
    assert "get-auth-token" in cli.commands


def test_commands_in_comments_and_the_readme_exist() -> None:
    words = command_in_comment("ray-cluster.yaml")
    assert unknown_flags(words) == []
    assert unknown_flags(["--replicasss"]) == ["--replicasss"]
    arguments = written_by([*words[:-1], "-"])["applications"][0]["args"]
    assert arguments["replicas"] == 3
    mounts = [v.split(":") for v in document("ray-cluster.yaml")["docker"]["run_options"] if ":/" in v]
    assert any(Path(arguments["api_key_file"]).is_relative_to(mount[1]) for mount in mounts)  # open to strangers
    readme = (DEPLOY / "README.md").read_text()
    for file in re.findall(r"^\| `([\w./-]+)` \|", readme, re.M):
        assert (DEPLOY / file).exists(), file
    assert {p.name for p in DEPLOY.iterdir()} - {"README.md", "Dockerfile.dockerignore", "secrets"} == {
        Path(file).name for file in re.findall(r"^\| `([\w./-]+)` \|", readme, re.M)
    }
    assert "were not built" in readme
