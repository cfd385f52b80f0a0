"""The installed version of Ray has everything inside that this service relies on.

The configuration that Ray's template renders is checked by test_haproxy_wrapper.py.
"""

from __future__ import annotations

import inspect
import tomllib
from pathlib import Path

import pytest
import ray

from dat_service.ray import haproxy
from dat_service.ray.deployments import build
from dat_service.ray.service import RayService, ServeFailed
from dat_service.ray.version import SUPPORTED, UnsupportedRay, check_version
from dat_service.settings import Settings
from tests.conftest import ROOT


@pytest.mark.parametrize("version", ["2.60.0", "2.60.3", "2.60.0rc1"])
def test_supported_versions(version: str) -> None:
    check_version(version)


@pytest.mark.parametrize("version", ["2.59.1", "2.61.0", "3.0.0.dev0", "1.60.0", "strange.version"])
def test_another_ray_is_refused_at_start(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "__version__", version)
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was started"))
    service = RayService(Settings(codec="identity"))
    with pytest.raises(ServeFailed) as refused:
        service.start()
    service.stop()
    with pytest.raises(UnsupportedRay):
        build({"codec": "identity"})
    assert f"ray {version} is installed" in str(refused.value)
    assert ">=2.60,<2.61" in str(refused.value)
    assert "pip install 'ray[serve]>=2.60,<2.61'" in str(refused.value)


def test_package_asks_for_the_same_versions() -> None:
    requirements = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert f"ray[serve]{SUPPORTED}" in requirements


def test_installed_version_is_supported() -> None:
    check_version(ray.__version__)


def test_private_functions_have_the_signatures_that_are_used() -> None:
    from ray.serve._private.client import ServeControllerClient
    from ray.serve._private.controller import ServeController
    from ray.serve.context import _check_cached_client_alive, _disconnect, _get_global_client

    inspect.signature(_get_global_client).bind()
    inspect.signature(_check_cached_client_alive).bind()
    inspect.signature(_disconnect).bind()
    inspect.signature(ServeControllerClient.shutdown_cached_handles).bind(None)
    inspect.signature(ServeController.graceful_shutdown).bind(None, wait=False)
    waiting = inspect.signature(ServeControllerClient._wait_for_application_running)
    assert list(waiting.parameters) == ["self", "name", "timeout_s"]
    assert waiting.parameters["timeout_s"].default == -1  # without a limit
    inspect.signature(ServeControllerClient.wait_for_proxies_serving).bind(None)
    assert isinstance(ServeControllerClient.http_config, property)


def test_ray_reads_the_variables_that_are_set(tmp_path: Path) -> None:
    from ray.serve._private import constants

    source = inspect.getsource(constants)
    names = haproxy.environment(tmp_path, "127.0.0.1", 8000, 30000, ["/"])
    assert len(names) > 15
    assert [name for name in names if f'"{name}"' not in source] == []


def test_replicas_are_built_and_checked_by_methods_that_serve_calls() -> None:
    """Serve finds these by their names; a renamed one would go unnoticed."""
    from ray.serve._private import constants, replica

    source = inspect.getsource(replica) + inspect.getsource(constants)
    for name in ("__serve_build_asgi_app__", "check_health", "record_autoscaling_stats"):
        assert name in source
