"""`dat export`: a codec as ONNX files, for runtimes that are not PyTorch.

encoder.onnx   images fp32 [N,3,H,W] in 0..1            → latents fp32 [N,d,H/f,W/f]
codebook.onnx  latents                                   → indices int64 [N,h,w] (Eq. 3)
decoder.onnx   indices int64 [N,h,w]                     → pictures fp32 [N,3,h·f,w·f], about 0..1, not clipped
codec.json     codec, fingerprint, opset and the files with their sha256: there only when all others are whole

N, H and W are free (H and W multiples of f). Encoder and search are apart so that whoever runs them can refuse
latents that are not finite, for which the nearest entry would be token 0.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import secrets
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from dat_workers.codecs.networks.vqgan import VQGAN
from dat_workers.codecs.spec import CodecError
from dat_workers.system.files import write_atomically

OPSET = 18  # the one torch.onnx translates to without converting; TensorRT 10 and OpenVINO read it
MANIFEST = "codec.json"
PARTS = ("encoder", "codebook", "decoder")
ENTRIES_AT_ONCE = 1024  # of the codebook: N·h·w x K distances are never there together
LEAST_PSNR_DB = 80.0  # of exported pictures to ours: a fortieth of a grey level
INSTALL = "pip install 'dat-service[onnx]'"


@dataclass(frozen=True)
class Manifest:
    """What codec.json holds."""

    codec: str
    fingerprint: str
    opset: int
    files: dict[str, str]  # name: sha256

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        """The folder's manifest; None where it has none. Raises CodecError for one that is not readable."""
        path = folder / MANIFEST
        try:
            return cls(**json.loads(path.read_bytes()))
        except FileNotFoundError:
            return None
        except (OSError, TypeError, ValueError) as error:
            raise CodecError(f"{path} is no manifest of `dat export`: {error}") from error

    def whole(self, folder: Path) -> bool:
        """Whether every file is there with the sha256 it was written with."""
        try:
            return all(sha256((folder / name).read_bytes()) == digest for name, digest in self.files.items())
        except OSError:
            return False


class EncoderGraph(nn.Module):
    """encoder.onnx."""

    def __init__(self, model: VQGAN) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model.latents(images * 2 - 1)


class CodebookGraph(nn.Module):
    """codebook.onnx: the codebook block by block, the lowest index of the least distance."""

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
            # the published order of additions, see Codebook.nearest
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
    """decoder.onnx."""

    def __init__(self, model: VQGAN) -> None:
        super().__init__()
        self.model = model

    def forward(self, indices: Tensor) -> Tensor:
        return (self.model.decode(indices) + 1) / 2


def sha256(content: bytes) -> str:
    """In hex."""
    return hashlib.sha256(content).hexdigest()


def require(*packages: str) -> None:
    """Raises RuntimeError with the pip command unless all can be imported."""
    for package in packages:
        try:
            __import__(package)
        except ImportError as error:
            raise RuntimeError(f"ONNX needs the package {package} ({error}); run: {INSTALL}") from error


def export_graphs(model: VQGAN) -> dict[str, bytes]:
    """The three graphs of `model`, by file name.

    >>> sorted(export_graphs(load_model("tiny-f8")))  # doctest: +SKIP
    ['codebook.onnx', 'decoder.onnx', 'encoder.onnx']

    By torch.export (dynamo): TorchScript's exporter, faster, is deprecated. Raises RuntimeError where the packages
    onnx or onnxscript are missing, and CodecError where torch.onnx refuses.
    """
    require("onnx", "onnxscript")
    spec = model.spec
    # any sizes but 0 and 1, which torch.export would take for constants
    side = 3
    images = torch.zeros(2, 3, side * spec.factor, (side + 1) * spec.factor)
    latents = torch.zeros(2, spec.latent_dim, side, side + 1)
    indices = torch.zeros(2, side, side + 1, dtype=torch.int64)
    wholes: dict[str, tuple[nn.Module, Tensor, tuple[int, ...], str, str]] = {
        "encoder": (EncoderGraph(model), images, (0, 2, 3), "images", "latents"),
        "codebook": (CodebookGraph(model), latents, (0, 2, 3), "latents", "indices"),
        "decoder": (DecoderGraph(model), indices, (0, 1, 2), "indices", "pictures"),
    }
    return {f"{part}.onnx": _graph(part, *whole) for part, whole in wholes.items()}


def _graph(part: str, graph: nn.Module, example: Tensor, free: tuple[int, ...], taken: str, given: str) -> bytes:
    shapes = dict.fromkeys(free, torch.export.Dim.DYNAMIC)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # of torch's own deprecated calls
        try:
            program = torch.onnx.export(
                graph.eval(), (example,), dynamo=True, dynamic_shapes=(shapes,), opset_version=OPSET,
                input_names=[taken], output_names=[given], external_data=False, verbose=False,
            )  # fmt: skip
        except Exception as error:
            raise CodecError(f"{part} could not be exported: {type(error).__name__}: {error}") from error
    assert program is not None
    content: bytes = program.model_proto.SerializeToString()
    return content


