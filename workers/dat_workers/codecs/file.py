"""A codec file: the weights as `.safetensors`, with the codec's description in the metadata.

metadata["spec"]         CodecSpec as JSON
metadata["fingerprint"]  sha256 of geometry and weights, see `fingerprint`
metadata["origin"]       Origin as JSON: where the weights came from, the sha256 of that file, and the date
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
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

MAX_KEYS_NAMED = 5  # an error names at most this many offending keys, and gives the number of the rest
STORED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Origin:
    """The origin of a codec's weights: an address or file name, the sha256 of that file, and the date (UTC)."""

    source: str
    sha256: str
    date: str

    @classmethod
    def now(cls, source: str, sha256: str) -> Origin:
        """Returns an origin dated today."""
        return cls(source, sha256, datetime.now(UTC).strftime("%Y-%m-%d"))


@dataclass(frozen=True)
class CodecHeader:
    """The metadata of a codec file; the names and shapes of its weights are checked, but not their values."""

    spec: CodecSpec
    fingerprint: str
    origin: Origin


@dataclass(frozen=True)
class CodecFile(CodecHeader):
    """A codec whose weights are read and verified; the tensors have the dtype in which they were stored."""

    tensors: dict[str, Tensor]


@functools.lru_cache(maxsize=32)
def expected_shapes(spec: CodecSpec) -> Mapping[str, tuple[int, ...]]:
    """Returns the name and shape of every weight of the spec's network, without allocating any.

    >>> expected_shapes(CodecSpec("toy", ch=32, ch_mult=(1,), codebook_size=8, latent_dim=4))[
    ...     "quantize.embedding.weight"]
    (8, 4)
    """
    if spec.architecture == "identity":
        return {}
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in VQGAN(spec).state_dict().items()}


def parameter_count(spec: CodecSpec) -> int:
    """Returns the number of parameters of the spec's network, including the codebook.

    >>> parameter_count(CodecSpec("identity", architecture="identity"))
    0
    """
    return sum(math.prod(shape) for shape in expected_shapes(spec).values())


def _enumerate(items: Sequence[str]) -> str:
    rest = f", and {len(items) - MAX_KEYS_NAMED} more" if len(items) > MAX_KEYS_NAMED else ""
    return ", ".join(items[:MAX_KEYS_NAMED]) + rest


def check_shapes(spec: CodecSpec, shapes: Mapping[str, Sequence[int]], where: str) -> None:
    """Raises CodecError unless names and shapes are exactly those of the spec's network.

    The error says how many keys are missing, unexpected or of the wrong shape, and names the first few of each.
    `where` is the name of the file in errors.
    """
    expected = expected_shapes(spec)
    offending_keys = {
        "missing keys": [name for name in expected if name not in shapes],
        "unexpected keys": sorted(name for name in shapes if name not in expected),
        "keys of another shape than expected": [
            f"{name} (expected {list(shape)}, found {list(shapes[name])})"
            for name, shape in expected.items()
            if name in shapes and tuple(shapes[name]) != shape
        ],
    }
    problems = [f"{len(keys)} {kind}: {_enumerate(keys)}" for kind, keys in offending_keys.items() if keys]
    if problems:
        raise CodecError(f"{where} does not hold the weights of codec {spec.name!r}: {'; '.join(problems)}")


def check_weights(spec: CodecSpec, tensors: Mapping[str, Tensor], where: str) -> None:
    """Raises CodecError as `check_shapes` does, and for weights with which no codec can work.

    These are weights that are not finite or not of STORED_DTYPES, and a codebook whose entries are all equal.
    """
    check_shapes(spec, {name: tensor.shape for name, tensor in tensors.items()}, where)
    wrong = [f"{name} ({tensor.dtype})" for name, tensor in tensors.items() if tensor.dtype not in STORED_DTYPES]
    if wrong:
        raise CodecError(f"{where}: {len(wrong)} weights are not float32, float16 or bfloat16: {_enumerate(wrong)}")
    broken = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise CodecError(f"{where}: {len(broken)} weights hold NaN or infinity: {_enumerate(broken)}")
    codebook = tensors.get("quantize.embedding.weight")
    if codebook is not None and bool((codebook == codebook[:1]).all()):
        entry = "zero" if not bool(codebook.any()) else "equal"
        raise CodecError(
            f"{where}: all {len(codebook)} entries of the codebook are {entry}, so every picture would become the "
            "same; at least two entries must differ. Was the codec saved before it was trained?"
        )


