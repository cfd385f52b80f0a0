"""Published checkpoints (taming-transformers, latent-diffusion) to plain tensors, without running a pickle.

A published `.ckpt` is a Lightning pickle: beside `state_dict` it holds callbacks, optimizer states and
hyper-parameters made of classes of pytorch_lightning, omegaconf and numpy. It is read with torch's
weights-only unpickler and nothing of it is imported or run: see `unpickle`.
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
DROPPED_PREFIX = "loss."  # the training loss: LPIPS and discriminator. `model_ema.*` never occurs (vq-f4's
# 55 keys beside the network, the count users report, are 33 of LPIPS and 22 of the discriminator)


@dataclass(frozen=True)
class Checkpoint:
    """The network's weights of a checkpoint, and in words what else it held."""

    tensors: dict[str, Tensor]
    dropped: tuple[str, ...]


def load_published(path: Path, spec: CodecSpec) -> dict[str, Tensor]:
    """The weights of a published checkpoint, strictly those of the spec's network.

    >>> load_published(Path("vq-f8.zip"), registry.get("vqgan-openimages-f8-16384"))  # doctest: +SKIP

    `path` may be a Lightning `.ckpt` (torch's zip or older format), a zip that holds `spec.source_member`,
    a bare state dict or a `.safetensors` file. Raises CodecError: see `read_checkpoint` and
    `file.check_weights`.
    """
    tensors = read_checkpoint(path, spec.source_member).tensors
    check_weights(spec, tensors, str(path))
    return tensors


def read_checkpoint(path: Path, member: str | None = None) -> Checkpoint:
    """The tensors of a checkpoint file, less `loss.*`, not yet compared with any spec.

    >>> read_checkpoint(Path("last.ckpt")).dropped  # doctest: +SKIP
    ('55 weights of the training loss (loss.*)', 'callbacks', 'optimizer_states')

    `member` names the checkpoint inside a zip; without it the only `.ckpt` in there is taken. Raises
    CodecError for a file of another kind, a damaged one, and one whose pickle names anything outside
    `unpickle.ALLOWED` (nothing of it is imported or run).
    """
    try:
        with path.open("rb") as file:
            head = file.read(9)
        if not zipfile.is_zipfile(path) or _is_torch_zip(path):
            return _read_plain(path, head)
        # beside the archive, not in /tmp: a checkpoint is about 1 GB and /tmp may be memory
        beside = path.parent if os.access(path.parent, os.W_OK) else None
        with tempfile.TemporaryDirectory(dir=beside, prefix=".unzip-") as folder:
            inner = _extract(path, member, Path(folder))
            with inner.open("rb") as file:
                head = file.read(9)
            return _read_plain(inner, head, f"{path}, member {member or 'ckpt'}")
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
    """Writes one member under a name of our own: names inside the archive never become paths."""
    try:
        with zipfile.ZipFile(path) as archive:
            found = [
                info
                for info in archive.infolist()
                if (info.filename.endswith(".ckpt") if member is None else _same_name(info.filename, member))
            ]
            wanted = member or "*.ckpt"
            if len(found) != 1:
                names = ", ".join(archive.namelist()[:5]) or "nothing"
                raise CodecError(f"{path} must hold one {wanted}, it has {len(found)} (it holds {names})")
            if found[0].file_size > MAX_MEMBER_BYTES:
                raise CodecError(
                    f"{path}: {wanted} unpacks to {found[0].file_size} bytes, the limit is {MAX_MEMBER_BYTES}"
                )
            target = folder / "member.ckpt"
            with archive.open(found[0]) as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
            return target
    # RuntimeError: encrypted, and (NotImplementedError) a compression that Python lacks
    except (zipfile.BadZipFile, RuntimeError, EOFError, zlib.error) as error:
        raise CodecError(f"{path} could not be unpacked: {error}") from error


def _same_name(filename: str, member: str) -> bool:
    return PurePosixPath(filename).name == PurePosixPath(member).name


def _read_plain(path: Path, head: bytes, where: str = "") -> Checkpoint:
    where = where or str(path)
    content: object
    if head[8:9] == b"{":  # a safetensors header; neither a zip nor torch's older magic number has that there
        try:
            content = load_file(path)
        except SafetensorError as error:
            raise CodecError(f"{where} is not a whole safetensors file: {error}") from error
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
            f"{where} holds no state dict: {len(foreign)} entries are no plain tensors, such as "
            f"{', '.join(foreign[:5])}"
        )
    kept = {k: v for k, v in state.items() if not k.startswith(DROPPED_PREFIX)}
    if len(state) > len(kept):
        dropped.insert(0, f"{len(state) - len(kept)} weights of the training loss ({DROPPED_PREFIX}*)")
    # copies: the loaded tensors are views into a mapped file that may be deleted next
    tensors = {k: v.detach().clone(memory_format=torch.contiguous_format) for k, v in kept.items()}
    return Checkpoint(tensors, tuple(dropped))


def _is_plain(value: object) -> bool:
    """A dense tensor with all its values in the file: no sparse, quantized, meta or expanded one.

    An expanded tensor of a few bytes can claim any shape, and would be allocated when it is copied.
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
    """The geometry of a VQGAN, read from the names and shapes of its weights.

    >>> infer_spec(read_checkpoint(Path("mine.ckpt")).tensors, "mine").ch_mult  # doctest: +SKIP
    (1, 2, 2, 4)

    The training resolution is not in the weights; 256 is assumed, it only names the levels with attention.
    Raises CodecError where the weights are not exactly one VQGAN.
    """
    shapes = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    for key, rank in (
        ("encoder.conv_in.weight", 4),
        ("encoder.conv_out.weight", 4),
        ("quantize.embedding.weight", 2),
    ):
        if len(shapes.get(key, ())) != rank:
            found = list(shapes[key]) if key in shapes else "absent"
            raise CodecError(f"codec {name!r}: no VQGAN, {key} must have {rank} dimensions and is {found}")
    blocks: dict[int, list[int]] = {}
    for key, shape in shapes.items():
        match = _BLOCK.fullmatch(key)
        if match:
            blocks.setdefault(int(match[1]), []).append(shape[0] if shape else 0)
    if sorted(blocks) != list(range(len(blocks))) or not blocks:
        raise CodecError(f"codec {name!r}: no VQGAN, its encoder has the levels {sorted(blocks)}")
    ch = shapes["encoder.conv_in.weight"][0]
    widths = [blocks[level][0] for level in sorted(blocks)]
    if any(width % ch for width in widths):
        raise CodecError(f"codec {name!r}: its levels are {widths} wide, which are no multiples of ch={ch}")
    resolution = max(256, 1 << (len(widths) - 1))
    attention = [i for i in range(len(widths)) if f"encoder.down.{i}.attn.0.norm.weight" in shapes]
    codebook_size, latent_dim = shapes["quantize.embedding.weight"]
    spec = CodecSpec(
        name,
        ch=ch,
        ch_mult=tuple(width // ch for width in widths),
        num_res_blocks=len(blocks[0]),
        attn_resolutions=tuple(resolution >> i for i in attention),
        resolution=resolution,
        z_channels=shapes["encoder.conv_out.weight"][0],
        codebook_size=codebook_size,
        latent_dim=latent_dim,
        summary="imported",
    )
    check_weights(spec, tensors, f"codec {name!r}")
    return spec
