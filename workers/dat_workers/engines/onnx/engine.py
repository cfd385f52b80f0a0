"""The engine on ONNX Runtime, with the first provider that works: TensorRT, CUDA or the CPU.

The graphs are exported on first use and stored under `$DAT_HOME/onnx/` (see `cached_export`). This file has not
been run on CUDA or TensorRT yet.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor

from dat_workers.codecs.file import fingerprint
from dat_workers.codecs.networks.vqgan import LARGE_ATTENTION, VQGAN
from dat_workers.codecs.spec import CodecError
from dat_workers.codecs.store import CodecStore
from dat_workers.engines.base import Engine, mark_non_finite
from dat_workers.engines.cpu.ball_search import pick_search
from dat_workers.engines.onnx.export import OPSET, Manifest, export_graphs, write_folder
from dat_workers.engines.onnx.sessions import CPU, open_session, pick_providers, require_packages, run
from dat_workers.errors import EngineError

log = logging.getLogger(__name__)

MAX_POSITIONS = 4 * LARGE_ATTENTION  # the graph computes attention as one matrix, which has 1 GiB at this number


class OnnxEngine(Engine):
    """Runs a codec in fp32 in ONNX Runtime; arguments and results are tensors on the CPU.

    >>> OnnxEngine(load_model("tiny-f8"), "cpu").provider  # doctest: +SKIP
    'CPUExecutionProvider'

    Raises RuntimeError if a package is missing, and ValueError if no provider works on the device.
    """

    name = "onnx"

    def __init__(self, model: VQGAN, device: str) -> None:
        require_packages("onnxruntime")
        providers = pick_providers(device)
        folder = cached_export(model)
        self.model = model
        self._encoder = open_session(folder / "encoder.onnx", providers)
        self._decoder = open_session(folder / "decoder.onnx", providers)
        self.provider: str = self._encoder.get_providers()[0]
        on_cpu = self.provider == CPU
        if device.startswith("cuda") and on_cpu:
            raise ValueError(f"device is {device!r}, but ONNX Runtime could start neither TensorRT nor CUDA")
        log.info("engine onnx: %s, of %s", self.provider, ", ".join(providers))
        # On a CPU one image at a time is as fast, and then an image's tokens do not depend on the rest of its
        # batch.
        self.batch = 1 if on_cpu else 64
        self._codebook = None if on_cpu else open_session(folder / "codebook.onnx", providers)
        self._search = pick_search(model.quantize)

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


def check_size(positions: int, factor: int) -> None:
    """Raises EngineError for more than MAX_POSITIONS positions, whose attention would not fit in memory."""
    if positions > MAX_POSITIONS:
        raise EngineError(
            f"an image has {positions * factor**2} pixels, but the engine 'onnx' accepts at most "
            f"{MAX_POSITIONS * factor**2}; use --engine torch"
        )


def cached_export(model: VQGAN) -> Path:
    """Returns the folder of the model's graphs, HOME/onnx/KEY; exports the graphs first if the folder lacks any.

    KEY consists of the opset and the fingerprint of the weights in fp32, the precision in which they run. If two
    processes export at the same time, the second uses the files of the first. Raises CodecError if the files cannot
    be written.
    """
    weights = fingerprint(model.spec, model.state_dict())
    folder = CodecStore().home / "onnx" / f"opset{OPSET}-{weights[:32]}"
    if not is_usable(folder, weights):
        graphs = export_graphs(model)
        if not is_usable(folder, weights):
            write_folder(folder, Manifest.of(model.spec.name, weights, graphs), graphs)
    return folder


def is_usable(folder: Path, weights: str) -> bool:
    """Returns True if `folder` holds a complete export of the weights with this fingerprint."""
    try:
        manifest = Manifest.read(folder)
    except CodecError:
        return False
    return manifest is not None and manifest.fingerprint == weights and manifest.is_complete(folder)
