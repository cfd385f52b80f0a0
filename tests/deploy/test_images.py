"""The Dockerfile, what reaches the builder, and the compose file."""

from __future__ import annotations

import re
import shlex
from fnmatch import fnmatch
from pathlib import PurePosixPath
from typing import Any

import pytest

from dat_service.ray.haproxy import SERVE
from dat_service.settings import OTHER_VARIABLES, Settings
from tests.deploy.files import DEPLOY, ROOT, document, problems, unknown_flags

Instruction = tuple[str, str]


def instructions() -> list[Instruction]:
    """(INSTRUCTION, its text) in order, continued lines joined, comments left out."""
    lines = [line for line in (DEPLOY / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)]


def stages() -> dict[str, list[Instruction]]:
    """Instructions by stage, those of the stages below it first."""
    found: dict[str, list[Instruction]] = {}
    current: list[Instruction] = []
    for word, rest in instructions():
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            current = found[name] = list(found.get(base, []))
        current.append((word, rest))
    return found


def environment(stage: str) -> dict[str, str]:
    variables: dict[str, str] = {}
    for word, rest in stages()[stage]:
        if word == "ENV":
            variables |= dict(pair.split("=", 1) for pair in shlex.split(rest))
    return variables


def test_only_known_instructions() -> None:
    known = {
        "FROM", "ENV", "WORKDIR", "RUN", "COPY", "VOLUME", "EXPOSE", "STOPSIGNAL", "HEALTHCHECK", "ENTRYPOINT",
        "CMD", "USER",
    }  # fmt: skip
    assert {word for word, _ in instructions()} <= known


def test_bases_are_pinned() -> None:
    names = set(stages())
    bases = [rest.partition(" AS ")[0] for word, rest in instructions() if word == "FROM"]
    outside = [base for base in bases if base not in names]
    assert outside
    assert all(re.fullmatch(r"[a-z/]+:\d+\.\d+\.\d+-[a-z-]+", base) for base in outside), outside
    assert len(set(outside)) == 1, "a venv of one Python does not run on another"
    needed = re.findall(r'requires-python = ">=(\d+)\.(\d+)"', (ROOT / "pyproject.toml").read_text())[0]
    given = outside[0].partition(":")[2].split(".")[:2]
    assert [int(n) for n in given] >= [int(n) for n in needed]


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_images_do_not_run_as_root(target: str) -> None:
    users = [rest for word, rest in stages()[target] if word == "USER"]
    assert users == ["1000:1000"]
    assert stages()[target][-1][0] == "USER", "what comes after would not be as root, and may need it"
    made = " ".join(rest for word, rest in stages()[target] if word == "RUN")
    assert "--gid 1000" in made
    assert "--uid 1000" in made


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_nothing_is_left_of_apt_or_pip_and_no_secret_is_built_in(target: str) -> None:
    for word, rest in stages()[target]:
        if word == "RUN" and "apt-get install" in rest:
            assert "--no-install-recommends" in rest
            assert "rm -rf /var/lib/apt/lists/*" in rest
        if word == "RUN":
            assert "sudo" not in rest
            assert "pip install" not in rest, "belongs in the builder's stage"
    text = (DEPLOY / "Dockerfile").read_text()
    assert not re.search(r"(?i)(password|secret|token|api_?key)\s*=", text)
    assert "ADD " not in text
    assert environment("build")["PIP_NO_CACHE_DIR"] == "1"


def test_all_of_a_build_is_pinned() -> None:
    installs = [
        command
        for word, rest in instructions()
        if word == "RUN"
        for command in rest.split("&&")
        if " install " in command
    ]
    pips = [command for command in installs if "pip install" in command]
    assert len(pips) == 3
    assert all("--constraint constraints.txt" in command for command in pips)
    extras = re.findall(r"\.\[(\w+)\]", " ".join(pips))
    declared = re.search(
        r"\[project.optional-dependencies\]\n(.*?)\n\[", (ROOT / "pyproject.toml").read_text(), re.S
    )
    assert declared is not None
    assert set(extras) <= set(re.findall(r"^(\w[\w-]*) = ", declared[1], re.M))


def test_variables_of_the_image_are_ours() -> None:
    variables = environment("cpu")
    for name in variables:
        if name.startswith("DAT_"):
            assert name.removeprefix("DAT_").lower() in Settings.model_fields or name in OTHER_VARIABLES
    assert {n: v for n, v in variables.items() if n.startswith("RAY_SERVE_")} == SERVE
    assert "RAY_SERVE_HAPROXY_BINARY_PATH" not in variables, "`dat serve` brings one of its own"
    assert (
        Settings(**{n[4:].lower(): v for n, v in variables.items() if n in ("DAT_HOST", "DAT_PORT")}).port == 8000
    )
    assert environment("cuda").items() >= variables.items()


