"""Scores a codec on validation images, and shows its reconstructions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dat_workers.codecs.networks.vqgan import VQGAN
from dat_workers.images.encoded import encode_jpeg
from dat_workers.training.data import to_float

BATCH = 4  # images evaluated together
QUALITY = 95  # of the JPEG of reconstructions


@dataclass(frozen=True)
class Scores:
    """The scores of a model on the validation crops."""

    psnr_db: float  # mean over the images
    codebook_share: float  # share of the codebook's entries that the images use
    pictures: int


def psnr_db(x: Tensor, y: Tensor) -> Tensor:
    """Returns the PSNR in dB of each of N images in -1..1 (peak 2); `y` is clipped first."""
    mse = (x - y.clamp(-1, 1)).square().flatten(1).mean(1).clamp_min(1e-10)
    return 10 * torch.log10(4 / mse)


def reconstruct(model: VQGAN, x: Tensor, *, quantize: bool) -> tuple[Tensor, Tensor | None]:
    """Returns the reconstructions of images in -1..1 and their indices; without `quantize` there are no indices."""
    z = model.latents(x)
    if not quantize:
        return model.pictures(z), None
    indices = model.quantize.nearest(z)
    return model.decode(indices), indices


@torch.no_grad()
def evaluate(model: VQGAN, images: Tensor, device: torch.device, *, quantize: bool) -> Scores:
    """Scores a model in fp32 on uint8 images [N,3,H,W]."""
    psnrs: list[Tensor] = []
    used_entries: set[int] = set()
    for batch in torch.split(images, BATCH):
        x = to_float(batch.to(device))
        y, indices = reconstruct(model, x, quantize=quantize)
        if indices is not None:
            used_entries.update(torch.unique(indices).tolist())
        psnrs.append(psnr_db(x, y))
    each = torch.cat(psnrs)
    return Scores(each.mean().item(), len(used_entries) / model.spec.codebook_size, len(each))


@torch.no_grad()
def comparison_jpeg(model: VQGAN, x: Tensor, *, quantize: bool) -> bytes:
    """Returns a JPEG of images in -1..1, in one row, above their reconstructions."""
    y, _ = reconstruct(model, x, quantize=quantize)
    rows = torch.cat([torch.cat(list(images), 2) for images in (x, y.clamp(-1, 1))], 1)
    return encode_jpeg(rows.add(1).mul(127.5).round().byte().cpu().numpy(), QUALITY)
