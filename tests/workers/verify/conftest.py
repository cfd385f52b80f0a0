"""The images on which engines are compared."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor


@pytest.fixture(scope="module")
def images(photographs: np.ndarray) -> Tensor:
    """fp32 [2,3,64,64]."""
    return torch.from_numpy(photographs[:2, :, 80:144, 80:144]).float() / 255
