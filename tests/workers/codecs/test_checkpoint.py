from __future__ import annotations

import contextlib
import os
import pickle
import sys
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from dat_workers.codecs.checkpoint import infer_spec, load_published, read_checkpoint
from dat_workers.codecs.file import expected_shapes
from dat_workers.codecs.networks.vqgan import VQGAN
from dat_workers.codecs.spec import CodecError, CodecSpec

Save = Callable[..., Path]


class Hostile:
    """Runs a command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


class HostileEval:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return eval, (f"open({str(self.marker)!r}, 'w')",)


def same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[k], wanted[k]) for k in wanted)


@pytest.mark.parametrize("old_format", [False, True])
def test_lightning_checkpoint(
    tmp_path: Path, spec: CodecSpec, weights: dict[str, Tensor], lightning_checkpoint: Save, old_format: bool
) -> None:
    path = lightning_checkpoint(tmp_path / "last.ckpt", weights, old_format=old_format)
    assert zipfile.is_zipfile(path) is not old_format
    before = set(sys.modules)
    assert same(load_published(path, spec), weights)
    assert read_checkpoint(path).dropped == (
        "2 weights of the training loss (loss.*)",
        "callbacks",
        "epoch",
        "global_step",
        "hyper_parameters",
        "instance",
        "optimizer_states",
        "pytorch-lightning_version",
    )
    loaded = set(sys.modules) - before
    assert not [name for name in loaded if name.startswith(("pytorch_lightning", "omegaconf"))]


def test_weights_outlive_the_file(
    tmp_path: Path, spec: CodecSpec, weights: dict[str, Tensor], lightning_checkpoint: Save
) -> None:
    path = lightning_checkpoint(tmp_path / "last.ckpt", weights)
    loaded = load_published(path, spec)
    path.write_bytes(bytes(path.stat().st_size))
    assert same(loaded, weights)


def test_other_values_beside_the_weights(
    tmp_path: Path, spec: CodecSpec, weights: dict[str, Tensor], lightning_checkpoint: Save
) -> None:
    import collections
    import pathlib

    import numpy as np

    path = lightning_checkpoint(
        tmp_path / "last.ckpt",
        weights,
        score=np.float64(0.5),
        curve=np.zeros(3),
        dirpath=pathlib.Path("logs"),
        counts=collections.defaultdict(dict, a={"b": 1}),
    )
    assert same(load_published(path, spec), weights)


@pytest.mark.parametrize("inside", ["model.ckpt", "vq-f8/model.ckpt"])
def test_member_of_a_zip(
    tmp_path: Path, spec: CodecSpec, weights: dict[str, Tensor], lightning_checkpoint: Save, inside: str
) -> None:
    inner = lightning_checkpoint(tmp_path / "inner.ckpt", weights)
    folder = tmp_path / "downloads"
    folder.mkdir()
    with zipfile.ZipFile(folder / "vq.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(inner, inside)
        archive.writestr("../../escaped.txt", "x")
    assert same(load_published(folder / "vq.zip", replace(spec, source_member="model.ckpt")), weights)
    assert same(read_checkpoint(folder / "vq.zip").tensors, weights)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["downloads", "inner.ckpt", "vq.zip"]
    with pytest.raises(
        CodecError,
        match=r"must contain exactly one file matching other\.ckpt; found 0\. Files there: .*model\.ckpt",
    ):
        load_published(folder / "vq.zip", replace(spec, source_member="other.ckpt"))


def test_damaged_zip(
    tmp_path: Path, spec: CodecSpec, weights: dict[str, Tensor], lightning_checkpoint: Save
) -> None:
    inner = lightning_checkpoint(tmp_path / "inner.ckpt", weights)
    path = tmp_path / "vq.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.write(inner, "model.ckpt")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CodecError, match="could not be unpacked: Bad CRC-32"):
        load_published(path, spec)
    path.write_bytes(content[:-100])
    with pytest.raises(
        CodecError, match=r"vq\.zip is not a checkpoint .*: it is a zip archive whose end is missing"
    ):
        load_published(path, spec)


def test_bare_state_dict_and_safetensors(tmp_path: Path, spec: CodecSpec, weights: dict[str, Tensor]) -> None:
    torch.save(weights, tmp_path / "bare.pt")
    assert same(load_published(tmp_path / "bare.pt", spec), weights)
    save_file(weights, tmp_path / "bare.safetensors")
    assert same(load_published(tmp_path / "bare.safetensors", spec), weights)
    (tmp_path / "bare.safetensors").write_bytes((tmp_path / "bare.safetensors").read_bytes()[:-8])
    with pytest.raises(CodecError, match="not a complete safetensors file"):
        load_published(tmp_path / "bare.safetensors", spec)


@pytest.mark.parametrize("old_format", [False, True])
@pytest.mark.parametrize(("kind", "called"), [(Hostile, "posix.system"), (HostileEval, "builtins.eval")])
def test_hostile_pickle_is_refused_and_not_run(
    tmp_path: Path,
    spec: CodecSpec,
    weights: dict[str, Tensor],
    lightning_checkpoint: Save,
    old_format: bool,
    kind: type,
    called: str,
) -> None:
    marker = tmp_path / "ran"
    path = lightning_checkpoint(tmp_path / "bad.ckpt", weights, old_format=old_format, extra=kind(marker))
    with pytest.raises(CodecError, match=rf"bad\.ckpt was refused: .*{called}.*Nothing in it was run"):
        load_published(path, spec)
    assert not marker.exists()
    if kind is Hostile:  # the test can fail: unpickled in earnest, it runs
        pickle.loads(pickle.dumps(kind(marker)))
        assert marker.exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_plain_hostile_pickle(tmp_path: Path, spec: CodecSpec, protocol: int) -> None:
    marker = tmp_path / "ran"
    (tmp_path / "bad.ckpt").write_bytes(pickle.dumps({"state_dict": Hostile(marker)}, protocol))
    with pytest.raises(CodecError, match=r"posix\.system"):
        load_published(tmp_path / "bad.ckpt", spec)
    assert not marker.exists()


@pytest.mark.parametrize("old_format", [False, True])
def test_every_name_outside_the_list_is_refused_by_name(tmp_path: Path, spec: CodecSpec, old_format: bool) -> None:
    path = tmp_path / "module.ckpt"
    zipped = not old_format
    torch.save({"state_dict": torch.nn.Linear(2, 2)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CodecError, match=r"torch\.nn\.modules\.linear\.Linear"):
        load_published(path, spec)
    marker = tmp_path / "ran"
    torch.save([Hostile(marker), HostileEval(marker)], path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CodecError, match=r"its pickle names builtins\.eval, posix\.system, which"):
        load_published(path, spec)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_no_error_advises_to_load_the_file_unsafely(tmp_path: Path, spec: CodecSpec) -> None:
    path = tmp_path / "x.ckpt"
    torch.save({"a": Hostile(tmp_path / "ran")}, path, pickle_protocol=4)
    for content in (path.read_bytes(), pickle.dumps({"a": {1, 2}}, 4)):
        path.write_bytes(content)
        with pytest.raises(CodecError) as caught:
            load_published(path, spec)
        assert "weights_only" not in str(caught.value)
        assert "Unsupported operand" in str(caught.value)


def test_missing_and_unexpected_keys_are_named_and_counted(
    tmp_path: Path, spec: CodecSpec, weights: dict[str, Tensor], lightning_checkpoint: Save
) -> None:
    gone = [name for name in weights if name.startswith("encoder.mid.block_1")]
    rest = {name: tensor for name, tensor in weights.items() if name not in gone}
    path = lightning_checkpoint(tmp_path / "last.ckpt", {**rest, "model_ema.decay": torch.zeros(1)})
    with pytest.raises(CodecError) as caught:
        load_published(path, spec)
    said = str(caught.value)
    assert f"8 missing keys: {', '.join(gone[:5])}, and 3 more" in said
    assert "1 unexpected keys: model_ema.decay" in said
    assert str(path) in said


def test_another_geometry_gives_shapes(
    tmp_path: Path, spec: CodecSpec, weights: dict[str, Tensor], lightning_checkpoint: Save
) -> None:
    path = lightning_checkpoint(tmp_path / "last.ckpt", weights)
    with pytest.raises(CodecError, match=r"quantize\.embedding\.weight \(expected \[128, 4\], found \[64, 4\]\)"):
        load_published(path, replace(spec, codebook_size=128))


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
def test_unusable_weights(
    tmp_path: Path, spec: CodecSpec, weights: dict[str, Tensor], lightning_checkpoint: Save
) -> None:
    broken = {**weights, "quant_conv.bias": torch.full((4,), float("inf"))}
    with pytest.raises(CodecError, match=r"NaN or infinity: quant_conv\.bias"):
        load_published(lightning_checkpoint(tmp_path / "a.ckpt", broken), spec)
    for value in (torch.zeros(4).to_sparse(), torch.zeros(4, device="meta"), torch.zeros(1).expand(4)):
        path = lightning_checkpoint(tmp_path / "b.ckpt", {**weights, "quant_conv.bias": value})
        with pytest.raises(CodecError, match=r"1 entries are not plain tensors, such as quant_conv\.bias"):
            load_published(path, spec)


def test_other_files(tmp_path: Path, spec: CodecSpec) -> None:
    path = tmp_path / "x.ckpt"
    with pytest.raises(CodecError, match="no such file"):
        load_published(path, spec)
    for content in (b"", b"<!doctype html><html>", bytes(100), os.urandom(2000)):
        path.write_bytes(content)
        with pytest.raises(CodecError, match=r"x\.ckpt"):
            load_published(path, spec)
    for value, said in (
        (3, "holds a int"),
        ({}, "not a state dict"),
        ({"a": 3}, "not plain tensors, such as a"),
    ):
        torch.save(value, path)
        with pytest.raises(CodecError, match=said):
            load_published(path, spec)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_damage_never_escapes_as_another_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("damage") / "x.ckpt"
    torch.save({"a": torch.zeros(4)}, path, _use_new_zipfile_serialization=data.draw(st.booleans()))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    with contextlib.suppress(CodecError):  # any other error fails the test
        assert read_checkpoint(path).tensors


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"ch_mult": (1, 2, 2), "num_res_blocks": 2, "attn_resolutions": (64,)},
        {"ch": 64, "ch_mult": (1,), "attn_resolutions": (), "z_channels": 16, "latent_dim": 8},
        {"ch_mult": (2, 1), "attn_resolutions": (256, 128)},
    ],
)
def test_geometry_is_read_from_the_weights(spec: CodecSpec, changes: dict[str, Any]) -> None:
    wanted = replace(spec, summary="imported", **changes)
    tensors = {name: torch.zeros(shape) for name, shape in expected_shapes(wanted).items()}
    assert infer_spec(tensors, "toy") == wanted


def test_weights_that_are_no_vqgan(spec: CodecSpec, weights: dict[str, Tensor]) -> None:
    def without(part: str) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in weights.items() if part not in name}

    with pytest.raises(CodecError, match=r"quantize\.embedding\.weight must have 2 dimensions, but is absent"):
        infer_spec(without("quantize"), "x")
    with pytest.raises(CodecError, match=r"its encoder has the levels \[1\]"):
        infer_spec(without("encoder.down.0."), "x")
    with pytest.raises(CodecError, match=r"missing keys: decoder\.conv_out"):
        infer_spec(without("decoder.conv_out"), "x")
    odd = {**weights, "encoder.conv_in.weight": torch.zeros(20, 3, 3, 3)}
    with pytest.raises(CodecError, match="not multiples of ch=0"):
        infer_spec({**odd, "encoder.conv_in.weight": torch.zeros(0, 3, 3, 3)}, "x")
    with pytest.raises(CodecError, match="not multiples of ch=20"):
        infer_spec(odd, "x")


def test_names_of_taming_load_strictly(spec: CodecSpec) -> None:
    model = pytest.importorskip("taming.modules.diffusionmodules.model")
    arguments = {
        "ch": spec.ch,
        "out_ch": 3,
        "ch_mult": spec.ch_mult,
        "num_res_blocks": spec.num_res_blocks,
        "attn_resolutions": spec.attn_resolutions,
        "in_channels": 3,
        "resolution": spec.resolution,
        "z_channels": spec.z_channels,
        "double_z": False,
    }
    published = {
        **{f"encoder.{k}": v for k, v in model.Encoder(**arguments).state_dict().items()},
        **{f"decoder.{k}": v for k, v in model.Decoder(**arguments).state_dict().items()},
        "quantize.embedding.weight": torch.zeros(spec.codebook_size, spec.latent_dim),
        "quant_conv.weight": torch.zeros(spec.latent_dim, spec.z_channels, 1, 1),
        "quant_conv.bias": torch.zeros(spec.latent_dim),
        "post_quant_conv.weight": torch.zeros(spec.z_channels, spec.latent_dim, 1, 1),
        "post_quant_conv.bias": torch.zeros(spec.z_channels),
    }
    VQGAN(spec).load_state_dict(published, strict=True)
