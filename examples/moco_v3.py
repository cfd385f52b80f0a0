"""Train MoCo v3 (Chen, Xie and He, 2021) by discrete adversarial training: its contrastive loss is attacked.

    python examples/moco_v3.py
    python examples/moco_v3.py --data imagenet/train --url http://codec:8000 --amp --out moco.pt

There are no labels, so the attack is that of RoCL (Kim et al., 2020; the DAT paper, Section 4.2): the first of the
two views of each picture moves along the gradient of the contrastive loss against the second view. x_adv = Q(view 1
+ δ) then replaces view 1. The gradient runs through the encoder's queries. The keys come from the momentum encoder,
which follows the encoder after each step. Both are parts of the model that AdversarialLoader is given, so the
attack leaves both unchanged, BatchNorm statistics included. Under torchrun, each process uses the negatives of its
own batch.

--data is a folder of folders of pictures, or WebDataset shards with jpg and cls; labels are not used.
"""

from __future__ import annotations

import copy
from argparse import Namespace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training import Training, example_parser, run
from training.data import labelled, two_views, view_augmentation
from training.networks import backbone, head, own_loss


class MoCoV3(nn.Module):
    """An encoder for queries, a momentum encoder for keys, and the symmetric loss of MoCo v3's Algorithm 1."""

    def __init__(self, arch: str, temperature: float, momentum: float) -> None:
        super().__init__()
        network, features = backbone(arch)
        width = 4096 if features == 2048 else 512
        self.encoder = nn.Sequential(network, head((features, width, 256), last_norm=True, last_affine=False))
        self.predictor = head((256, width, 256), last_norm=True, last_affine=False)
        self.momentum_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.temperature = temperature
        self.momentum = momentum

    def forward(self, view1: Tensor, view2: Tensor) -> Tensor:
        q1, q2 = (self.predictor(self.encoder(view)) for view in (view1, view2))
        with torch.no_grad():
            k1, k2 = (self.momentum_encoder(view) for view in (view1, view2))
        return self.contrast(q1, k2) + self.contrast(q2, k1)

    def contrast(self, q: Tensor, k: Tensor) -> Tensor:
        """Returns InfoNCE of queries against keys, both [N,D]; row i of each belongs to picture i."""
        logits = F.normalize(q.float(), dim=1) @ F.normalize(k.float(), dim=1).T / self.temperature
        return 2 * self.temperature * F.cross_entropy(logits, torch.arange(len(q), device=q.device))

    @torch.no_grad()
    def follow(self) -> None:
        """Moves the momentum encoder's weights one step closer to the encoder's."""
        for slow, fast in zip(self.momentum_encoder.parameters(), self.encoder.parameters(), strict=True):
            slow.lerp_(fast, 1 - self.momentum)


def build(options: Namespace) -> Training:
    """Builds the training that the command line describes."""
    data, _ = labelled(options, partial(two_views, view_augmentation(options.image_size)))
    model = MoCoV3(options.arch, temperature=0.2, momentum=0.99)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(learning, options.lr, weight_decay=0.1, fused=True)
    return Training(model, data, own_loss, optimizer, after_step=model.follow)


parser = example_parser(
    __doc__,
    small={"steps": 36, "batch_size": 16, "image_size": 32, "arch": "resnet18", "lr": 1e-3},
    full={"epochs": 100, "batch_size": 256, "image_size": 224, "arch": "resnet50", "lr": 1e-3},
)
parser.add_argument("--arch", choices=("resnet18", "resnet50"), help="the backbone")

if __name__ == "__main__":
    run(build, parser)
