"""Reads published checkpoints (taming-transformers, latent-diffusion) as plain tensors, without running a pickle.

A published `.ckpt` is a Lightning pickle: beside `state_dict` it holds callbacks, optimizer states and
hyper-parameters, which are objects of pytorch_lightning, omegaconf and numpy. torch's weights-only unpickler reads
the file without importing any of these packages (see `unpickle`).
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from dat_workers.codecs.file import check_weights
from dat_workers.codecs.spec import CodecError, CodecSpec
from dat_workers.codecs.unpickle import unpickle

MAX_MEMBER_BYTES = 16 << 30
# The prefix of the training loss's weights. Users report 55 keys of vq-f4 that do not belong to the network: 33 of
# LPIPS and 22 of the discriminator. `model_ema.*` never occurs.
DROPPED_PREFIX = "loss."


@dataclass(frozen=True)
class Checkpoint:
    """The network's weights from a checkpoint, and a description of everything that was left out."""

    tensors: dict[str, Tensor]
    dropped: tuple[str, ...]


def load_published(path: Path, spec: CodecSpec) -> dict[str, Tensor]:
    """Returns the weights of a published checkpoint, which must be exactly those of the spec's network.

    >>> load_published(Path("vq-f8.zip"), registry.get("vqgan-openimages-f8-16384"))  # doctest: +SKIP

    `path` may be a Lightning `.ckpt` (torch's zip format or its older one), a zip that holds `spec.source_member`,
    a bare state dict or a `.safetensors` file. Raises CodecError as `read_checkpoint` and `file.check_weights` do.
    """
    tensors = read_checkpoint(path, spec.source_member).tensors
    check_weights(spec, tensors, str(path))
    return tensors


def read_checkpoint(path: Path, member: str | None = None) -> Checkpoint:
    """Returns the tensors of a checkpoint file, except `loss.*`; does not compare them with any spec.

    >>> read_checkpoint(Path("last.ckpt")).dropped  # doctest: +SKIP
    ('55 weights of the training loss (loss.*)', 'callbacks', 'optimizer_states')

    `member` is the checkpoint's name inside a zip; by default the zip must hold a single `.ckpt`. Raises CodecError
    for a file that is not a checkpoint, a damaged file, and a file whose pickle names anything outside
    `unpickle.ALLOWED` (nothing that the pickle names is imported or run).
    """
    try:
        if not zipfile.is_zipfile(path) or _is_torch_zip(path):
            return _read_unpacked(path, str(path))
        # The member is unpacked beside the archive because it has about 1 GB, and /tmp may be held in memory.
        beside = path.parent if os.access(path.parent, os.W_OK) else None
        with tempfile.TemporaryDirectory(dir=beside, prefix=".unzip-") as folder:
            return _read_unpacked(_extract(path, member, Path(folder)), f"{path}, member {member or 'ckpt'}")
    except FileNotFoundError as error:
        raise CodecError(f"{path}: no such file") from error
    except OSError as error:
        raise CodecError(f"{path} could not be read: {error}") from error


def _is_torch_zip(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return any(PurePosixPath(name).name == "data.pkl" for name in archive.namelist())
    except zipfile.BadZipFile as error:
        raise CodecError(f"{path} is a damaged zip file: {error}") from error


def _extract(path: Path, member: str | None, folder: Path) -> Path:
    """Unpacks one member under a fixed name, because names inside an archive must not become paths; returns it."""
    pattern = PurePosixPath(member).name if member else "*.ckpt"
    try:
        with zipfile.ZipFile(path) as archive:
            matches = [i for i in archive.infolist() if PurePosixPath(i.filename).match(pattern)]
            if len(matches) != 1:
                names = ", ".join(archive.namelist()[:5]) or "none"
                raise CodecError(
                    f"{path} must contain exactly one file matching {pattern}; found {len(matches)}. "
                    f"Files there: {names}"
                )
            if matches[0].file_size > MAX_MEMBER_BYTES:
                raise CodecError(
                    f"{path}: {pattern} unpacks to {matches[0].file_size} bytes; the limit is {MAX_MEMBER_BYTES}"
                )
            target = folder / "member.ckpt"
            with archive.open(matches[0]) as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
            return target
    # zipfile raises RuntimeError for an encrypted archive, and its subclass NotImplementedError for a compression
    # method that Python does not support.
    except (zipfile.BadZipFile, RuntimeError, EOFError, zlib.error) as error:
        raise CodecError(f"{path} could not be unpacked: {error}") from error


def _read_unpacked(path: Path, where: str) -> Checkpoint:
    with path.open("rb") as file:
        head = file.read(9)
    content: object
    if head[8:9] == b"{":  # the start of a safetensors header; a zip and torch's older format differ here
        try:
            content = load_file(path)
        except SafetensorError as error:
            raise CodecError(f"{where} is not a complete safetensors file: {error}") from error
    else:
        content = unpickle(path, where)
    state: object = content
    dropped: list[str] = []
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        state = content["state_dict"]
        dropped = sorted(str(key) for key in content if key != "state_dict")
    if not isinstance(state, dict) or not state:
        raise CodecError(f"{where} holds a {type(state).__name__}, not a state dict")
    foreign = [str(key) for key, value in state.items() if not (isinstance(key, str) and _is_plain(value))]
    if foreign:
        raise CodecError(
            f"{where} does not hold a state dict: {len(foreign)} entries are not plain tensors, such as "
            f"{', '.join(foreign[:5])}; every entry must be a dense tensor"
        )
    weights = {k: v for k, v in state.items() if not k.startswith(DROPPED_PREFIX)}
    if len(state) > len(weights):
        dropped.insert(0, f"{len(state) - len(weights)} weights of the training loss ({DROPPED_PREFIX}*)")
    # The loaded tensors are views of a mapped file that may be deleted afterwards, so they are copied.
    tensors = {k: v.detach().clone(memory_format=torch.contiguous_format) for k, v in weights.items()}
    return Checkpoint(tensors, tuple(dropped))


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
    if any(width % ch for width in widths):
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
    check_weights(spec, tensors, f"codec {name!r}")
    return spec