def test_health_check_asks_what_is_there() -> None:
    from dat_service.http.oip import router

    (check,) = [rest for word, rest in stages()["cpu"] if word == "HEALTHCHECK"]
    paths = {getattr(route, "path", None) for route in router.routes}
    path = re.search(r'"http://127.0.0.1:\$DAT_PORT(/[\w/]+)"', check)
    assert path is not None
    assert path[1] in paths
    assert " wget " in f" {check} "
    assert "install --yes --no-install-recommends wget" in " ".join(rest for _, rest in stages()["cpu"])


def test_entry_point_and_ports() -> None:
    said = dict(stages()["cuda"])
    assert said["ENTRYPOINT"] == '["dat"]'
    assert said["CMD"] == '["serve"]'
    assert said["EXPOSE"] == environment("cuda")["DAT_PORT"]
    assert said["VOLUME"] == environment("cuda")["DAT_HOME"]


def ignored(path: str) -> bool:
    """Whether .dockerignore keeps a file from the builder; the last rule that fits decides."""
    verdict = False
    for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines():
        if line and not line.startswith("#"):
            rule = line.removeprefix("!")
            parts = [str(p) for p in (PurePosixPath(path), *PurePosixPath(path).parents)]
            if any(
                fnmatch(part, rule) or fnmatch(PurePosixPath(part).name, rule.removeprefix("**/")) for part in parts
            ):
                verdict = not line.startswith("!")
    return verdict


def test_the_builder_gets_what_is_copied_and_no_more() -> None:
    copied = [source for word, rest in stages()["build"] if word == "COPY" for source in rest.split()[:-1]]
    assert copied
    for source in copied:
        assert (ROOT / source).exists(), source
        assert not ignored(source), source
    assert not ignored("workers/dat_workers/codecs/tiny-f8.safetensors")
    for private in (".git/config", "deploy/secrets/api_keys", "tests/conftest.py", ".venv/bin/python", "runs/a.pt"):
        assert ignored(private), private
    assert ignored("dat_service/__pycache__/app.cpython-311.pyc")
    packaged = re.findall(r"^(?:readme|packages|license-files) = .*", (ROOT / "pyproject.toml").read_text(), re.M)
    for wanted in re.findall(r'"([\w/.]+)"', " ".join(packaged)):
        assert PurePosixPath(wanted).parts[0] in copied, wanted


# compose.yaml


@pytest.fixture(scope="module")
def compose() -> Any:
    return document("compose.yaml")


def test_compose_keeps_to_its_schema(compose: Any) -> None:
    assert problems(compose, "compose") == []
    assert problems(compose | {"services": {"a": {"image": "x", "ports": [], "imagee": "y"}}}, "compose")


def test_compose_builds_the_targets_that_exist(compose: Any) -> None:
    built = {name: service for name, service in compose["services"].items() if "build" in service}
    assert {service["build"]["target"] for service in built.values()} == {"cpu", "cuda"}
    version = re.findall(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M)[0]
    for service in built.values():
        build = service["build"]
        assert build["target"] in stages()
        assert (DEPLOY / build["context"] / build["dockerfile"]).is_file()
        assert service["image"] == f"dat-service:{version}-{build['target']}"
        assert service["cap_drop"] == ["ALL"]
        assert service["profiles"] == [build["target"]]


def test_compose_gives_flags_that_exist(compose: Any) -> None:
    for name in ("dat-cpu", "dat-cuda"):
        command, *flags = compose["services"][name]["command"]
        assert command == "serve"
        assert len(flags) == 3
        assert unknown_flags(flags) == []


def test_compose_publishes_on_loopback_what_listens(compose: Any) -> None:
    inside = {"dat-cpu": environment("cpu")["DAT_PORT"], "dat-cuda": environment("cuda")["DAT_PORT"]}
    for name, service in compose["services"].items():
        for port in service["ports"]:
            host, _, container = port.split(":")
            assert host == "127.0.0.1"
            assert container == inside.get(name, container)
    assert not [s for s in compose["services"].values() if ":" not in s["image"] or s["image"].endswith(":latest")]


def test_compose_mounts_and_secrets_exist(compose: Any) -> None:
    secrets = set()
    for service in compose["services"].values():
        secrets |= set(service.get("secrets", ()))
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert (DEPLOY / source).exists() if source.startswith(".") else source in compose["volumes"], volume
    assert secrets == set(compose["secrets"])
    ignored_by_git = (ROOT / ".gitignore").read_text().splitlines()
    for name, secret in compose["secrets"].items():
        assert secret["file"] == f"secrets/{name}"
        assert secret["file"] in re.sub("deploy/", "", (DEPLOY / "README.md").read_text())
    assert "deploy/secrets/" in ignored_by_git
    keys = next(flag for flag in compose["services"]["dat-cpu"]["command"] if "api-key-file" in flag)
    assert keys.partition("=")[2] == "/run/secrets/api_keys"
    assert "codecs:" + environment("cpu")["DAT_HOME"] in compose["services"]["dat-cpu"]["volumes"]
