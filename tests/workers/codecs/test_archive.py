"""Archives that would unpack to far more than weights can need, and checkpoints whose sizes lie."""

from __future__ import annotations

import gzip
import io
import pickle
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dat_workers.codecs import archive, checkpoint
from dat_workers.codecs.checkpoint import largest_checkpoint, load_published, read_checkpoint
from dat_workers.codecs.file import parameter_count
from dat_workers.codecs.spec import CodecError, CodecSpec

MIB = 1 << 20
Save = Callable[..., Path]


def write_zeros(file: zipfile.ZipFile, name: str, nbytes: int, start: bytes = b"") -> None:
    with file.open(name, "w", force_zip64=True) as sink:
        sink.write(start)
        for _ in range(nbytes // MIB):
            sink.write(bytes(MIB))


def bomb(path: Path, nbytes: int, name: str = "model.ckpt") -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        write_zeros(file, name, nbytes)
    return path


def compressed(source: Path, target: Path) -> Path:
    """Writes a checkpoint of torch again with compressed members."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    return target


@contextmanager
def nothing_left(folder: Path) -> Iterator[None]:
    before = sorted(folder.rglob("*"))
    yield
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("name", ["model.ckpt", "archive/data.pkl", "archive/data/0"])
def test_bomb_is_refused_before_it_is_unpacked(tmp_path: Path, name: str) -> None:
    """The process that refuses 160 MiB out of 1 MB needs neither memory nor disk for it."""
    path = bomb(tmp_path / "bomb.zip", 160 * MIB, name)
    if name.endswith("0"):
        with zipfile.ZipFile(path, "a") as file:
            file.writestr("archive/data.pkl", pickle.dumps({"a": 1}, 2))
    code = f"""
import pathlib, resource
import torch
from dat_workers.codecs.checkpoint import read_checkpoint
from dat_workers.codecs.spec import CodecError
resource.setrlimit(resource.RLIMIT_FSIZE, ({MIB}, {MIB}))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    read_checkpoint(pathlib.Path({str(path)!r}))
except CodecError as error:
    print(error)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    with nothing_left(tmp_path):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    message, grown_kib = done.stdout.splitlines()
    assert re.search(r"would unpack to 1677721\d\d bytes|data\.pkl, has 167772160 bytes", message)
    assert f"the limit is {64 * MIB} bytes" in message
    assert int(grown_kib) < 64 * 1024


def test_limit_follows_the_size_of_the_archive(tmp_path: Path) -> None:
    path = bomb(tmp_path / "big.zip", 128 * MIB)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_STORED) as file:
        file.writestr("noise", torch.randint(0, 256, (5 * MIB,), dtype=torch.uint8).numpy().tobytes())
    limit = 16 * path.stat().st_size
    assert 64 * MIB < limit < 128 * MIB
    with pytest.raises(CodecError, match=rf"unpack to {128 * MIB} bytes; the limit is {limit} bytes \(16 times"):
        read_checkpoint(path)


def test_known_geometry_limits_the_member(
    tmp_path: Path, spec: CodecSpec, weights: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert largest_checkpoint(spec) == 32 * parameter_count(spec) + (1 << 30)
    monkeypatch.setattr(checkpoint, "OTHER_BYTES", 0)
    torch.save(weights, tmp_path / "model.ckpt")
    with zipfile.ZipFile(tmp_path / "vq.zip", "w") as file:
        file.write(tmp_path / "model.ckpt", "model.ckpt")
        write_zeros(file, "other.ckpt", 60 * MIB)
    named = replace(spec, source_member="model.ckpt")
    assert load_published(tmp_path / "vq.zip", named).keys() == weights.keys()
    limit = largest_checkpoint(spec)
    with pytest.raises(CodecError, match=rf"{60 * MIB} bytes; the limit is {limit} bytes \(the most that a"):
        read_checkpoint(tmp_path / "vq.zip", replace(spec, source_member="other.ckpt"))


def test_compressed_checkpoint_is_read(tmp_path: Path, spec: CodecSpec, weights: dict[str, Tensor]) -> None:
    torch.save(weights, tmp_path / "plain.ckpt")
    path = compressed(tmp_path / "plain.ckpt", tmp_path / "packed.ckpt")
    with nothing_left(tmp_path):
        loaded = load_published(path, spec)
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)
    with zipfile.ZipFile(tmp_path / "outer.zip", "w") as file:
        file.write(path, "model.ckpt")
    with nothing_left(tmp_path):
        again = load_published(tmp_path / "outer.zip", spec)
    assert all(torch.equal(again[name], weights[name]) for name in weights)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_names_that_occur_twice_are_refused(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    path = tmp_path / "twice.ckpt"
    torch.save(weights, path)
    with zipfile.ZipFile(path, "a") as file:
        file.writestr(file.namelist()[-1], b"other")
    with pytest.raises(CodecError, match=r"holds 'twice/.*' more than once"):
        read_checkpoint(path)
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as file:
        file.writestr("model.ckpt", b"a")
        file.writestr("model.ckpt", b"b")
    with pytest.raises(CodecError, match=r"exactly one file matching \*\.ckpt; found 2"):
        read_checkpoint(tmp_path / "two.zip")


def test_list_of_weights_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"a": torch.zeros(4)}, tmp_path / "x.ckpt")
    monkeypatch.setattr(archive, "MOST_PICKLE_BYTES", 20)
    with pytest.raises(CodecError, match=r"data\.pkl, has \d+ bytes; the limit is 20 bytes"):
        read_checkpoint(tmp_path / "x.ckpt")


