"""Exports a codec as ONNX files, for runtimes other than PyTorch (`dat export`).

encoder.onnx   images fp32 [N,3,H,W] in 0..1            → latents fp32 [N,d,H/f,W/f]
codebook.onnx  latents                                   → indices int64 [N,h,w] (Eq. 3)
decoder.onnx   indices int64 [N,h,w]                     → images fp32 [N,3,h·f,w·f], about 0..1, not clipped
codec.json     codec, fingerprint, opset and the files with their sha256; written last, when all others are complete

N, H and W may vary (H and W are multiples of f). Encoder and codebook search are separate graphs, so that the
caller can refuse latents that are not finite, for which the search would return token 0.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import os
import secrets
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dat_workers.codecs.networks.vqgan import VQGAN
from dat_workers.codecs.spec import CodecError
from dat_workers.engines.onnx.sessions import CPU, open_session, require_packages, run
from dat_workers.system.files import write_atomically

OPSET = 18  # the version that torch.onnx writes without a conversion; TensorRT 10 and OpenVINO read it
MANIFEST = "codec.json"
GRAPHS = ("encoder", "codebook", "decoder")
ENTRIES_AT_ONCE = 1024  # codebook entries per block, so that the N·h·w x K distances are never in memory together
MIN_PSNR_DB = 80.0  # of the exported decoder's images to the network's: an error of a fortieth of a grey level


@dataclass(frozen=True)
class Manifest:
    """The content of codec.json."""

    codec: str
    fingerprint: str
    opset: int
    files: dict[str, str]  # name: sha256

    @classmethod
    def of(cls, codec: str, fingerprint: str, graphs: Mapping[str, bytes]) -> Manifest:
        """Returns the manifest of `graphs`, whose keys are file names."""
        return cls(codec, fingerprint, OPSET, {name: sha256(content) for name, content in graphs.items()})

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        """Returns the folder's manifest, or None if there is none; raises CodecError if it cannot be read."""
        path = folder / MANIFEST
        try:
            return cls(**json.loads(path.read_bytes()))
        except FileNotFoundError:
            return None
        except (OSError, TypeError, ValueError) as error:
            raise CodecError(f"{path} is not a manifest of `dat export`, or is damaged: {error}") from error

    def is_complete(self, folder: Path) -> bool:
        """Returns True if every file of the manifest exists and has the sha256 that the manifest records."""
        try:
            return all(sha256((folder / name).read_bytes()) == digest for name, digest in self.files.items())
        except OSError:
            return False


class EncoderGraph(nn.Module):
    """Computes encoder.onnx."""

    def __init__(self, model: VQGAN) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model.latents(images * 2 - 1)


class CodebookGraph(nn.Module):
    """Computes codebook.onnx, a block of entries at a time; of equally near entries it returns the lowest index."""

    def __init__(self, model: VQGAN) -> None:
        super().__init__()
        self.vectors = model.quantize.embedding.weight.detach().float()

    def forward(self, latents: Tensor) -> Tensor:
        n, d, height, width = latents.shape
        rows = latents.permute(0, 2, 3, 1).reshape(-1, d)
        squares = rows.square().sum(1, keepdim=True)
        least, index = None, None
        for start in range(0, len(self.vectors), ENTRIES_AT_ONCE):
            block = self.vectors[start : start + ENTRIES_AT_ONCE]
            # The order of additions is the published one, see Codebook.nearest.
            distances = squares + block.square().sum(1) - 2 * (rows @ block.t())
            nearest, place = distances.min(1)
            if least is None or index is None:
                least, index = nearest, place
                continue
            closer = nearest < least
            index = torch.where(closer, place + start, index)
            least = torch.where(closer, nearest, least)
        assert index is not None
        return index.reshape(n, height, width)


class DecoderGraph(nn.Module):
    """Computes decoder.onnx."""

    def __init__(self, model: VQGAN) -> None:
        super().__init__()
        self.model = model

    def forward(self, indices: Tensor) -> Tensor:
        return (self.model.decode(indices) + 1) / 2


def sha256(content: bytes) -> str:
    """Returns the sha256 of `content` in hex."""
    return hashlib.sha256(content).hexdigest()


def export_graphs(model: VQGAN) -> dict[str, bytes]:
    """Returns the three graphs of `model`, by file name.

    >>> sorted(export_graphs(load_model("tiny-f8")))  # doctest: +SKIP
    ['codebook.onnx', 'decoder.onnx', 'encoder.onnx']

    torch.export (dynamo) makes them, because TorchScript's exporter is faster but deprecated. Raises RuntimeError
    if onnx or onnxscript is missing, and CodecError if torch.onnx fails.
    """
    require_packages("onnx", "onnxscript")
    spec = model.spec
    # The example's sizes must not be 0 or 1, which torch.export would treat as constants.
    side = 3
    images = torch.zeros(2, 3, side * spec.factor, (side + 1) * spec.factor)
    latents = torch.zeros(2, spec.latent_dim, side, side + 1)
    indices = torch.zeros(2, side, side + 1, dtype=torch.int64)
    return {
        "encoder.onnx": _export(EncoderGraph(model), images, (0, 2, 3), "images", "latents"),
        "codebook.onnx": _export(CodebookGraph(model), latents, (0, 2, 3), "latents", "indices"),
        "decoder.onnx": _export(DecoderGraph(model), indices, (0, 1, 2), "indices", "pictures"),
    }


