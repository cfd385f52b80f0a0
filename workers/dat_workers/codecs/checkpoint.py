"""Reads published checkpoints (taming-transformers, latent-diffusion) as plain tensors, without running a pickle.

A published `.ckpt` is a Lightning pickle: beside `state_dict` it holds callbacks, optimizer states and
hyper-parameters, which are objects of pytorch_lightning, omegaconf and numpy. torch's weights-only unpickler reads
the file without importing any of these packages (see `unpickle`).
"""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dat_client.errors import shown
from dat_workers.codecs import archive
from dat_workers.codecs.file import check_shapes, check_weights, parameter_count
from dat_workers.codecs.spec import CodecError, CodecSpec
from dat_workers.codecs.unpickle import unpickle

log = logging.getLogger("dat_workers")

# A checkpoint of a training holds at most four numbers for each weight: the weight, its moving average and the two
# moments of Adam, each of at most 8 bytes. The rest is for the networks of the training loss and their moments.
NUMBERS_PER_WEIGHT, BYTES_PER_NUMBER, OTHER_BYTES = 4, 8, 1 << 30
# The prefix of the training loss's weights. Users report 55 keys of vq-f4 that do not belong to the network: 33 of
# LPIPS and 22 of the discriminator. `model_ema.*` never occurs.
DROPPED_PREFIX = "loss."


@dataclass(frozen=True)
class Checkpoint:
    """The network's weights from a checkpoint, and a description of everything that was left out.

    `converted` names the weights that were stored in float64 and are float32 in `tensors`.
    """

    tensors: dict[str, Tensor]
    dropped: tuple[str, ...]
    converted: tuple[str, ...] = ()

    @property
    def conversion(self) -> str:
        """Says which weights were converted, in a sentence; an empty string if none was."""
        if not self.converted:
            return ""
        count = len(self.converted)
        weights = "1 float64 weight was" if count == 1 else f"{count} float64 weights were"
        return f"{weights} rounded to float32, such as {self.converted[0]}"


def largest_checkpoint(spec: CodecSpec) -> int:
    """Returns the largest size in bytes that a checkpoint of this codec may have, with all that a training stores.

    >>> largest_checkpoint(registry.get("vqgan-imagenet-f16-16384")) / 1e9  # doctest: +SKIP
    3.5
    """
    return parameter_count(spec) * NUMBERS_PER_WEIGHT * BYTES_PER_NUMBER + OTHER_BYTES


def load_published(path: Path, spec: CodecSpec) -> dict[str, Tensor]:
    """Returns the weights of a published checkpoint, which must be exactly those of the spec's network.

    >>> load_published(Path("vq-f8.zip"), registry.get("vqgan-openimages-f8-16384"))  # doctest: +SKIP

    `path` may be a Lightning `.ckpt` (torch's zip format or its older one), a zip that holds `spec.source_member`,
    a bare state dict or a `.safetensors` file. Raises CodecError as `read_checkpoint` and `file.check_weights` do.
    """
    checkpoint = read_checkpoint(path, spec)
    check_weights(spec, checkpoint.tensors, str(path))
    if checkpoint.converted:
        log.warning("%s: %s", path, checkpoint.conversion)
    return checkpoint.tensors


def read_checkpoint(path: Path, spec: CodecSpec | None = None) -> Checkpoint:
    """Returns the tensors of a checkpoint file, except `loss.*`; does not compare them with the spec.

    >>> read_checkpoint(Path("last.ckpt")).dropped  # doctest: +SKIP
    ('55 weights of the training loss (loss.*)', 'callbacks', 'optimizer_states')

    Weights in float64 are rounded to float32. The spec is that of the expected codec, if it is known: it limits the
    size of what an archive may unpack to, and its `source_member` is the checkpoint's name inside a zip. By default
    the zip must hold a single `.ckpt`. Raises CodecError for a file that is not a checkpoint, a damaged file, an
    archive that unpacks to more than is plausible (see `archive`), and a file whose pickle names anything outside
    `unpickle.ALLOWED` (nothing that the pickle names is imported or run).
    """
    member = spec.source_member if spec else None
    pattern = PurePosixPath(member).name if member else "*.ckpt"
    try:
        with archive.unpacked(path, pattern, largest_checkpoint(spec) if spec else None) as file:
            same = file == path or file.name == "stored.ckpt"
            return _read_unpacked(file, str(path) if same else f"{path}, member {member or 'ckpt'}")
    except FileNotFoundError as error:
        raise CodecError(f"{path}: no such file") from error
    except OSError as error:
        raise CodecError(f"{path} could not be read: {error}") from error


