"""The engine for CUDA, with half precision and all tricks; on a CPU it runs the published order of operations."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import traceback

import torch
from torch import Tensor

from dat_workers.codecs.networks.vqgan import VQGAN
from dat_workers.engines.base import Engine, mark_non_finite, rows_at_once
from dat_workers.engines.device_errors import free_cached_memory, ran_out_of_memory
from dat_workers.engines.torch import network
from dat_workers.engines.torch.graphs import SIZES, CaptureMemory, GraphedFunction
from dat_workers.engines.torch.memory import MemoryPlan, fit
from dat_workers.engines.torch.precision import arithmetic
from dat_workers.engines.torch.tricks import Tricks
from dat_workers.errors import OutOfMemory, one_line

log = logging.getLogger("dat_workers")


class TorchEngine(Engine):
    """Runs a VQGAN in PyTorch, with the chosen optimisations (`Tricks`).

    Without tricks and in fp32 it runs codecs/networks/vqgan.py unchanged. In every other precision the layers of
    `network.FP32_LAYERS` still compute in fp32, because δ is about 7 % of a grey level, too little for pixels in
    half precision. For the same reason `mixed`, the default on CUDA, keeps the whole encoder in fp32.
    """

    name = "torch"

    def __init__(
        self, model: VQGAN, device: torch.device, dtype: str, tricks: str = "auto", gpu_share: float = 1.0
    ) -> None:
        cuda = device.type == "cuda"
        self.device = device
        self.dtype = ("mixed" if cuda else "fp32") if dtype == "auto" else dtype
        self.tricks = Tricks.parse(tricks, cuda=cuda)
        if self.dtype == "tf32" and not cuda:
            raise ValueError(f"dtype is 'tf32', which needs CUDA, but device is {str(device)!r}")
        triton = self.tricks.fused_norm or self.tricks.fused_codebook
        if cuda and triton and importlib.util.find_spec("triton") is None:
            raise ValueError(
                f"tricks is {str(self.tricks)!r}, but fused_norm and fused_codebook need Triton, which comes with "
                "PyTorch's wheels for CUDA. Run pip install triton, or use --tricks all,-fused_norm,-fused_codebook"
            )
        # On a CPU one image at a time is as fast, because its caches hold only one. Besides, the order of additions
        # depends on the batch size there, which would make an image's tokens depend on the rest of its batch.
        self.batch = 1
        self.model = network.build(model, self.dtype, self.tricks).to(device).eval().requires_grad_(False)
        if cuda:
            self._fit_memory(gpu_share)
        memory = CaptureMemory.on(device) if self.tricks.graphs else None
        self._run_encode = GraphedFunction(self._encode, memory)
        self._run_decode = GraphedFunction(self._decode, memory)

    def _fit_memory(self, gpu_share: float) -> None:
        """Chooses `batch` and `most_pixels` so that they fit the GPU, or the share of it. Raises OutOfMemory."""
        weights = sum(parameter.nbytes for parameter in self.model.parameters())
        plan = MemoryPlan(self.model.spec, self.dtype, self.tricks, weights)
        fitting = fit(plan, torch.cuda.get_device_properties(self.device).total_memory, gpu_share)
        self.batch, self.most_pixels = fitting.batch, fitting.side**2
        if gpu_share < 1:  # if the prediction is wrong, this process runs out of memory, and not its neighbour
            torch.cuda.set_per_process_memory_fraction(gpu_share, self.device)

    def warm_up(self, side: int) -> None:
        """Captures the CUDA graphs for images of `side` x `side`, if graphs are on. Raises the errors of CUDA.

        If there is too little memory for a batch size, that size is left out, and `batch` becomes smaller. Raises
        OutOfMemory if there is too little for a single image.
        """
        if not self.tricks.graphs or side % self.model.spec.factor:
            return
        with self._device_context():
            for size in reversed(SIZES):  # largest first, so that the smaller graphs reuse its memory
                if size > rows_at_once(self, side * side):
                    continue
                try:
                    self._capture(size, side)
                except Exception as error:
                    if not ran_out_of_memory(error):
                        raise
                    traceback.clear_frames(error.__traceback__)  # they hold the tensors of the attempt
                    self._lower_batch(size, side, one_line(error))

    def _shapes(self, size: int, side: int) -> tuple[torch.Size, torch.Size]:
        """Returns the shapes of `size` images of `side` x `side`, and of their indices."""
        tokens = side // self.model.spec.factor
        return torch.Size((size, 3, side, side)), torch.Size((size, tokens, tokens))

    def _capture(self, size: int, side: int) -> None:
        images, indices = self._shapes(size, side)
        self._run_encode.capture(torch.full(images, 0.5, device=self.device))
        self._run_decode.capture(torch.zeros(indices, dtype=torch.int64, device=self.device))

    def _lower_batch(self, size: int, side: int, reason: str) -> None:
        """Makes batches so small that fewer than `size` images of `side` x `side` are computed together."""
        if size == 1:
            raise OutOfMemory(
                f"not enough memory on {self.device} for one image of {side} x {side} with CUDA graphs: {reason}; "
                "use a GPU with more free memory, or --tricks all,-graphs"
            )
        images, indices = self._shapes(size, side)
        self._run_encode.forget(images)
        self._run_decode.forget(indices)
        free_cached_memory()
        self.batch = -(-(size // 2) * side * side // (224 * 224))
        log.warning(
            "no memory on %s for %d images of %d x %d at once (%s); from now on at most %d are computed at once",
            self.device, size, side, side, reason, rows_at_once(self, side * side),
        )  # fmt: skip

    @torch.inference_mode()
    def encode(self, images: Tensor) -> Tensor:
        with self._device_context():
            return self._run_encode(images.to(self.device))

    @torch.inference_mode()
    def decode(self, indices: Tensor, *, exact: bool = False) -> Tensor:
        with self._device_context():
            return self._run_decode(indices.to(self.device, torch.int64))

    def _device_context(self) -> contextlib.AbstractContextManager[object]:
        """Makes the engine's device current, because Triton launches on the current device, not on the tensors'."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()

    def _arithmetic(self) -> contextlib.AbstractContextManager[None]:
        cuda = self.device.type == "cuda"
        return arithmetic(tf32=self.dtype == "tf32") if cuda else contextlib.nullcontext()

    @torch.inference_mode()
    def _encode(self, images: Tensor) -> Tensor:
        with self._arithmetic():
            z = self.model.latents(images.mul(2).sub_(1))
        return mark_non_finite(self.model.quantize.nearest(z), z)

    @torch.inference_mode()
    def _decode(self, indices: Tensor) -> Tensor:
        with self._arithmetic():
            images = self.model.pictures(self.model.quantize.lookup(indices.clamp(min=0)))
        return images.float().add_(1).div_(2)