def _export(
    graph: nn.Module, example: Tensor, free_dimensions: tuple[int, ...], input_name: str, output_name: str
) -> bytes:
    shapes = dict.fromkeys(free_dimensions, torch.export.Dim.DYNAMIC)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # torch calls its own deprecated functions
        try:
            program = torch.onnx.export(
                graph.eval(), (example,), dynamo=True, dynamic_shapes=(shapes,), opset_version=OPSET,
                input_names=[input_name], output_names=[output_name], external_data=False, verbose=False,
            )  # fmt: skip
        except Exception as error:
            name = type(graph).__name__
            raise CodecError(f"{name} could not be exported: {type(error).__name__}: {error}") from error
    assert program is not None
    content: bytes = program.model_proto.SerializeToString()
    return content


def check_graphs(model: VQGAN, graphs: Mapping[str, bytes]) -> None:
    """Runs the graphs in ONNX Runtime on the CPU with images of two sizes.

    Raises CodecError if the results differ from those of `model` by more than the tolerance.
    """
    require_packages("onnxruntime")
    encoder, codebook, decoder = (open_session(graphs[f"{name}.onnx"], [CPU]) for name in GRAPHS)
    generator = torch.Generator().manual_seed(0)
    for n, height, width in ((1, 1, 2), (2, 5, 3)):
        f = model.spec.factor
        images = torch.rand(n, 3, height * f, width * f, generator=generator)
        with torch.inference_mode():
            latents = model.latents(images * 2 - 1)
            indices = model.quantize.nearest(latents)
            expected = (model.decode(indices) + 1) / 2
        largest = float(latents.abs().max())
        error = float((run(encoder, images) - latents).abs().max())
        if not error <= 1e-4 * max(largest, 1e-6):
            raise CodecError(
                f"the exported encoder is wrong by {error:.2e} at {height * f}x{width * f} pixels, where latents "
                f"reach {largest:.2e}; an error of at most 1e-4 times that is allowed"
            )
        chosen = run(codebook, latents)
        if chosen.shape != indices.shape:
            raise CodecError(
                f"the exported codebook returns shape {list(chosen.shape)}, but must return {list(indices.shape)}"
            )
        entries = model.quantize.embedding.weight
        rows = latents.permute(0, 2, 3, 1).double()
        farther = (rows - entries[chosen]).square().sum(3) - (rows - entries[indices]).square().sum(3)
        if float(farther.max()) > 1e-5 * max(largest**2, 1e-6):  # near-ties may be decided differently
            raise CodecError("the exported codebook does not choose the nearest entries")
        mse = float((run(decoder, indices) - expected).double().square().mean())
        psnr = -10 * math.log10(max(mse, 1e-15))
        if not psnr >= MIN_PSNR_DB:
            raise CodecError(
                f"the exported decoder's images have a PSNR of {psnr:.1f} dB to the network's; it must be at least "
                f"{MIN_PSNR_DB:g}"
            )


def write_export(model: VQGAN, codec: str, fingerprint: str, folder: Path, force: bool = False) -> Manifest:
    """Exports a codec, checks the graphs and writes them to `folder`; returns the manifest.

    >>> write_export(load_model("tiny-f8"), "tiny-f8", fingerprint, Path("tiny-f8-onnx")).opset  # doctest: +SKIP
    18

    `folder` is changed only after all checks have passed. Raises CodecError if `folder` holds a different codec or
    files that are not an export (unless `force` is set), if a graph does not compute the same as `model`, and if
    the files cannot be written. Raises RuntimeError if a package is missing.
    """
    folder = folder.absolute()
    check_folder(folder, codec, fingerprint, force)
    require_packages("onnx", "onnxscript", "onnxruntime")
    graphs = export_graphs(model)
    check_graphs(model, graphs)
    manifest = Manifest.of(codec, fingerprint, graphs)
    write_folder(folder, manifest, graphs)
    return manifest


def check_folder(folder: Path, codec: str, fingerprint: str, force: bool) -> None:
    """Raises CodecError if `folder` holds a different codec or foreign files, unless `force` is set."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise CodecError(f"{folder} is not a folder")
    if force or not any(folder.iterdir()):
        return
    manifest = Manifest.read(folder)
    if manifest is None:
        raise CodecError(f"{folder} is not empty and has no {MANIFEST}; choose an empty folder, or use --force")
    if manifest.fingerprint != fingerprint:
        raise CodecError(
            f"{folder} holds codec {manifest.codec!r} with fingerprint {manifest.fingerprint}, not {codec!r} with "
            f"{fingerprint}; choose an empty folder, or use --force"
        )


def write_folder(folder: Path, manifest: Manifest, graphs: Mapping[str, bytes]) -> None:
    """Writes all files beside `folder`, then moves them into it. Raises CodecError if they cannot be written."""
    stage = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    try:
        stage.mkdir(parents=True)
        for name, content in graphs.items():
            write_atomically(stage / name, content)
        write_atomically(stage / MANIFEST, (json.dumps(asdict(manifest), indent=2) + "\n").encode())
        with contextlib.suppress(OSError):
            stage.rename(folder)  # atomic if the folder is absent or empty
            return
        # Otherwise the files are replaced one by one. Until the manifest is written, the folder does not count as
        # an export.
        (folder / MANIFEST).unlink(missing_ok=True)
        for name in (*graphs, MANIFEST):
            os.replace(stage / name, folder / name)
    except OSError as error:
        raise CodecError(f"{folder} could not be written: {error}") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)
