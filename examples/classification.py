"""Train a classifier (ResNet-50 or ViT-B/16) by discrete adversarial training: the cross entropy is attacked.

    python examples/classification.py --model vit_b_16
    python examples/classification.py --data imagenet/train --url http://codec:8000 --amp --out resnet50.pt
    torchrun --nproc-per-node 8 examples/classification.py --url http://codec:8000 --steps 450000 --amp \\
        --data 'imagenet/train-{000000..001023}.tar'

--data is a folder that holds a folder of pictures for each class, or WebDataset shards with jpg and cls.

--reconstructions is a folder with the same names that holds Q(x) of each picture. Write it once, with
`dat discretize imagenet/train --out q`. A picture and its Q(x) then get the same crop and flip, and the service
computes only Q(x + δ). The crop of Q(x) differs slightly from Q of the crop: tokens lie on a grid of f x f pixels,
which the crop shifts and scales. The gradient is taken at the crop of Q(x).
"""

from __future__ import annotations

from argparse import Namespace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from torchvision import models
from torchvision.transforms import v2

from training import Training, example_parser, run
from training.data import DataError, PairedFolder, is_shards, labelled, same_crop
from training.networks import Normalised


def build(options: Namespace) -> Training:
    """Builds the training that the command line describes."""
    augment = v2.Compose([v2.RandomResizedCrop(options.image_size, antialias=True), v2.RandomHorizontalFlip()])
    data: Dataset[Any]
    if options.reconstructions:
        if not options.data or is_shards(options.data):
            raise DataError("--reconstructions needs a folder as --data")
        pairs = PairedFolder(options.data, options.reconstructions, partial(crop_pair, augment))
        data, classes = pairs, len(pairs.classes)
    else:
        data, classes = labelled(options, partial(crop, augment))

    vit = options.model.startswith("vit")
    if vit and options.image_size % 16:
        raise DataError(f"--image-size {options.image_size}: ViT-B/16 needs a multiple of 16")
    own = {"image_size": options.image_size} if vit else {"zero_init_residual": True}
    model = Normalised(models.get_model(options.model, weights=None, num_classes=classes, **own))
    optimizer: torch.optim.Optimizer
    if vit:
        options.lr = options.lr or 3e-4
        optimizer = torch.optim.AdamW(model.parameters(), options.lr, weight_decay=0.05, fused=True)
    else:
        options.lr = options.lr or 0.1 * options.batch_size * options.world / 256  # Goyal et al., 2017
        optimizer = torch.optim.SGD(model.parameters(), options.lr, momentum=0.9, weight_decay=1e-4, nesterov=True)
    return Training(model, data, loss, optimizer, precomputed=bool(options.reconstructions))


def loss(model: nn.Module, pictures: Tensor, labels: Tensor) -> Tensor:
    """Returns the loss that is attacked and then minimised."""
    return F.cross_entropy(model(pictures), labels)


def crop(augment: v2.Transform, picture: Tensor, label: int) -> tuple[Tensor, int]:
    return augment(picture), label


def crop_pair(augment: v2.Transform, picture: Tensor, q: Tensor, label: int) -> tuple[Tensor, Tensor, int]:
    x, q = same_crop(augment, picture, q)
    return x, q, label


parser = example_parser(
    __doc__,
    small={"steps": 20, "batch_size": 16, "image_size": 32},
    full={"epochs": 90, "batch_size": 128, "image_size": 224},
)
parser.add_argument(
    "--model",
    choices=("resnet18", "resnet50", "vit_b_16"),
    default="resnet50",
    help="the network (default resnet50)",
)
parser.add_argument("--reconstructions", metavar="FOLDER", help="folder with Q(x) of --data, under the same names")

if __name__ == "__main__":
    run(build, parser)