def geometry(spec: CodecSpec) -> dict[str, Any]:
    """Returns the fields that decide what the network computes, in one canonical form.

    `resolution` and `attn_resolutions` only decide which levels have attention, so those levels are returned
    instead.
    """
    if spec.architecture == "identity":
        return {"architecture": "identity"}
    fields = ("architecture", "ch", "ch_mult", "num_res_blocks", "z_channels", "codebook_size", "latent_dim")
    values = spec.to_dict()
    return {name: values[name] for name in fields} | {"attention_levels": spec.attention_levels}


def fingerprint(spec: CodecSpec, tensors: Mapping[str, Tensor]) -> str:
    """Returns the sha256 (hex) of `geometry` and of every tensor's name, dtype, shape and bytes, in sorted order.

    Name, licence, summary and source are not included: codecs with equal fingerprints give equal outputs.

    >>> fingerprint(CodecSpec("identity", architecture="identity"), {})[:8]
    'b5a79ec0'
    """
    digest = hashlib.sha256(json.dumps(geometry(spec), sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        dtype = str(tensor.dtype).removeprefix("torch.")
        digest.update(json.dumps([name, dtype, list(tensor.shape)]).encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write(path: Path, spec: CodecSpec, tensors: Mapping[str, Tensor], origin: Origin) -> str:
    """Writes one codec file and returns its fingerprint; creates `path` only when the file is complete.

    >>> write(Path("toy.safetensors"), spec, tensors, Origin.now("toy.ckpt", sha256))  # doctest: +SKIP

    Raises CodecError for weights that `read` would refuse, and if the file cannot be written. No new file is left
    behind in either case, and an older file of that name stays as it was.
    """
    check_weights(spec, tensors, f"the codec to be written to {path}")
    digest = fingerprint(spec, tensors)
    metadata = {
        "spec": json.dumps(spec.to_dict()),
        "fingerprint": digest,
        "origin": json.dumps(asdict(origin)),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Every tensor is copied because safetensors refuses tensors that share memory. `save_file` is not used
        # because the files that it creates can be read by their owner only.
        copies = {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}
        write_atomically(path, save(copies, metadata))
    except (OSError, SafetensorError) as error:
        raise CodecError(f"{path} could not be written: {error}") from error
    return digest


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except FileNotFoundError as error:
        raise CodecError(f"{path}: no such file") from error
    except (OSError, SafetensorError) as error:
        raise CodecError(f"{path} is not a complete safetensors file: {error}") from error


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
        raise CodecError(f"{path}: its metadata cannot be read: {error}") from error
    check_shapes(spec, {name: file.get_slice(name).get_shape() for name in file.keys()}, str(path))  # noqa: SIM118
    return CodecHeader(spec, metadata["fingerprint"], origin)


def read_header(path: Path) -> CodecHeader:
    """Reads a codec file's metadata and checks the names and shapes of its weights, which takes milliseconds.

    The weights themselves are not read. Raises CodecError as `read` does, except for altered or non-finite weights.
    """
    with _opened(path) as file:
        return _header(file, path)


def read(path: Path) -> CodecFile:
    """Reads and verifies one codec file.

    >>> read(Path("tiny-f8.safetensors")).spec.factor  # doctest: +SKIP
    8

    Raises CodecError, which names the file, if the file is truncated or not a safetensors file, if metadata or keys
    are missing, if keys are unexpected or have the wrong shape, and if weights are not finite or do not match the
    fingerprint.
    """
    with _opened(path) as file:
        header = _header(file, path)
        tensors: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    check_weights(header.spec, tensors, str(path))
    digest = fingerprint(header.spec, tensors)
    if digest != header.fingerprint:
        raise CodecError(
            f"{path} was altered: its weights have fingerprint {digest}, but its metadata says "
            f"{header.fingerprint}; install the codec again"
        )
    return CodecFile(header.spec, digest, header.origin, tensors)
