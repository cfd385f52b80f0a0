"""The pool of crops."""

from __future__ import annotations

from pathlib import Path

import torch

from dat_workers.training.data import CropPool


def test_crops_depend_on_seed_and_number_alone(pictures: Path) -> None:
    one, other = (CropPool((pictures,), 32, capacity=10, seed=1) for _ in range(2))
    one.batch(0, 4)
    assert torch.equal(one.batch(5, 4), other.batch(5, 4))
    assert not torch.equal(one.batch(5, 4), one.batch(6, 4))
    assert one.batch(0, 4).abs().max() <= 1


def test_pool_smaller_than_the_set_streams_it(pictures: Path) -> None:
    pool = CropPool((pictures,), 32, capacity=1, seed=1, turnover=1)
    seen = set()
    for number in range(6):
        pool.batch(number, 1)
        seen.add(pool.pool[0].shape)
    assert len(seen) > 1
