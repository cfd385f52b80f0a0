"""Train SimCLR (Chen et al., 2020) by discrete adversarial training: NT-Xent is attacked.

    python examples/simclr.py
    python examples/simclr.py --data imagenet/train --url http://codec:8000 --amp --out simclr.pt

There are no labels, so the attack is that of RoCL (Kim et al., 2020; the DAT paper, Section 4.2): the first of the
two views of each picture moves along the gradient of the contrastive loss against the second view, that is, away
from the other view of its picture and towards other pictures. x_adv = Q(view 1 + δ) then replaces view 1. Under
torchrun, each process uses the negatives of its own batch.

--data is a folder of folders of pictures, or WebDataset shards with jpg and cls; labels are not used.
"""

from __future__ import annotations

from argparse import Namespace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training import Training, example_parser, run
from training.data import labelled, two_views, view_augmentation
from training.networks import backbone, head, own_loss


class SimCLR(nn.Module):
    """An encoder, a projector, and NT-Xent (Eq. 1 of SimCLR) of two batches of views."""

    def __init__(self, arch: str, temperature: float) -> None:
        super().__init__()
        self.encoder, features = backbone(arch)
        self.projector = head((features, features, 128), last_norm=True)
        self.temperature = temperature

    def forward(self, view1: Tensor, view2: Tensor) -> Tensor:
        z = torch.cat([self.projector(self.encoder(view)) for view in (view1, view2)])
        z = F.normalize(z.float(), dim=1)
        similarity = z @ z.T / self.temperature
        similarity = similarity.masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), -torch.inf)
        other_view = torch.arange(len(z), device=z.device).roll(len(view1))
        return F.cross_entropy(similarity, other_view)


def build(options: Namespace) -> Training:
    """Builds the training that the command line describes."""
    augment = view_augmentation(options.image_size, jitter=0.8 * options.jitter)
    data, _ = labelled(options, partial(two_views, augment))
    model = SimCLR(options.arch, temperature=0.2)
    optimizer = torch.optim.AdamW(model.parameters(), options.lr, weight_decay=1e-4, fused=True)
    return Training(model, data, own_loss, optimizer)


parser = example_parser(
    __doc__,
    small={"steps": 30, "batch_size": 32, "image_size": 32, "arch": "resnet18", "lr": 1e-3, "jitter": 0.5},
    full={"epochs": 100, "batch_size": 256, "image_size": 224, "arch": "resnet50", "lr": 1e-3, "jitter": 1.0},
)
parser.add_argument("--arch", choices=("resnet18", "resnet50"), help="the backbone")
parser.add_argument("--jitter", type=float, metavar="S", help="strength of the colour distortion, s in SimCLR")

if __name__ == "__main__":
    run(build, parser)
