"""One codec is one `.safetensors` file: the weights, and in its metadata spec, fingerprint and origin.

metadata["spec"]         CodecSpec as JSON
metadata["fingerprint"]  sha256 of geometry and weights, see `fingerprint`
metadata["origin"]       Origin as JSON: where the weights came from, its sha256, the date
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dat_workers.codecs.networks.vqgan import VQGAN
from dat_workers.codecs.spec import CodecError, CodecSpec
from dat_workers.system.files import write_atomically

SHOWN = 5  # how many offending keys an error names; it counts the rest
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Origin:
    """Where a codec's weights came from: an address or file name, the sha256 of that file, and when (UTC)."""

    source: str
    sha256: str
    date: str

    @classmethod
    def now(cls, source: str, sha256: str) -> Origin:
        """An origin dated today."""
        return cls(source, sha256, datetime.now(UTC).strftime("%Y-%m-%d"))


@dataclass(frozen=True)
class CodecHeader:
    """What a codec file says about itself; nothing but names and shapes was checked."""

    spec: CodecSpec
    fingerprint: str
    origin: Origin


@dataclass(frozen=True)
class CodecFile:
    """A codec as read and verified; the tensors have the dtype they were stored in."""

    spec: CodecSpec
    tensors: dict[str, Tensor]
    fingerprint: str
    origin: Origin


@functools.lru_cache(maxsize=32)
def expected_shapes(spec: CodecSpec) -> Mapping[str, tuple[int, ...]]:
    """Every weight's name and shape for that geometry; nothing is allocated.

    >>> expected_shapes(CodecSpec("toy", ch=32, ch_mult=(1,), codebook_size=8, latent_dim=4))[
    ...     "quantize.embedding.weight"]
    (8, 4)
    """
    if spec.architecture == "identity":
        return {}
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in VQGAN(spec).state_dict().items()}


def _listed(items: Sequence[str]) -> str:
    more = f", and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
    return ", ".join(items[:SHOWN]) + more


def check_shapes(spec: CodecSpec, shapes: Mapping[str, Sequence[int]], where: str) -> None:
    """Raises CodecError unless names and shapes are exactly those of the spec's network.

    The error names the first keys that are missing, unexpected or of another shape, and counts all.
    """
    wanted = expected_shapes(spec)
    missing = [name for name in wanted if name not in shapes]
    unexpected = sorted(name for name in shapes if name not in wanted)
    differing = [
        f"{name} (expected {list(shape)}, found {list(shapes[name])})"
        for name, shape in wanted.items()
        if name in shapes and tuple(shapes[name]) != shape
    ]
    problems = [
        f"{len(names)} {what}: {_listed(names)}"
        for names, what in (
            (missing, "missing keys"),
            (unexpected, "unexpected keys"),
            (differing, "keys of another shape"),
        )
        if names
    ]
    if problems:
        raise CodecError(f"{where} does not hold the weights of codec {spec.name!r}: {'; '.join(problems)}")


def check_weights(spec: CodecSpec, tensors: Mapping[str, Tensor], where: str) -> None:
    """`check_shapes`, and every weight is floating point of 16 or 32 bits and finite; else CodecError."""
    check_shapes(spec, {name: tensor.shape for name, tensor in tensors.items()}, where)
    wrong = [f"{name} ({tensor.dtype})" for name, tensor in tensors.items() if tensor.dtype not in DTYPES]
    if wrong:
        raise CodecError(f"{where}: {len(wrong)} weights are not of float32, float16 or bfloat16: {_listed(wrong)}")
    broken = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise CodecError(f"{where}: {len(broken)} weights hold NaN or infinity: {_listed(broken)}")


def geometry(spec: CodecSpec) -> dict[str, Any]:
    """The fields that decide what the network computes, in one canonical form.

    `resolution` and `attn_resolutions` only place the attention: what counts is on which levels it ends up.
    """
    if spec.architecture == "identity":
        return {"architecture": "identity"}
    levels = [i for i in range(len(spec.ch_mult)) if spec.resolution >> i in spec.attn_resolutions]
    return {
        "architecture": spec.architecture,
        "ch": spec.ch,
        "ch_mult": list(spec.ch_mult),
        "num_res_blocks": spec.num_res_blocks,
        "attention_levels": levels,
        "z_channels": spec.z_channels,
        "codebook_size": spec.codebook_size,
        "latent_dim": spec.latent_dim,
    }


