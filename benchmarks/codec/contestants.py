"""The contestants of the codec benchmark: our engines, the published modules, diffusers, all with the same weights.

They take and return tensors on the device, so that the clock measures the codec and no copies.
"""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.codec.diffusers_model import as_vqmodel
from dat_workers.codecs.networks.vqgan import VQGAN
from dat_workers.engines.base import Engine, rows_at_once
from dat_workers.engines.config import EngineConfig
from dat_workers.engines.factory import create, engine_dtype_pairs
from dat_workers.engines.torch.precision import arithmetic

HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Codec:
    """A built contestant: images fp32 [N,3,H,W] in 0..1 to indices int64 [N,h,w], and those to pictures."""

    encode: Callable[[Tensor], Tensor]
    decode: Callable[[Tensor], Tensor]
    engine: Engine | None = None  # of ours, which can also be measured from host memory


@dataclass(frozen=True)
class Candidate:
    """A contestant by name. `build(model, shape of the batches)` may raise, and the error is then listed."""

    name: str
    precision: str  # selects the peak that it is compared with; `mixed` is compared with two
    build: Callable[[VQGAN, torch.Size], Codec]


def candidates(device: torch.device, patterns: Sequence[str] = ()) -> list[Candidate]:
    """Returns the contestants for this device, or those whose names match one of the shell patterns.

    On a CPU half precision is several times slower, so there it needs a pattern that matches it.
    """
    cuda = device.type == "cuda"
    found = [engine_candidate(engine, dtype, device) for engine, dtype in engine_dtype_pairs(cuda)]
    for precision in ("fp32", "tf32", "fp16") if cuda else ("fp32",):
        found.append(taming_candidate(precision, device))
    found.append(diffusers_candidate("fp32", device))
    for precision in ("fp16", "bf16") if cuda else ("fp32",):
        found.append(diffusers_candidate(precision, device, compiled=True))
        found.append(diffusers_candidate(precision, device, compiled=True, channels_last=True))
    if cuda:
        found.append(diffusers_candidate("fp16", device))
    if patterns:
        return [c for c in found if any(fnmatch.fnmatchcase(c.name, pattern) for pattern in patterns)]
    return [c for c in found if cuda or c.precision == "fp32"]


def engine_candidate(engine: str, dtype: str, device: torch.device, tricks: str = "auto") -> Candidate:
    """Returns an engine of `dat_workers.engines`, with batches split as the discretizer splits them."""

    def build(model: VQGAN, shape: torch.Size) -> Codec:
        built = create(EngineConfig(engine, str(device), dtype, tricks), copy.deepcopy(model))
        built.warm_up(shape[2])

        def encode(images: Tensor) -> Tensor:
            parts = torch.split(images.to(built.device), rows_at_once(built, images.shape[2] * images.shape[3]))
            return torch.cat([built.encode(part) for part in parts])

        def decode(indices: Tensor) -> Tensor:
            pixels = indices.shape[1] * indices.shape[2] * model.spec.factor**2
            parts = torch.split(indices.to(built.device), rows_at_once(built, pixels))
            return torch.cat([built.decode(part) for part in parts])

        return Codec(encode, decode, built)

    suffix = "" if tricks == "auto" else f" tricks={tricks}"
    return Candidate(f"{engine} {dtype}{suffix}", dtype, build)


def taming_candidate(precision: str, device: torch.device) -> Candidate:
    """Returns taming-transformers' modules as published: in fp32, with TF32 switched on, or under fp16 autocast."""

    def build(model: VQGAN, shape: torch.Size) -> Codec:
        from dat_workers.engines.reference import ReferenceEngine

        published = ReferenceEngine(model, device)  # copies the weights

        def mode() -> AbstractContextManager[Any]:
            if precision in HALF:
                return torch.autocast(device.type, HALF[precision])
            return arithmetic(tf32=True) if precision == "tf32" else nullcontext()

        @torch.inference_mode()
        def encode(images: Tensor) -> Tensor:
            with mode():
                z = published.quant_conv(published.encoder(images * 2 - 1))
                indices: Tensor = published.quantize(z)[2][2]
            return indices

        @torch.inference_mode()
        def decode(indices: Tensor) -> Tensor:
            with mode():
                z = published.quantize.embedding(indices).permute(0, 3, 1, 2).contiguous()
                pictures: Tensor = published.decoder(published.post_quant_conv(z))
            return (pictures.float() + 1) / 2

        return Codec(encode, decode)

    return Candidate(f"taming {precision}{' autocast' if precision in HALF else ''}", precision, build)


def diffusers_candidate(
    precision: str, device: torch.device, *, compiled: bool = False, channels_last: bool = False
) -> Candidate:
    """Returns diffusers' VQModel. Its quantizer stays fp32: it calls torch.cdist, which lacks fp16 on CUDA."""

    def build(model: VQGAN, shape: torch.Size) -> Codec:
        dtype = HALF.get(precision, torch.float32)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        vqmodel = as_vqmodel(model)
        quantize = copy.deepcopy(vqmodel.quantize).to(device)  # before its codebook is rounded
        torch.nn.Module.to(vqmodel, device, dtype).to(memory_format=layout)  # its own `to` warns about this

        def to_latents(x: Tensor) -> Tensor:
            z: Tensor = vqmodel.quant_conv(vqmodel.encoder(x))
            return z

        def to_pictures(z: Tensor) -> Tensor:
            y: Tensor = vqmodel.decoder(vqmodel.post_quant_conv(z))
            return y

        latents, pictures = (torch.compile(f, dynamic=False) if compiled else f for f in (to_latents, to_pictures))

        @torch.inference_mode()
        def encode(images: Tensor) -> Tensor:
            z = latents((images * 2 - 1).to(dtype=dtype, memory_format=layout)).float()
            indices: Tensor = quantize(z)[2][2]
            return indices.view(len(z), z.shape[2], z.shape[3])

        @torch.inference_mode()
        def decode(indices: Tensor) -> Tensor:
            z = quantize.embedding(indices).permute(0, 3, 1, 2).contiguous()
            return (pictures(z.to(dtype=dtype, memory_format=layout)).float() + 1) / 2

        return Codec(encode, decode)

    how = ("compiled" if compiled else "eager") + (" channels_last" if channels_last else "")
    return Candidate(f"diffusers {precision} {how}", precision, build)
