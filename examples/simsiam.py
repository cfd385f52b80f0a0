"""Train SimSiam (Chen and He, 2021) by discrete adversarial training: its negative cosine similarity is attacked.

    python examples/simsiam.py
    python examples/simsiam.py --data imagenet/train --url http://codec:8000 --amp --out simsiam.pt

There are no labels, so the attack is that of RoCL (Kim et al., 2020; the DAT paper, Section 4.2): the first of the
two views of each picture moves along the gradient of the loss against the second view, so that they look less alike
to the model. x_adv = Q(view 1 + δ) then replaces view 1. SimSiam's stop-gradient also applies to the attack: the
gradient reaches view 1 only through the predictor, never through the target computed from it.

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


class SimSiam(nn.Module):
    """The encoder f (backbone and projector), the predictor h, and the loss of SimSiam's Eq. 4, in -1..1."""

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
    """Returns the mean cosine similarity of the rows of two batches [N,D]."""
    return F.cosine_similarity(p.float(), z.float()).mean()


def build(options: Namespace) -> Training:
    """Builds the training that the command line describes."""
    data, _ = labelled(options, partial(two_views, view_augmentation(options.image_size)))
    model = SimSiam(options.arch)
    optimizer = torch.optim.SGD(model.parameters(), options.lr, momentum=0.9, weight_decay=1e-4)
    return Training(model, data, own_loss, optimizer)


parser = example_parser(
    __doc__,
    small={"steps": 36, "batch_size": 16, "image_size": 32, "arch": "resnet18", "lr": 0.2},
    full={"epochs": 100, "batch_size": 256, "image_size": 224, "arch": "resnet50", "lr": 0.05},
)
parser.add_argument("--arch", choices=("resnet18", "resnet50"), help="the backbone")

if __name__ == "__main__":
    run(build, parser)
