"""ONNX Runtime: TensorRT, CUDA or CPU, whichever comes first of those that work.

The graphs are exported on first use and kept under `$DAT_HOME/onnx/`, see `exported`. On CUDA and TensorRT nothing
of this file was run yet.
"""

from __future__ import annotations

import logging
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dat_workers.codecs.file import fingerprint
from dat_workers.codecs.networks.vqgan import LARGE_ATTENTION, VQGAN
from dat_workers.codecs.spec import CodecError
from dat_workers.codecs.store import CodecStore
from dat_workers.engines.base import Engine, mark_non_finite
from dat_workers.engines.cpu.ball_search import GroupSearch
from dat_workers.engines.onnx.export import OPSET, Manifest, export_graphs, require, sha256, write_folder
from dat_workers.errors import EngineError

log = logging.getLogger(__name__)

PROVIDERS = ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider")
MOST_POSITIONS = 4 * LARGE_ATTENTION  # of the attention, which is whole in the graph: 1 GiB a matrix


class OnnxEngine(Engine):
    """fp32 in ONNX Runtime; tensors come and go on the CPU.

    >>> OnnxEngine(load_model("tiny-f8"), "cpu", "auto").provider  # doctest: +SKIP
    'CPUExecutionProvider'

    Raises RuntimeError where a package is missing, ValueError for a device without a provider.
    """

    name = "onnx"

    def __init__(self, model: VQGAN, device: str, dtype: str) -> None:
        if dtype not in ("auto", "fp32"):
            raise ValueError(f"dtype is {dtype!r}: the engine 'onnx' is fp32")
        require("onnxruntime")
        wanted = pick_providers(device)
        folder = exported(model)
        self.model = model
        self._encoder = open_session(folder / "encoder.onnx", wanted)
        self._decoder = open_session(folder / "decoder.onnx", wanted)
        self.provider: str = self._encoder.get_providers()[0]
        if device.startswith("cuda") and self.provider == PROVIDERS[-1]:
            raise ValueError(f"device is {device!r}: ONNX Runtime started neither TensorRT nor CUDA")
        log.info("engine onnx: %s, of %s", self.provider, ", ".join(wanted))
        on_cpu = self.provider == PROVIDERS[-1]
        # One at a time on a CPU: as fast, and an image's tokens do not depend on what it came with.
        self.batch = 1 if on_cpu else 64
        self._codebook = None if on_cpu else open_session(folder / "codebook.onnx", wanted)
        self._search = GroupSearch(model.quantize) if GroupSearch.suits(model.quantize) else model.quantize

    def describe(self) -> dict[str, str]:
        return super().describe() | {"provider": self.provider}

    @torch.inference_mode()
    def encode(self, images: Tensor) -> Tensor:
        return torch.cat([self._encode(part) for part in torch.split(images, self.batch)])

    def _encode(self, images: Tensor) -> Tensor:
        f = self.model.spec.factor
        check_size(images.shape[2] // f * (images.shape[3] // f), f)
        z = run(self._encoder, images)
        finite = z.nan_to_num()
        return mark_non_finite(run(self._codebook, finite) if self._codebook else self._search.nearest(finite), z)

    @torch.inference_mode()
    def decode(self, indices: Tensor, *, exact: bool = False) -> Tensor:
        check_size(indices[0].numel(), self.model.spec.factor)
        return torch.cat([run(self._decoder, part) for part in torch.split(indices.clamp(min=0), self.batch)])


def run(session: Any, value: Tensor) -> Tensor:
    """The one output of a graph of one input."""
    output = session.run(None, {session.get_inputs()[0].name: value.contiguous().numpy()})[0]
    return torch.from_numpy(output)


def check_size(positions: int, factor: int) -> None:
    """Raises EngineError for a picture whose attention would not fit into memory."""
    if positions > MOST_POSITIONS:
        raise EngineError(
            f"a picture of {positions * factor**2} pixels: the engine 'onnx' takes up to "
            f"{MOST_POSITIONS * factor**2}; use --engine torch"
        )


def pick_providers(device: str) -> list[str]:
    """Those of `PROVIDERS` that this ONNX Runtime has and `device` allows, best first. Raises ValueError."""
    import onnxruntime

    there = [name for name in PROVIDERS if name in onnxruntime.get_available_providers()]
    if device == "cpu":
        return [PROVIDERS[-1]]
    if device == "auto":
        return there
    if device.split(":")[0] != "cuda":
        raise ValueError(f"device is {device!r}: the engine 'onnx' knows auto, cpu, cuda and cuda:N")
    if len(there) == 1:
        raise ValueError(
            f"device is {device!r}, but this ONNX Runtime has {', '.join(there)} alone; on a GPU machine run: "
            "pip uninstall onnxruntime && pip install 'dat-service[onnx-gpu]'"
        )
    return there


def open_session(path: Path, providers: list[str]) -> Any:
    """A graph, ready to run, with the first of `providers` that starts."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # threads that spin between calls would take the cores from torch's, which search the codebook
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3  # errors
    settings: dict[str, dict[str, str]] = {
        "CUDAExecutionProvider": {"use_tf32": "0"},  # 10 bits of mantissa lose δ
        "TensorrtExecutionProvider": {"trt_engine_cache_enable": "1", "trt_engine_cache_path": str(path.parent)},
    }
    if PROVIDERS[0] in providers:
        os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")  # TensorRT has no option of its own for that
    return onnxruntime.InferenceSession(
        str(path), options, providers=[(name, settings.get(name, {})) for name in providers]
    )


def exported(model: VQGAN) -> Path:
    """The folder with the graphs of these weights, HOME/onnx/KEY; exported now unless it is there and whole.

    KEY is opset and fingerprint of the weights as they are run (fp32). Of two processes that export at once the
    first to be done gives the folder its name, and the other takes that. Raises CodecError for a disk that refuses.
    """
    mark = fingerprint(model.spec, model.state_dict())
    home = CodecStore().home / "onnx"
    folder = home / f"opset{OPSET}-{mark[:32]}"
    if usable(folder, mark):
        return folder
    graphs = export_graphs(model)
    manifest = Manifest(model.spec.name, mark, OPSET, {name: sha256(content) for name, content in graphs.items()})
    stage = home / f".{folder.name}.{secrets.token_hex(4)}.tmp"
    try:
        write_folder(stage, graphs, manifest)
        if folder.exists() and not usable(folder, mark):
            shutil.rmtree(folder)
        try:
            stage.rename(folder)
        except OSError:
            if not usable(folder, mark):
                raise
    except OSError as error:
        raise CodecError(f"{folder} could not be written: {error}") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    return folder


def usable(folder: Path, mark: str) -> bool:
    """Whether `folder` holds these weights, whole."""
    try:
        manifest = Manifest.read(folder)
    except CodecError:
        return False
    return manifest is not None and manifest.fingerprint == mark and manifest.whole(folder)
