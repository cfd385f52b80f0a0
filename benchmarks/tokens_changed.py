"""Which share of the tokens does the adversarial step change, and how does it grow with α (Table 8)?

    python benchmarks/tokens_changed.py tiny-f8 --train SHARD... --test SHARD...

A network learns to tell the photographs of the training shards apart by their crops: one class for each photograph,
so that any pictures will do. Its gradients at Q(x) then drive the step of each preset, without random start, on
crops of those photographs and, with its own prediction for a label, on photographs it never saw. Each α is
one run of `dat_client.torch.adversarial` through a service that is started for it. Results: docs/tiny-f8.md, and
docs/decisions.md for the choice of the default preset.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet18, resnet50

from dat_client import Client
from dat_client.torch import adversarial
from dat_client.wire.vocabulary import PRESETS
from dat_service.launch import running_service
from dat_workers.images.crops import centre_crops

SIDE = 224
ALPHAS = (0.0, 0.1, 0.2, 0.4)
TABLE_8 = dict(zip(ALPHAS, ("0 %", "3.8 %", "7 %", "13 %"), strict=True))


def small(num_classes: int) -> nn.Module:
    """Returns a network of three convolutions."""
    layers: list[nn.Module] = []
    for channels_in, channels_out in ((3, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(channels_in, channels_out, 3, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(1024, num_classes))


NETWORKS: dict[str, Callable[..., nn.Module]] = {"small": small, "resnet18": resnet18, "resnet50": resnet50}


def random_crops(pictures: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """Returns a random crop of each uint8 [N,3,H,W], mirrored half the time."""
    room = pictures.shape[2] - side
    places = torch.randint(0, room + 1, (len(pictures), 2), generator=generator).tolist()
    crops = [p[:, y : y + side, x : x + side] for p, (y, x) in zip(pictures, places, strict=True)]
    mirrored = torch.rand(len(crops), generator=generator) < 0.5
    return torch.stack([c.flip(2) if m else c for c, m in zip(crops, mirrored, strict=True)])


def trained(
    pictures: Tensor, steps: int, batch: int, side: int, network: str = "resnet18"
) -> tuple[nn.Module, float]:
    """Returns a classifier of which picture a crop comes from, and its accuracy on new crops."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = NETWORKS[network](num_classes=len(pictures))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=max(steps, 1))
    begun = time.perf_counter()
    for step in range(steps):
        labels = torch.randperm(len(pictures), generator=generator)[:batch]
        x = random_crops(pictures[labels], side, generator) / 255
        loss = F.cross_entropy(model(x * 2 - 1), labels)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        schedule.step()
        if step % 20 == 19:
            print(f"step {step + 1}/{steps}, loss {loss:.3f}, {time.perf_counter() - begun:.0f} s", flush=True)
    model.eval()
    with torch.no_grad():
        right = [
            model(random_crops(p, side, generator) / 127.5 - 1).argmax(1).eq(n).float().mean()
            for p, n in zip(torch.split(pictures, 50), torch.split(torch.arange(len(pictures)), 50), strict=True)
        ]
    return model, float(torch.stack(right).mean())


def shares(client: Client, model: nn.Module, x: Tensor, labels: Tensor, preset: str, alpha: float) -> float:
    """Returns the mean share of tokens that the step changes."""
    found = []
    for some, y in zip(torch.split(x, 10), torch.split(labels, 10), strict=True):
        q = adversarial(
            client,
            some,
            functools.partial(lambda y, i: F.cross_entropy(model(i * 2 - 1), y), y),
            model=model,
            preset=preset,
            alpha=alpha,
            random_start=0.0,
        )
        found.append(q.tokens_changed or 0.0)
    return float(np.mean(found))


def gradients(client: Client, model: nn.Module, x: Tensor, labels: Tensor) -> npt.NDArray[np.float32]:
    """Returns ∇L at Q(x), fp32 [N,3,H,W]."""
    found: list[Tensor] = []
    for some, y in zip(torch.split(x, 10), torch.split(labels, 10), strict=True):
        x_hat = torch.as_tensor(client.discretize(some, output_dtype="FP32").reconstruction).requires_grad_()
        found += torch.autograd.grad(F.cross_entropy(model(x_hat * 2 - 1), y, reduction="sum"), x_hat)
    return torch.cat(found).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("codec")
    parser.add_argument("--train", nargs="+", type=Path, required=True, help="shards or folders")
    parser.add_argument("--test", nargs="+", type=Path, required=True, help="other shards or folders")
    parser.add_argument("--network", choices=NETWORKS, default="resnet18")
    parser.add_argument("--presets", nargs="+", choices=PRESETS, default=["easyrobust"])
    parser.add_argument("--alphas", nargs="+", type=float, default=ALPHAS)
    parser.add_argument("--steps", type=int, default=400, help="0 for a network that is not trained")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--side", type=int, default=128, help="side of the crops for the training")
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--images", type=int, default=50, help="images of each kind to attack")
    parser.add_argument(
        "--gradients-out",
        type=Path,
        help="write the gradients at Q(x) of the unseen photographs to this file, for `dat codecs verify`",
    )
    arguments = parser.parse_args()
    known = torch.from_numpy(centre_crops(arguments.train, 256, arguments.classes))
    model, accuracy = trained(known, arguments.steps, arguments.batch, arguments.side, arguments.network)
    print(f"{len(known)} photographs told apart, accuracy on new crops {accuracy:.1%}")
    at = (known.shape[2] - SIDE) // 2
    trained_on = known[: arguments.images, :, at : at + SIDE, at : at + SIDE].contiguous()
    unseen = torch.from_numpy(centre_crops(arguments.test, SIDE, arguments.images))
    with torch.no_grad():
        predicted = torch.cat([model(some / 127.5 - 1).argmax(1) for some in torch.split(unseen, 10)])
    with (
        running_service("--codec", arguments.codec, "--local") as service,
        Client(service.url, arguments.codec, timeout_s=300) as client,
    ):
        print("| preset | α | photographs it was trained on | photographs it never saw | Table 8 |")
        print("|---|---|---|---|---|")
        for preset, alpha in itertools.product(arguments.presets, arguments.alphas):
            on_known = shares(client, model, trained_on, torch.arange(len(trained_on)), preset, alpha)
            on_unseen = shares(client, model, unseen, predicted, preset, alpha)
            published = TABLE_8.get(alpha, "") if preset == "easyrobust" else ""
            print(f"| {preset} | {alpha:g} | {on_known:.2%} | {on_unseen:.2%} | {published} |", flush=True)
        if arguments.gradients_out:
            np.save(arguments.gradients_out, gradients(client, model, unseen, predicted))


if __name__ == "__main__":
    main()
