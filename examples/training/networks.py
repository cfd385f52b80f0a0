"""Networks that take pictures in 0..1, as the service does, and normalise them inside."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision import models

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as torchvision's networks expect


def normalised(pictures: Tensor) -> Tensor:
    """Normalises pictures [N,3,H,W], uint8 or in 0..1. Inside the model, so that ∇L is at the picture."""
    if pictures.dtype == torch.uint8:
        pictures = pictures.float() / 255
    mean = pictures.new_tensor(MEAN).view(3, 1, 1)
    return (pictures - mean) / pictures.new_tensor(STD).view(3, 1, 1)


class Normalised(nn.Module):
    """A network, preceded by its normalisation."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pictures: Tensor) -> Tensor:
        outputs: Tensor = self.network(normalised(pictures))
        return outputs


def backbone(arch: str) -> tuple[nn.Module, int]:
    """Returns a torchvision ResNet without classifier, preceded by normalisation, and its number of features."""
    network = models.get_model(arch, weights=None)
    features = network.fc.in_features
    network.fc = nn.Identity()
    return Normalised(network), features


def head(sizes: Sequence[int], *, last_norm: bool = False, last_affine: bool = True) -> nn.Sequential:
    """Returns linear layers with BatchNorm and ReLU between them; `last_norm` adds a BatchNorm at the end."""
    layers: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
        last = i == len(sizes) - 2
        layers.append(nn.Linear(inputs, outputs, bias=last and not last_norm))
        if not last:
            layers += [nn.BatchNorm1d(outputs), nn.ReLU(inplace=True)]
        elif last_norm:
            layers.append(nn.BatchNorm1d(outputs, affine=last_affine))
    return nn.Sequential(*layers)


def own_loss(model: nn.Module, *inputs: Tensor) -> Tensor:
    """Returns the loss that the model itself computes; it is attacked through the first input, then minimised."""
    loss: Tensor = model(*inputs)
    return loss