def check_graphs(model: VQGAN, graphs: Mapping[str, bytes]) -> None:
    """Runs the graphs with ONNX Runtime on a CPU, in two sizes, beside `model`; CodecError where they differ."""
    require("onnxruntime")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    sessions = {
        part: onnxruntime.InferenceSession(graphs[f"{part}.onnx"], options, providers=["CPUExecutionProvider"])
        for part in PARTS
    }

    def run(part: str, value: Tensor) -> npt.NDArray[Any]:
        session = sessions[part]
        return np.asarray(session.run(None, {session.get_inputs()[0].name: value.numpy()})[0])

    generator = torch.Generator().manual_seed(0)
    for n, height, width in ((1, 1, 2), (2, 5, 3)):
        f = model.spec.factor
        images = torch.rand(n, 3, height * f, width * f, generator=generator)
        with torch.inference_mode():
            latents = model.latents(images * 2 - 1)
            indices = model.quantize.nearest(latents)
            pictures = (model.decode(indices) + 1) / 2
        spread = float(latents.abs().max())
        off = float(np.abs(run("encoder", images) - latents.numpy()).max())
        if not off <= 1e-4 * max(spread, 1e-6):
            raise CodecError(
                f"the exported encoder is off by {off:.2e} at {height * f}x{width * f} pixels, of {spread:.2e}"
            )
        chosen = torch.from_numpy(run("codebook", latents))
        if chosen.shape != indices.shape:
            raise CodecError(f"the exported codebook gives shape {list(chosen.shape)}, not {list(indices.shape)}")
        entries = model.quantize.embedding.weight
        rows = latents.permute(0, 2, 3, 1).double()
        further = (rows - entries[chosen]).square().sum(3) - (rows - entries[indices]).square().sum(3)
        if float(further.max()) > 1e-5 * max(spread**2, 1e-6):  # near-ties may fall the other way
            raise CodecError("the exported codebook does not choose the nearest entries")
        squared = float(np.square(run("decoder", indices) - pictures.numpy(), dtype=np.float64).mean())
        psnr = -10 * float(np.log10(max(squared, 1e-15)))
        if not psnr >= LEAST_PSNR_DB:
            raise CodecError(
                f"the exported decoder's pictures are {psnr:.1f} dB from ours, at least {LEAST_PSNR_DB:g}"
            )


def write_export(model: VQGAN, codec: str, fingerprint: str, folder: Path, force: bool = False) -> Manifest:
    """Exports, checks and writes a codec; `folder` is as it was unless all went well.

    >>> write_export(load_model("tiny-f8"), "tiny-f8", mark, Path("tiny-f8-onnx")).opset  # doctest: +SKIP
    18

    Raises CodecError for a folder that holds another codec, or other things, unless `force`; for a graph that does
    not compute what `model` does; and for what the disk refuses. RuntimeError where a package is missing.
    """
    folder = folder.absolute()
    check_folder(folder, codec, fingerprint, force)
    require("onnx", "onnxscript", "onnxruntime")
    graphs = export_graphs(model)
    check_graphs(model, graphs)
    manifest = Manifest(codec, fingerprint, OPSET, {name: sha256(content) for name, content in graphs.items()})
    stage = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    try:
        write_folder(stage, graphs, manifest)
        put_in_place(stage, folder)
    except OSError as error:
        raise CodecError(f"{folder} could not be written: {error}") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    return manifest


def check_folder(folder: Path, codec: str, fingerprint: str, force: bool) -> None:
    """Raises CodecError where an export to `folder` would mix with, or replace, something else."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise CodecError(f"{folder} is no folder")
    if force or not any(folder.iterdir()):
        return
    held = Manifest.read(folder)
    if held is None:
        raise CodecError(f"{folder} is not empty and holds no {MANIFEST}; choose another folder, or use --force")
    if held.fingerprint != fingerprint:
        raise CodecError(
            f"{folder} holds codec {held.codec!r} with fingerprint {held.fingerprint}, not {codec!r} with "
            f"{fingerprint}; choose another folder, or use --force"
        )


def write_folder(folder: Path, graphs: Mapping[str, bytes], manifest: Manifest) -> None:
    """A new folder with all files. Raises OSError."""
    folder.mkdir(parents=True)
    for name, content in graphs.items():
        write_atomically(folder / name, content)
    write_atomically(folder / MANIFEST, (json.dumps(asdict(manifest), indent=2) + "\n").encode())


def put_in_place(stage: Path, folder: Path) -> None:
    """Gives what `stage` holds the name `folder`. Raises OSError."""
    with contextlib.suppress(OSError):
        stage.rename(folder)  # in one step where there is nothing, or an empty folder
        return
    # file by file beside whatever else is there; without its manifest the folder is no export
    (folder / MANIFEST).unlink(missing_ok=True)
    for path in sorted(stage.iterdir(), key=lambda path: path.name == MANIFEST):
        os.replace(path, folder / path.name)