@pytest.mark.parametrize("old_format", [False, True])
def test_many_weights_in_the_same_bytes(tmp_path: Path, old_format: bool) -> None:
    """1000 names for one megabyte would take a gigabyte of memory."""
    one = torch.zeros(MIB // 4)
    path = tmp_path / "shared.ckpt"
    torch.save({f"w{i}": one for i in range(1000)}, path, _use_new_zipfile_serialization=not old_format)
    with pytest.raises(CodecError, match=rf"1000 weights have {1000 * MIB} bytes together, but the file has \d+;"):
        read_checkpoint(path)


@pytest.mark.parametrize("old_format", [False, True])
@pytest.mark.parametrize(
    ("size", "stride"), [((1 << 40,), (0,)), ((1 << 20, 1 << 20), (1, 0)), ((2**62, 2), (0, 0)), ((5,), (1,))]
)
def test_small_storage_viewed_as_a_huge_tensor(
    tmp_path: Path, size: tuple[int, ...], stride: tuple[int, ...], old_format: bool
) -> None:
    class Huge:
        def __init__(self, storage: torch.TypedStorage) -> None:
            self.storage = storage

        def __reduce__(self) -> tuple[object, ...]:
            return torch._utils._rebuild_tensor_v2, (self.storage, 0, size, stride, False, {})

    storage = torch.zeros(4)._typed_storage()
    torch.save({"a": Huge(storage)}, tmp_path / "x.ckpt", _use_new_zipfile_serialization=not old_format)
    with pytest.raises(CodecError, match=r"x\.ckpt (does not hold a state dict|is not a checkpoint)"):
        read_checkpoint(tmp_path / "x.ckpt")


def test_header_of_safetensors_that_lies(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(2)}, path)
    path.write_bytes((2**62 + 1).to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(CodecError, match=rf"header should have {2**62 + 1} bytes, but only \d+ bytes follow"):
        read_checkpoint(path)
    header = b'{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,8]}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(CodecError, match="not a complete safetensors file"):
        read_checkpoint(path)


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("script", "it is a TorchScript archive, which holds a program"),
        ("tar", "it is a tar archive; unpack it first"),
        ("gzip", "it is compressed with gzip; unpack it first"),
        ("page", "it is a web page or XML; download the checkpoint again"),
    ],
)
def test_other_files_are_named_without_torchs_advice(tmp_path: Path, kind: str, reason: str) -> None:
    path, whole = tmp_path / "x.ckpt", io.BytesIO()
    torch.save({"a": torch.zeros(4)}, whole)
    if kind == "script":
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    elif kind == "tar":
        with tarfile.open(path, "w") as file:
            for name in ("sys_info", "pickle", "storages", "tensors"):
                file.addfile(tarfile.TarInfo(name))
    elif kind == "gzip":
        path.write_bytes(gzip.compress(whole.getvalue()))
    else:
        path.write_bytes(b"<!doctype html><html>")
    with pytest.raises(CodecError) as caught:
        read_checkpoint(path)
    assert str(caught.value).startswith(f"{path} is not a checkpoint that can be read: {reason}")
    assert "weights_only" not in str(caught.value)


def test_float64_is_rounded_to_float32(tmp_path: Path, spec: CodecSpec, weights: dict[str, Tensor]) -> None:
    third = torch.full((4,), 1 / 3, dtype=torch.float64)
    torch.save({**weights, "quant_conv.bias": third}, tmp_path / "x.ckpt")
    read = read_checkpoint(tmp_path / "x.ckpt")
    assert read.tensors["quant_conv.bias"].dtype is torch.float32
    assert torch.equal(read.tensors["quant_conv.bias"], third.float())
    assert read.converted == ("quant_conv.bias",)
    assert read.conversion == "1 float64 weight was rounded to float32, such as quant_conv.bias"
    assert load_published(tmp_path / "x.ckpt", spec)["quant_conv.bias"].dtype is torch.float32


@pytest.mark.parametrize("old_format", [False, True])
def test_a_pickle_that_claims_memory_is_refused(tmp_path: Path, old_format: bool) -> None:
    """Torch's weights-only unpickler would fill a GiB with zeros for these few bytes."""
    path = tmp_path / "claim.ckpt"
    claim = b"\x80\x02c__builtin__\nbytearray\n\x8a\x05" + (1 << 30).to_bytes(5, "little") + b"\x85R."
    if old_format:
        torch.save({}, path, _use_new_zipfile_serialization=False)
        path.write_bytes(path.read_bytes().replace(pickle.dumps({}, 2), claim))
    else:
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("archive/data.pkl", claim)
            file.writestr("archive/version", "3")
    with pytest.raises(CodecError, match=r"names builtins\.bytearray, which no published codec needs"):
        read_checkpoint(path)
