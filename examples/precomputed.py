"""Trains a classifier on what `dat precompute` wrote; Q(x + δ) is requested for a share of the batches.

    dat precompute 'imagenet/train-{000000..001023}.tar' imagenet-q --codec tiny-f8 --augment 4 --crop 224
    python examples/precomputed.py --data imagenet-q --source 'imagenet/train-{000000..001023}.tar'
    python examples/precomputed.py --data imagenet-q --source imagenet --url http://codec:8000 --mix 0.1 --amp

Q(x) does not depend on the model, so it is made once. Q(x + δ) does, and costs a request. --mix is the share of the
batches that are attacked at the stored Q(x) and trained on Q(x + δ) from the service (Algorithm 1 without its first
request); the others are trained on the stored Q(x). With --mix 0 the service is never used.

x is cut from --source as it was cut for Q, or read from DATA itself where it was written with `--outputs
reconstruction,image`. Nothing is augmented here: the crops and flips are those of precompute, and each epoch takes
one of a sample's stored views.
"""

from __future__ import annotations

from argparse import Namespace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models

from dat_client.webdataset import load, read_manifest, read_settings
from training import Training, example_parser, run
from training.data import SHUFFLED, DataError
from training.networks import Normalised


def build(options: Namespace) -> Training:
    if not options.data or len(options.data) > 1:
        raise DataError("--data: one folder that dat precompute wrote")
    if not 0 <= options.mix <= 1:
        raise DataError(f"--mix {options.mix:g}: must be a share, 0..1")
    (dst,) = options.data
    settings = read_settings(dst)
    if settings["codec"] != options.codec:
        raise DataError(f"--codec {options.codec}: {dst} was made by {settings['codec']}")
    if not settings["crop"] and not settings["augment"]:
        raise DataError(
            f"{dst}: its pictures differ in size; dat precompute with --crop or --augment makes them alike"
        )
    if options.image_size:
        raise DataError(f"--image-size: the pictures of {dst} are as large as dat precompute made them")
    # Endless, so that all ranks make the same number of steps, however the shards are divided.
    data = load(dst, source=options.source, image=not options.source, shuffle=SHUFFLED, seed=options.seed).repeat()
    if options.epochs:
        samples = sum(entry["samples"] for entry in read_manifest(dst).values())
        options.steps = options.epochs * max(1, samples // (options.batch_size * options.world))

    classes = options.classes or len(settings["classes"] or range(1000))
    model = Normalised(models.get_model(options.model, weights=None, num_classes=classes, zero_init_residual=True))
    options.lr = options.lr or 0.1 * options.batch_size * options.world / 256  # Goyal et al., 2017
    optimizer = torch.optim.SGD(model.parameters(), options.lr, momentum=0.9, weight_decay=1e-4, nesterov=True)
    return Training(model, data, loss, optimizer, precomputed=True, mix=options.mix)


def loss(model: nn.Module, pictures: Tensor, labels: Tensor) -> Tensor:
    """The loss that the attack increases and the training minimises."""
    return F.cross_entropy(model(pictures), labels)


parser = example_parser(__doc__, small={"steps": 20, "batch_size": 16}, full={"epochs": 90, "batch_size": 128})
parser.add_argument("--model", choices=("resnet18", "resnet50"), default="resnet50")
parser.add_argument("--source", metavar="SRC", help="source of --data: a folder of shards, or a pattern")
parser.add_argument(
    "--mix", type=float, default=0.5, metavar="SHARE", help="share of the batches that are attacked (default 0.5)"
)

if __name__ == "__main__":
    run(build, parser)
