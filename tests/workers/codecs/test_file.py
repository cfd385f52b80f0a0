from __future__ import annotations

import json
import os
import resource
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dat_workers.codecs import file
from dat_workers.codecs.file import Origin
from dat_workers.codecs.spec import CodecError, CodecSpec

ORIGIN = Origin("toy.ckpt", "ab" * 32, "2026-01-02")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "toy.safetensors"


@contextmanager
def largest_file(limit: int) -> Iterator[None]:
    """A real write error: the system refuses to let a file grow past the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_round_trip(path: Path, spec: CodecSpec, weights: dict[str, Tensor]) -> None:
    mark = file.write(path, spec, weights, ORIGIN)
    codec = file.read(path)
    assert (codec.spec, codec.fingerprint, codec.origin) == (spec, mark, ORIGIN)
    assert codec.tensors.keys() == weights.keys()
    assert all(torch.equal(codec.tensors[name], tensor) for name, tensor in weights.items())
    assert file.read_header(path).fingerprint == mark
    assert [p.name for p in path.parent.iterdir()] == ["toy.safetensors"]
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_half_precision_comes_back_as_stored(path: Path, spec: CodecSpec, weights: dict[str, Tensor]) -> None:
    half = {name: tensor.half() for name, tensor in weights.items()}
    mark = file.write(path, spec, half, ORIGIN)
    assert {tensor.dtype for tensor in file.read(path).tensors.values()} == {torch.float16}
    assert mark != file.fingerprint(spec, weights)


def test_tensors_that_share_memory_or_are_transposed_are_written(
    path: Path, spec: CodecSpec, weights: dict[str, Tensor]
) -> None:
    both = torch.randn(2, 32)
    weights["encoder.norm_out.weight"], weights["encoder.norm_out.bias"] = both[0], both[1]
    weights["quantize.embedding.weight"] = torch.randn(4, 64).t()
    file.write(path, spec, weights, ORIGIN)
    read = file.read(path).tensors
    assert torch.equal(read["encoder.norm_out.bias"], both[1])
    assert torch.equal(read["quantize.embedding.weight"], weights["quantize.embedding.weight"])


def test_fingerprint_is_of_what_decides_the_output(spec: CodecSpec, weights: dict[str, Tensor]) -> None:
    mark = file.fingerprint(spec, weights)
    assert mark == file.fingerprint(spec, dict(reversed(weights.items())))
    told_otherwise = replace(spec, name="other", licence="x", summary="y", source_url="z", source_member="m")
    assert mark == file.fingerprint(told_otherwise, weights)
    # the same level gets the attention
    assert mark == file.fingerprint(replace(spec, resolution=512, attn_resolutions=(256,)), weights)
    assert mark != file.fingerprint(replace(spec, attn_resolutions=(256,)), weights)
    assert mark != file.fingerprint(replace(spec, num_res_blocks=2), weights)
    renamed = {name.replace("mid.attn_1", "mid.attn_2"): tensor for name, tensor in weights.items()}
    assert mark != file.fingerprint(spec, renamed)
    weights["quantize.embedding.weight"][3, 1] += 1e-6
    assert mark != file.fingerprint(spec, weights)


def test_altered_weights_are_found(path: Path, spec: CodecSpec, weights: dict[str, Tensor]) -> None:
    mark = file.write(path, spec, weights, ORIGIN)
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(CodecError, match=f"toy.safetensors was altered: .* its metadata says {mark}"):
        file.read(path)


def test_altered_geometry_is_found(path: Path, spec: CodecSpec, weights: dict[str, Tensor]) -> None:
    file.write(path, spec, weights, ORIGIN)
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + size])
    # (96,) puts the attention nowhere: the weights on that level become unexpected
    header["__metadata__"]["spec"] = json.dumps(replace(spec, attn_resolutions=(96,)).to_dict())
    new = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(new)) + new + content[8 + size :])
    with pytest.raises(CodecError, match=r"30 unexpected keys: decoder\.up\.1\.attn\.0\.k\.bias, .* 25 more"):
        file.read(path)


@pytest.mark.parametrize("keep", [0, 4, 200, -1000])
def test_truncated_file(path: Path, spec: CodecSpec, weights: dict[str, Tensor], keep: int) -> None:
    file.write(path, spec, weights, ORIGIN)
    path.write_bytes(path.read_bytes()[:keep])
    for reader in (file.read, file.read_header):
        with pytest.raises(CodecError, match=r"toy\.safetensors is not a complete safetensors file"):
            reader(path)


def test_other_files(path: Path, tmp_path: Path) -> None:
    with pytest.raises(CodecError, match="no such file"):
        file.read(path)
    with pytest.raises(CodecError, match="not a complete safetensors file"):
        file.read(tmp_path)
    path.write_bytes(b"PK\x03\x04" + bytes(500))
    with pytest.raises(CodecError, match="not a complete safetensors file"):
        file.read(path)
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, path, {"format": "pt"})
    with pytest.raises(CodecError, match="its metadata lacks spec, fingerprint, origin"):
        file.read(path)
    save_file({"a": torch.zeros(2)}, path, {"spec": "{", "fingerprint": "", "origin": "{}"})
    with pytest.raises(CodecError, match="its metadata cannot be read"):
        file.read(path)


def test_misfits_are_named_and_not_written(path: Path, spec: CodecSpec, weights: dict[str, Tensor]) -> None:
    weights["model_ema.decay"] = torch.zeros(1)
    del weights["quant_conv.bias"]
    weights["quantize.embedding.weight"] = torch.zeros(64, 8)
    with pytest.raises(CodecError) as caught:
        file.write(path, spec, weights, ORIGIN)
    said = str(caught.value)
    assert "1 missing keys: quant_conv.bias;" in said
    assert "1 unexpected keys: model_ema.decay;" in said
    assert "quantize.embedding.weight (expected [64, 4], found [64, 8])" in said
    assert not path.exists()


def test_non_finite_and_wrong_types_are_refused(path: Path, spec: CodecSpec, weights: dict[str, Tensor]) -> None:
    weights["decoder.conv_in.bias"][0] = float("nan")
    weights["decoder.conv_out.bias"][1] = float("inf")
    with pytest.raises(CodecError, match=r"2 weights hold NaN.*decoder\.conv_in\.bias, decoder\.conv_out\.bias"):
        file.write(path, spec, weights, ORIGIN)
    weights["decoder.conv_in.bias"] = torch.zeros(32, dtype=torch.float64)
    with pytest.raises(CodecError, match=r"decoder\.conv_in\.bias \(torch\.float64\)"):
        file.write(path, spec, weights, ORIGIN)


@pytest.mark.parametrize(("entry", "word"), [(0.0, "zero"), (0.25, "equal")])
def test_codebook_of_equal_entries(
    path: Path, spec: CodecSpec, weights: dict[str, Tensor], entry: float, word: str
) -> None:
    dead = {**weights, "quantize.embedding.weight": torch.full((64, 4), entry)}
    with pytest.raises(CodecError, match=rf"all 64 entries of the codebook are {word}, so every picture"):
        file.write(path, spec, dead, ORIGIN)
    assert not path.exists()
    # A file that another version wrote is refused when it is read.
    from safetensors.torch import save_file

    metadata = {
        "spec": json.dumps(spec.to_dict()),
        "fingerprint": file.fingerprint(spec, dead),
        "origin": json.dumps({"source": "", "sha256": "", "date": ""}),
    }
    save_file(dead, path, metadata)
    with pytest.raises(CodecError, match=rf"toy\.safetensors: all 64 entries of the codebook are {word}"):
        file.read(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codebook_size": 1}, "codebook_size is 1, but must be a whole number from 2 to 65536"),
        ({"codebook_size": 65537}, "codebook_size is 65537, but must be a whole number from 2 to 65536"),
        ({"num_res_blocks": 10**9}, "num_res_blocks is 1000000000, but must be a whole number from 1 to 64"),
        ({"ch": 32 * 10**9}, "ch is 32000000000, but must be a whole number from 1 to 4096"),
        ({"ch": True}, "ch is True, but must be a whole number from 1 to 4096"),
        ({"ch_mult": (1,) * 13}, "but must hold 1 to 12 whole numbers from 1 to 4096"),
        ({"ch_mult": (1.5,)}, "but must hold 1 to 12 whole numbers from 1 to 4096"),
    ],
)
def test_geometry_has_limits(spec: CodecSpec, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CodecError, match=message):
        CodecSpec.from_dict(spec.to_dict() | changes)


def test_full_disk_leaves_nothing_and_keeps_the_old_file(
    path: Path, spec: CodecSpec, weights: dict[str, Tensor]
) -> None:
    with largest_file(100_000), pytest.raises(CodecError, match=r"toy\.safetensors could not be written: "):
        file.write(path, spec, weights, ORIGIN)
    assert list(path.parent.iterdir()) == []
    mark = file.write(path, spec, weights, ORIGIN)
    weights["quant_conv.bias"] += 1
    with largest_file(100_000), pytest.raises(CodecError):
        file.write(path, spec, weights, ORIGIN)
    assert [p.name for p in path.parent.iterdir()] == ["toy.safetensors"]
    assert file.read(path).fingerprint == mark


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from dat_workers.codecs import file
from dat_workers.codecs.spec import CodecSpec
from dat_workers.codecs.networks.vqgan import VQGAN
spec = CodecSpec("toy", ch=32, ch_mult=(1,), num_res_blocks=1, codebook_size=8, latent_dim=4)
os.fsync = lambda fd: os.kill(os.getpid(), signal.SIGKILL)
file.write(Path(sys.argv[1]), spec, VQGAN(spec).state_dict(), file.Origin("", "", ""))
"""


def test_killed_while_writing(path: Path, spec: CodecSpec, weights: dict[str, Tensor]) -> None:
    run = subprocess.run([sys.executable, "-c", KILLED, str(path)], env=os.environ, check=False)
    assert run.returncode == -9
    assert not path.exists()
    (leftover,) = path.parent.iterdir()  # nothing can remove it but the next writer
    os.utime(leftover, (0, 0))
    file.write(path, spec, weights, ORIGIN)
    assert [p.name for p in path.parent.iterdir()] == ["toy.safetensors"]
