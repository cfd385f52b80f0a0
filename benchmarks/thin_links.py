"""What do the thin-link encodings save in bytes, and cost in tokens?

    python benchmarks/thin_links.py --images train-000007.tar --train train-000000.tar

It uses `Discretizer` in this process, without a service. Images are centre crops as JPEG, whose tokens are compared
with those of the pixels. Gradients come from a classifier that learned to tell the photographs of the `--train`
shard apart (tokens_changed.py), at Q(x), with its own prediction for a label and without random start; FP16 and
INT8, as dat_client sends them, are compared with FP32. Results: docs/thin-links.md.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from benchmarks.tokens_changed import SIDE, trained
from dat_client.calls.gradients import gradient_tensors
from dat_workers.discretizer import Discretizer
from dat_workers.engines.config import EngineConfig
from dat_workers.images.crops import centre_crops
from dat_workers.images.encoded import encode_jpeg
from dat_workers.perturbation import PRESETS

Array = npt.NDArray[Any]
QUALITIES = (75, 85, 90, 95, 98)


def indices(discretizer: Discretizer, images: Array) -> Array:
    """Returns the tokens of Q(x)."""
    return discretizer.discretize(images, outputs=["indices"])["indices"]


def decoded(files: Array) -> Array:
    """Returns uint8 [N,3,H,W] of JPEG files."""
    pictures = [np.asarray(Image.open(io.BytesIO(bytes(file)))) for file in files.tolist()]
    return np.stack(pictures).transpose(0, 3, 1, 2).copy()


def encoded(images: Array, quality: int) -> Array:
    """Returns uint8 [N,3,H,W] as N JPEG files in 4:4:4."""
    files = np.empty(len(images), object)
    files[:] = [encode_jpeg(image, quality) for image in images]
    return files


def half_colour(images: Array, quality: int) -> Array:
    """Encodes like `encoded`, but in 4:2:0: colour at half the resolution."""
    files = np.empty(len(images), object)
    for number, image in enumerate(images):
        file = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))).save(file, "JPEG", quality=quality)
        files[number] = file.getvalue()
    return files


def image_rows(discretizer: Discretizer, images: Array) -> None:
    """Prints the table of JPEG qualities."""
    plain = indices(discretizer, images)
    print("| images | bytes an image | of UINT8 | tokens of Q(x) that differ |\n|---|---|---|---|")
    print(f"| UINT8 | {images[0].nbytes:,} | 100 % | 0 % |")
    for name, encode in (("4:4:4", encoded), ("4:2:0", half_colour)):
        for quality in QUALITIES:
            files = encode(images, quality)
            size = sum(map(len, files.tolist())) / len(files)
            differ = float((indices(discretizer, decoded(files)) != plain).mean())
            row = f"| JPEG {quality}, {name} | {size:,.0f} | {size / images[0].nbytes:.1%} | {differ:.1%} |"
            print(row, flush=True)


def loss_gradients(discretizer: Discretizer, model: nn.Module, images: Array) -> npt.NDArray[np.float32]:
    """Returns ∇ of the summed loss at Q(x), fp32 [N,3,H,W]; the labels are the model's own predictions for x."""
    found = []
    for start in range(0, len(images), 8):
        some = images[start : start + 8]
        with torch.no_grad():
            labels = model(torch.from_numpy(some) / 127.5 - 1).argmax(1)
        q = torch.from_numpy(discretizer.discretize(some, output_dtype="FP32")["reconstruction"]).requires_grad_()
        (g,) = torch.autograd.grad(F.cross_entropy(model(q * 2 - 1), labels, reduction="sum"), q)
        found.append(g.numpy())
    return np.concatenate(found)


def adversarial_indices(discretizer: Discretizer, images: Array, sent: Mapping[str, Array], preset: str) -> Array:
    """Returns the tokens of Q(x + δ), computed from the gradients as they arrive at the service."""
    gradients, scales = sent["gradients"], sent.get("gradient_scales")
    if gradients.dtype == np.int8:  # the same product in fp32 that the service computes
        assert scales is not None
        gradients, scales = gradients.astype(np.float32) * scales[:, None, None, None], None
    return discretizer.discretize(
        images, gradients, gradient_scales=scales, step=PRESETS[preset], outputs=["adversarial_indices"]
    )["adversarial_indices"]


def gradient_rows(discretizer: Discretizer, images: Array, gradients: npt.NDArray[np.float32]) -> None:
    """Prints the table of gradient dtypes."""
    print("\n| gradients | bytes an image | preset | tokens that δ changes | tokens of Q(x + δ) that differ |")
    print("|---|---|---|---|---|")
    for preset in PRESETS:
        none = np.zeros_like(gradients)
        still = adversarial_indices(discretizer, images, {"gradients": none}, preset)
        exact = adversarial_indices(discretizer, images, {"gradients": gradients}, preset)
        for dtype in ("FP32", "FP16", "INT8"):
            sent = gradient_tensors(gradients, gradients.shape, dtype)
            size = sum(array.nbytes for array in sent.values()) // len(images)
            tokens = adversarial_indices(discretizer, images, sent, preset)
            moved, differ = float((tokens != still).mean()), float((tokens != exact).mean())
            print(f"| {dtype} | {size:,} | {preset} | {moved:.3%} | {differ:.3%} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codec", default="tiny-f8")
    parser.add_argument("--images", nargs="+", type=Path, required=True, help="shards or folders")
    parser.add_argument("--train", nargs="+", type=Path, required=True, help="other shards or folders")
    parser.add_argument("--count", type=int, default=48, help="photographs")
    parser.add_argument("--steps", type=int, default=200, help="training steps of the classifier")
    arguments = parser.parse_args()
    images = centre_crops(arguments.images, SIDE, arguments.count)
    discretizer = Discretizer.from_store(arguments.codec, EngineConfig(device="cpu"))
    image_rows(discretizer, images)
    model, accuracy = trained(torch.from_numpy(centre_crops(arguments.train, 256, 100)), arguments.steps, 32, 128)
    print(f"\nclassifier: accuracy on new crops {accuracy:.1%}")
    gradient_rows(discretizer, images, loss_gradients(discretizer, model, images))


if __name__ == "__main__":
    main()
