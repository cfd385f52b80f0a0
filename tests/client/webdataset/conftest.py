from __future__ import annotations

from pathlib import Path

import pytest

from .precomputed import NAMES, one_view, three_views, write_pair


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """SRC and DST: 5 shards of 4 samples, of which 3 were skipped."""
    return write_pair(tmp_path_factory.mktemp("pair"), NAMES, 4, one_view, skipped=(0, 6, 19))


@pytest.fixture(scope="session")
def dst(pair: tuple[Path, Path]) -> Path:
    return pair[1]


@pytest.fixture(scope="session")
def augmented(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """SRC and DST with three views a sample: 2 shards of 6 samples."""
    outputs = ["reconstruction", "indices", "image"]
    folder = tmp_path_factory.mktemp("augmented")
    return write_pair(folder, NAMES[:2], 6, three_views, outputs=outputs, augment=3, skipped=[2])


@pytest.fixture
def own(tmp_path: Path) -> tuple[Path, Path]:
    """SRC and DST of a test's own: 2 shards of 2."""
    return write_pair(tmp_path, NAMES[:2], 2, one_view)
