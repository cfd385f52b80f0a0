"""SimSiam (Chen and He, 2021) with discrete adversarial training: the negative cosine similarity is attacked.

    python examples/simsiam.py
    python examples/simsiam.py --data imagenet/train --url http://codec:8000 --amp --out simsiam.pt

There are no labels, so the attack is RoCL's (Kim et al., 2020; the DAT paper, Section 4.2): of the two views of
each picture, the first is moved along the gradient of the loss against the second, until they look less alike
to the model. x_adv = Q(view 1 + δ) then takes the place of view 1. SimSiam's stop-gradient holds in the attack
as well: view 1 is moved through the predictor alone, never through the target that it gives.

--data: a folder of folders of pictures, or WebDataset shards with jpg and cls (labels are not used).
"""

from __future__ import annotations

from argparse import Namespace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training import Training, example_parser, run
from training.data import labelled, two_views, view_augmentation
from training.networks import backbone, head


class SimSiam(nn.Module):
    """Encoder f (backbone and projector), predictor h, and the loss of Eq. 4 of SimSiam: -1..1."""

    def __init__(self, arch: str) -> None:
        super().__init__()
        self.encoder, features = backbone(arch)
        width = 2048 if features == 2048 else 512
        self.projector = head((features, width, width, width), last_norm=True, last_affine=False)
        self.predictor = head((width, width // 4, width))

    def forward(self, view1: Tensor, view2: Tensor) -> Tensor:
        z1, z2 = (self.projector(self.encoder(view)) for view in (view1, view2))
        p1, p2 = self.predictor(z1), self.predictor(z2)
        return -(similarity(p1, z2.detach()) + similarity(p2, z1.detach())) / 2


def similarity(p: Tensor, z: Tensor) -> Tensor:
    return F.cosine_similarity(p.float(), z.float()).mean()


def build(options: Namespace) -> Training:
    data, _ = labelled(options, partial(two_views, view_augmentation(options.image_size)))
    model = SimSiam(options.arch)
    optimizer = torch.optim.SGD(model.parameters(), options.lr, momentum=0.9, weight_decay=1e-4)
    return Training(model, data, loss, optimizer)


def loss(model: nn.Module, view1: Tensor, view2: Tensor) -> Tensor:
    """What is attacked, through view 1, and then minimised."""
    negative_similarity: Tensor = model(view1, view2)
    return negative_similarity


parser = example_parser(
    __doc__,
    small={"steps": 36, "batch_size": 16, "image_size": 32, "arch": "resnet18", "lr": 0.2},
    full={"epochs": 100, "batch_size": 256, "image_size": 224, "arch": "resnet50", "lr": 0.05},
)
parser.add_argument("--arch", choices=("resnet18", "resnet50"))

if __name__ == "__main__":
    run(build, parser)