def fingerprint(spec: CodecSpec, tensors: Mapping[str, Tensor]) -> str:
    """sha256 (hex) over `geometry` and every tensor's name, dtype, shape and bytes, in sorted order.

    Name, licence, summary and source do not count: equal fingerprints mean equal outputs.

    >>> fingerprint(CodecSpec("identity", architecture="identity"), {})[:8]
    'b5a79ec0'
    """
    digest = hashlib.sha256(json.dumps(geometry(spec), sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        kind = str(tensor.dtype).removeprefix("torch.")
        digest.update(json.dumps([name, kind, list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write(path: Path, spec: CodecSpec, tensors: Mapping[str, Tensor], origin: Origin) -> str:
    """Writes one codec file and returns its fingerprint; the name appears only once the file is whole.

    >>> write(Path("toy.safetensors"), spec, tensors, Origin.now("toy.ckpt", sha256))  # doctest: +SKIP

    Raises CodecError for weights that `read` would refuse and for what the disk refuses; nothing new is
    left behind then, and an older file of that name stays as it was.
    """
    check_weights(spec, tensors, f"what was to become {path}")
    mark = fingerprint(spec, tensors)
    metadata = {
        "spec": json.dumps(spec.to_dict()),
        "fingerprint": mark,
        "origin": json.dumps(asdict(origin)),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # a copy each: safetensors refuses tensors that share memory. Not save_file: it makes a temporary file of
        # its own, readable by its owner only
        copies = {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}
        write_atomically(path, save(copies, metadata))
    except (OSError, SafetensorError) as error:
        raise CodecError(f"{path} could not be written: {error}") from error
    return mark


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except FileNotFoundError as error:
        raise CodecError(f"{path}: no such file") from error
    except (OSError, SafetensorError) as error:
        raise CodecError(f"{path} is not a whole safetensors file: {error}") from error


def _header(file: Any, path: Path) -> CodecHeader:
    metadata = file.metadata() or {}
    absent = [key for key in ("spec", "fingerprint", "origin") if key not in metadata]
    if absent:
        raise CodecError(f"{path} is not a codec file: its metadata lacks {', '.join(absent)}")
    try:
        spec = CodecSpec.from_dict(json.loads(metadata["spec"]))
        origin = Origin(**json.loads(metadata["origin"]))
    except CodecError as error:
        raise CodecError(f"{path}: {error}") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise CodecError(f"{path}: its metadata is not readable: {error}") from error
    names = file.keys()
    check_shapes(spec, {name: file.get_slice(name).get_shape() for name in names}, str(path))
    return CodecHeader(spec, metadata["fingerprint"], origin)


def read_header(path: Path) -> CodecHeader:
    """What the file says about itself, with names and shapes checked but not the weights: milliseconds.

    Raises CodecError as `read` does, save for altered or non-finite weights.
    """
    with _opened(path) as file:
        return _header(file, path)


def read(path: Path) -> CodecFile:
    """Reads and verifies one codec file.

    >>> read(Path("tiny-f8.safetensors")).spec.factor  # doctest: +SKIP
    8

    Raises CodecError, naming the file: truncated or no safetensors file, metadata absent, keys missing,
    unexpected or of another shape, non-finite weights, weights that do not match the fingerprint.
    """
    with _opened(path) as file:
        header = _header(file, path)
        names = file.keys()
        tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in names}
    check_weights(header.spec, tensors, str(path))
    found = fingerprint(header.spec, tensors)
    if found != header.fingerprint:
        raise CodecError(
            f"{path} was altered: its weights have fingerprint {found}, its metadata says {header.fingerprint}"
        )
    return CodecFile(header.spec, tensors, found, header.origin)
