from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dat_workers.codecs import file, store
from dat_workers.codecs.file import Origin
from dat_workers.codecs.networks.vqgan import VQGAN
from dat_workers.codecs.registry import REGISTRY, CodecNotFound
from dat_workers.codecs.spec import CodecError, CodecSpec
from dat_workers.codecs.store import CodecStore, load_model

ORIGIN = Origin.now("toy.ckpt", "00" * 32)


@pytest.fixture
def home(tmp_path: Path) -> CodecStore:
    return CodecStore(tmp_path / "home")


def test_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DAT_HOME", str(tmp_path))
    assert CodecStore().home == tmp_path
    assert CodecStore(tmp_path / "x").home == tmp_path / "x"
    monkeypatch.delenv("DAT_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert CodecStore().home == tmp_path / "cache" / "dat"


def test_add_and_load(home: CodecStore, spec: CodecSpec, weights: dict[str, Tensor]) -> None:
    assert home.names() == list(REGISTRY)
    mark = home.add(spec, weights, ORIGIN)
    assert home.names() == [*REGISTRY, "toy"]
    assert home.status("toy") == "installed"
    assert home.path("toy") == home.home / "codecs" / "toy.safetensors"
    assert home.load("toy").fingerprint == mark


def test_model(home: CodecStore, spec: CodecSpec, weights: dict[str, Tensor]) -> None:
    home.add(spec, {name: tensor.half() for name, tensor in weights.items()}, ORIGIN)
    model = load_model(home.load("toy"))
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32}
    reference = VQGAN(spec).eval()
    reference.load_state_dict({name: tensor.half().float() for name, tensor in weights.items()})
    x = torch.rand(1, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        assert torch.equal(model.decode(model.encode(x)), reference.decode(reference.encode(x)))
    with pytest.raises(CodecError, match="'identity' has no network"):
        load_model(home.load("identity"))


def test_identity(home: CodecStore) -> None:
    codec = home.load("identity")
    assert (codec.tensors, home.status("identity")) == ({}, "embedded")
    assert len(codec.fingerprint) == 64
    with pytest.raises(CodecError, match="no file"):
        home.path("identity")


def test_not_installed_tells_the_command(home: CodecStore) -> None:
    name = "vqgan-openimages-f8-16384"
    assert home.status(name) == "not installed"
    with pytest.raises(CodecError, match=rf"dat codecs pull {name} .*dat codecs import CKPT --as {name}"):
        home.load(name)
    with pytest.raises(CodecNotFound, match=name):
        home.load("vqgan-openimages-f8-16383")


def test_embedded(
    home: CodecStore,
    spec: CodecSpec,
    weights: dict[str, Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(store, "EMBEDDED_FOLDER", tmp_path)
    monkeypatch.setitem(REGISTRY, "tiny-f8", replace(spec, name="tiny-f8"))
    assert home.status("tiny-f8") == "broken: not in the package"
    with pytest.raises(CodecError, match="missing from the package"):
        home.load("tiny-f8")
    file.write(tmp_path / "tiny-f8.safetensors", REGISTRY["tiny-f8"], weights, ORIGIN)
    assert home.status("tiny-f8") == "embedded"
    assert home.load("tiny-f8").spec.name == "tiny-f8"
    with pytest.raises(CodecError, match="ships inside the package"):
        home.add(REGISTRY["tiny-f8"], weights, ORIGIN)


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "a\\b", ".x", "a" * 101, "x\n", "ü", "a b", "C:x"])
def test_unsafe_names(home: CodecStore, spec: CodecSpec, weights: dict[str, Tensor], name: str) -> None:
    for act in (home.path, home.load, lambda n: home.add(replace(spec, name=n), weights, ORIGIN)):
        with pytest.raises(CodecError, match="is not allowed"):
            act(name)
    assert home.status(name).startswith("broken: ")
    assert not home.home.exists()


@pytest.mark.parametrize("name", ["a", "A-1_2.b", "-", "a" * 100, "v1..2"])
def test_safe_names(home: CodecStore, name: str) -> None:
    assert home.path(name).parent == home.folder


def test_other_weights_replace_only_when_told(
    home: CodecStore, spec: CodecSpec, weights: dict[str, Tensor]
) -> None:
    first = home.add(spec, weights, ORIGIN)
    assert home.add(spec, weights, ORIGIN) == first
    weights["quant_conv.bias"] += 1
    with pytest.raises(
        CodecError, match=f"is already installed with fingerprint {first}; the new one has fingerprint .*--force"
    ):
        home.add(spec, weights, ORIGIN)
    assert home.load("toy").fingerprint == first
    second = home.add(spec, weights, ORIGIN, replace=True)
    assert home.load("toy").fingerprint == second != first


def test_broken_files(home: CodecStore, spec: CodecSpec, weights: dict[str, Tensor]) -> None:
    home.add(spec, weights, ORIGIN)
    os.rename(home.path("toy"), home.path("other"))
    assert "holds codec 'toy', not 'other'" in home.status("other")
    with pytest.raises(CodecError, match="holds codec 'toy', not 'other'"):
        home.load("other")
    home.path("other").write_bytes(home.path("other").read_bytes()[:-1])
    assert home.status("other").startswith("broken: ")
    assert "not a complete safetensors file" in home.status("other")
    home.add(replace(spec, name="other"), weights, ORIGIN)  # a broken one may be replaced
    assert home.status("other") == "installed"


def test_a_registered_name_holds_the_registered_geometry(
    home: CodecStore, spec: CodecSpec, weights: dict[str, Tensor]
) -> None:
    named = replace(spec, name="vqgan-openimages-f8-256")
    with pytest.raises(CodecError, match=r"must have the geometry .*'codebook_size': 256.*but the file has .*: 64"):
        home.add(named, weights, ORIGIN)
    file.write(home.path(named.name), named, weights, ORIGIN)
    assert home.status(named.name).startswith("broken: ")
    with pytest.raises(CodecError, match="must have the geometry"):
        home.load(named.name)
