"""Pictures to train on."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import photograph


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for name in ("astronaut", "chelsea", "coffee"):
        Image.fromarray(photograph(name)[:, ::2, ::2].transpose(1, 2, 0)).save(folder / f"{name}.jpg")
    return folder
