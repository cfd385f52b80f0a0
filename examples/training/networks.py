"""Networks that take pictures in 0..1, before normalisation, as the service sends and takes them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision import models

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, what torchvision's networks expect


def normalised(pictures: Tensor) -> Tensor:
    """Float [N,3,H,W], normalised, of pictures in 0..1 or uint8. Inside the model, so that ∇L is at the picture."""
    if pictures.dtype == torch.uint8:
        pictures = pictures.float() / 255
    mean = pictures.new_tensor(MEAN).view(3, 1, 1)
    return (pictures - mean) / pictures.new_tensor(STD).view(3, 1, 1)


class Normalised(nn.Module):
    """A network behind its normalisation."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pictures: Tensor) -> Tensor:
        outputs: Tensor = self.network(normalised(pictures))
        return outputs


def backbone(arch: str) -> tuple[nn.Module, int]:
    """A torchvision ResNet without its classifier, behind its normalisation, and its features' number."""
    network = models.get_model(arch, weights=None)
    features = network.fc.in_features
    network.fc = nn.Identity()
    return Normalised(network), features


def head(sizes: Sequence[int], *, last_norm: bool = False, last_affine: bool = True) -> nn.Sequential:
    """Linear layers of these sizes with BatchNorm and ReLU between them; `last_norm`: BatchNorm at the end too."""
    layers: list[nn.Module] = []
    for i, (inputs, outputs) in enumerate(itertools.pairwise(sizes)):
        last = i == len(sizes) - 2
        layers.append(nn.Linear(inputs, outputs, bias=last and not last_norm))
        if not last:
            layers += [nn.BatchNorm1d(outputs), nn.ReLU(inplace=True)]
        elif last_norm:
            layers.append(nn.BatchNorm1d(outputs, affine=last_affine))
    return nn.Sequential(*layers)
