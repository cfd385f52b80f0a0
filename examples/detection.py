"""Train an object detector (Faster R-CNN) by discrete adversarial training: its whole loss is attacked.

    python examples/detection.py
    python examples/detection.py --arch fasterrcnn_resnet50_fpn_v2 --url http://codec:8000 --amp --steps 90000 \\
        --data 'coco/train-{000000..000117}.tar' --out detector.pt

As in Section 4.3 of the DAT paper, the attack is on the sum of all losses of the detector: objectness and box
regression of the proposals, classification and box regression of the detections.

--data is WebDataset shards with jpg and json. The json holds `objects`, each with `bbox_xywh` in pixels,
`category_id` from 1, and `iscrowd`; crowds are left out. Pictures are scaled into a square of --image-size, padded
below or to the right, and flipped at random, and the boxes with them. Without --data, the task is a synthetic one,
"pasted patches": patches of six photographs lie on a dim picture of a seventh, and the detector must find each
patch and name its photograph.

A note on means. The client takes the loss for a mean over N pictures (`reduction="mean"`). torchvision's losses are
means over anchors (256 of each picture) and proposals (at most --proposals of each picture), drawn at random and
counted over the batch. If every picture has equally many, N times this mean is the sum of the pictures' own losses,
as assumed; a picture with fewer proposals weighs less, in proportion. This affects the length of its gradient
(preset `paper`) but not the direction (`easyrobust` normalises the length). The draw also makes the gradient an
estimate. The state of the random numbers is restored after the attack, so that training draws as it would without
an attack.
"""

from __future__ import annotations

from argparse import Namespace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, default_collate
from torchvision import models
from torchvision.transforms.v2 import functional as TF

from training import Training, example_parser, run
from training.data import PHOTOGRAPHS, DataError, boxes_of, is_shards, photograph, picture_of, shards

Target = dict[str, Tensor]  # boxes [n,4] as x1, y1, x2, y2 in pixels; labels [n], from 1


class PastedPatches(Dataset[Any]):
    """The synthetic task: fixed pictures, uint8 [3,S,S], with 1 to 4 patches each, and their targets."""

    def __init__(self, image_size: int, length: int = 384) -> None:
        self.size, self.length = image_size, length
        self.background = photograph("brick", round(1.5 * image_size))[:, :image_size, :image_size] // 3
        self.sources = [photograph(name, image_size) for name in PHOTOGRAPHS]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        generator = torch.Generator().manual_seed(index)

        def draw(low: int, high: int) -> int:
            return int(torch.randint(low, high, (), generator=generator))

        picture, boxes, labels = self.background.clone(), [], []
        for _ in range(draw(1, 5)):
            label, width, height = draw(0, len(self.sources)), *(draw(self.size // 5, self.size // 2) for _ in "xy")
            source = self.sources[label]
            left, top = draw(0, self.size - width), draw(0, self.size - height)
            x, y = draw(0, source.shape[2] - width), draw(0, source.shape[1] - height)
            picture[:, top : top + height, left : left + width] = source[:, y : y + height, x : x + width]
            boxes.append([left, top, left + width, top + height])
            labels.append(label + 1)
        return picture, {"boxes": torch.tensor(boxes, dtype=torch.float32), "labels": torch.tensor(labels)}


def build(options: Namespace) -> Training:
    """Builds the training that the command line describes."""
    size = options.image_size
    data: Dataset[Any]
    if options.data is None:
        data, classes = PastedPatches(size), len(PHOTOGRAPHS) + 1
    elif is_shards(options.data):
        classes = options.classes or 91  # COCO's categories are 1 to 90
        data = shards(options, partial(letterboxed, size, classes))
    else:
        raise DataError("--data: detection needs WebDataset shards (.tar) with jpg and json")
    # One size for all pictures keeps the detector from resizing them again.
    own = {"min_size": size, "max_size": size, "box_batch_size_per_image": options.proposals}
    model = models.get_model(options.arch, weights=None, weights_backbone=None, num_classes=classes, **own)
    optimizer = torch.optim.AdamW(model.parameters(), options.lr, weight_decay=0.05, fused=True)
    return Training(model, data, loss, optimizer, collate=collate)


def loss(model: nn.Module, pictures: Tensor, targets: list[Target]) -> Tensor:
    """Returns the loss that is attacked and then minimised. The detector normalises the pictures itself."""
    losses: dict[str, Tensor] = model(list(pictures), targets)
    return torch.stack(list(losses.values())).sum()


def letterboxed(size: int, classes: int, sample: dict[str, Any]) -> tuple[Tensor, Target]:
    """Returns a picture of the shards, scaled into a square, uint8 [3,S,S], and its target. Half are flipped."""
    picture = picture_of(sample)
    xywh, labels = boxes_of(sample, classes)
    scale = size / max(picture.shape[1:])
    height, width = (max(1, round(scale * extent)) for extent in picture.shape[1:])
    picture = TF.resize(picture, [height, width], antialias=True)
    boxes = scale * torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1)
    boxes = boxes.clamp(min=0).minimum(torch.tensor([width, height, width, height]))
    if torch.rand(()) < 0.5:
        picture, boxes = TF.horizontal_flip(picture), boxes[:, [2, 1, 0, 3]] * torch.tensor([-1, 1, -1, 1])
        boxes[:, [0, 2]] += width
    large_enough = (boxes[:, 2:] - boxes[:, :2] >= 1).all(1)
    padded = TF.pad(picture, [0, 0, size - width, size - height])
    return padded, {"boxes": boxes[large_enough], "labels": labels[large_enough]}


def collate(samples: list[tuple[Tensor, Target]]) -> tuple[Tensor, list[Target]]:
    """Stacks pictures; targets stay a list, because pictures have different numbers of boxes."""
    return default_collate([picture for picture, _ in samples]), [target for _, target in samples]


parser = example_parser(
    __doc__,
    small={"steps": 20, "batch_size": 4, "image_size": 96, "lr": 3e-4, "proposals": 32},
    full={"batch_size": 16, "image_size": 640, "lr": 2e-4, "proposals": 512},
)
parser.add_argument(
    "--arch",
    choices=("fasterrcnn_mobilenet_v3_large_320_fpn", "fasterrcnn_resnet50_fpn_v2"),
    default="fasterrcnn_mobilenet_v3_large_320_fpn",
    help="the detector (default fasterrcnn_mobilenet_v3_large_320_fpn)",
)
parser.add_argument("--proposals", type=int, metavar="N", help="proposals of each picture that train the head")

if __name__ == "__main__":
    run(build, parser)