def _read_unpacked(path: Path, where: str) -> Checkpoint:
    content = _load_safetensors(path, where) if _is_safetensors(path) else unpickle(path, where)
    state: object = content
    dropped: list[str] = []
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        state = content["state_dict"]
        dropped = sorted(key if isinstance(key, str) else shown(key) for key in content if key != "state_dict")
    if not isinstance(state, dict) or not state:
        raise CodecError(f"{where} holds a {type(state).__name__}, not a state dict")
    foreign = [
        key if isinstance(key, str) else shown(key)
        for key, value in state.items()
        if not (isinstance(key, str) and _is_plain(value))
    ]
    if foreign:
        raise CodecError(
            f"{where} does not hold a state dict: {len(foreign)} entries are not plain tensors, such as "
            f"{', '.join(foreign[:5])}; every entry must be a dense tensor"
        )
    weights = {k: v for k, v in state.items() if not k.startswith(DROPPED_PREFIX)}
    if len(state) > len(weights):
        dropped.insert(0, f"{len(state) - len(weights)} weights of the training loss ({DROPPED_PREFIX}*)")
    _check_distinct(weights, path, where)
    # The loaded tensors are views of a mapped file that may be deleted afterwards, so they are copied.
    tensors = {
        k: v.detach().to(
            torch.float32 if v.dtype is torch.float64 else v.dtype, memory_format=torch.contiguous_format, copy=True
        )
        for k, v in weights.items()
    }
    return Checkpoint(tensors, tuple(dropped), tuple(k for k, v in weights.items() if v.dtype is torch.float64))


def _is_safetensors(path: Path) -> bool:
    """Returns True if a file begins with a safetensors header; a zip and torch's older format differ in byte 8."""
    with path.open("rb") as file:
        return file.read(9)[8:] == b"{"


def _load_safetensors(path: Path, where: str) -> dict[str, Tensor]:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
    rest = path.stat().st_size - 8
    if length > rest:
        raise CodecError(
            f"{where} is not a complete safetensors file: its header should have {length} bytes, but only {rest} "
            "bytes follow; fetch the file again"
        )
    try:
        return load_file(path)
    except SafetensorError as error:
        raise CodecError(f"{where} is not a complete safetensors file: {error}") from error


def _is_plain(value: object) -> bool:
    """Returns True for a dense tensor whose values are all in the file: not sparse, quantized, meta or expanded.

    An expanded tensor of a few bytes can claim any shape, and copying it would allocate memory for that shape.
    """
    return (
        isinstance(value, Tensor)
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    )


def _check_distinct(weights: dict[str, Tensor], path: Path, where: str) -> None:
    """Raises CodecError if the weights are larger than their file, because they share its bytes."""
    total, size = sum(v.numel() * v.element_size() for v in weights.values()), path.stat().st_size
    if total > size:
        raise CodecError(
            f"{where}: its {len(weights)} weights have {total} bytes together, but the file has {size}; a codec's "
            "weights must not share memory"
        )


_BLOCK = re.compile(r"encoder\.down\.(\d+)\.block\.(\d+)\.conv1\.weight")


def infer_spec(tensors: dict[str, Tensor], name: str) -> CodecSpec:
    """Returns the geometry of a VQGAN, read from the names and shapes of its weights.

    >>> infer_spec(read_checkpoint(Path("mine.ckpt")).tensors, "mine").ch_mult  # doctest: +SKIP
    (1, 2, 2, 4)

    The training resolution cannot be read from the weights. The returned spec has 256, which affects nothing but
    the numbers in `attn_resolutions`. Raises CodecError unless the weights are exactly those of a VQGAN.
    """
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    for key, rank in (
        ("encoder.conv_in.weight", 4),
        ("encoder.conv_out.weight", 4),
        ("quantize.embedding.weight", 2),
    ):
        if len(shapes.get(key, ())) != rank:
            found = list(shapes[key]) if key in shapes else "absent"
            raise CodecError(f"codec {name!r} is not a VQGAN: {key} must have {rank} dimensions, but is {found}")
    blocks: dict[int, list[int]] = {}  # level: the width of each of its blocks
    for key, shape in shapes.items():
        if match := _BLOCK.fullmatch(key):
            blocks.setdefault(int(match[1]), []).append(shape[0] if shape else 0)
    levels = range(len(blocks))
    if sorted(blocks) != list(levels) or not blocks:
        raise CodecError(
            f"codec {name!r} is not a VQGAN: its encoder has the levels {sorted(blocks)}, which must be "
            "0, 1, 2, ... without gaps"
        )
    ch = shapes["encoder.conv_in.weight"][0]
    widths = [blocks[i][0] for i in levels]
    if not ch or any(width % ch for width in widths):
        raise CodecError(f"codec {name!r}: its levels have {widths} channels, which are not multiples of ch={ch}")
    resolution = max(256, 1 << (len(widths) - 1))
    codebook_size, latent_dim = shapes["quantize.embedding.weight"]
    spec = CodecSpec(
        name,
        ch=ch,
        ch_mult=tuple(width // ch for width in widths),
        num_res_blocks=len(blocks[0]),
        attn_resolutions=tuple(resolution >> i for i in levels if f"encoder.down.{i}.attn.0.norm.weight" in shapes),
        resolution=resolution,
        z_channels=shapes["encoder.conv_out.weight"][0],
        codebook_size=codebook_size,
        latent_dim=latent_dim,
        summary="imported",
    )
    check_shapes(spec, shapes, f"codec {name!r}")
    return spec
