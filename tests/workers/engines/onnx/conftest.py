"""An exported codec, and a home for the engine's own exports."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from dat_workers.codecs.networks.vqgan import VQGAN
from dat_workers.codecs.store import CodecStore, load_model
from dat_workers.engines.onnx import engine, export
from tests.conftest import DAT


@pytest.fixture(scope="session")
def model() -> VQGAN:
    return load_model("tiny-f8")


@pytest.fixture(scope="session")
def fingerprint() -> str:
    return CodecStore().load("tiny-f8").fingerprint


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `dat export` writes."""
    target = tmp_path_factory.mktemp("export") / "tiny"
    done = subprocess.run([*DAT, "export", "--codec", "tiny-f8", str(target)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "encoder.onnx" in done.stdout
    return target


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DAT_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def graphs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """The exported graphs; `export_graphs` returns these from now on, without taking its seconds."""
    content = {f"{part}.onnx": (folder / f"{part}.onnx").read_bytes() for part in export.GRAPHS}
    for module in (export, engine):
        monkeypatch.setattr(module, "export_graphs", lambda model: content)
    return content
