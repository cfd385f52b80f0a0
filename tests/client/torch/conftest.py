"""A real service in a thread, and a small model with everything that the attack must leave alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from dat_client import Client
from tests.conftest import app_in_thread, crop


@pytest.fixture(scope="module")
def codec_url() -> Iterator[str]:
    with app_in_thread(codec="tiny-f8") as url:
        yield url


@pytest.fixture
def codec(codec_url: str) -> Iterator[Client]:
    with Client(codec_url, timeout_s=60) as client:
        yield client


@pytest.fixture(scope="session")
def x() -> Tensor:
    """uint8 [4,3,32,32], from photographs."""
    names = ("astronaut", "chelsea", "coffee", "rocket")
    return torch.stack([torch.from_numpy(crop(name, 64, 64)[:, ::2, ::2].copy()) for name in names])


@pytest.fixture
def labels() -> Tensor:
    return torch.arange(4)


@pytest.fixture
def model() -> nn.Module:
    """BatchNorm, dropout and a buffer of its own; in train mode, with gradients of an earlier step."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2), nn.AdaptiveAvgPool2d(4),
        nn.Flatten(), nn.Linear(128, 4),
    )  # fmt: skip
    model.register_buffer("queue", torch.randn(3))
    model(torch.rand(4, 3, 32, 32)).sum().backward()
    return model
