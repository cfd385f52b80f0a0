"""How batches are cut for graphs of fixed sizes; capture and replay need CUDA and are tested in test_cuda.py."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dat_workers.engines.torch.graphs import SIZES, GraphedFunction, split_for_graphs


@given(st.integers(1, 300), st.lists(st.integers(1, 64), min_size=1, unique=True).map(sorted))
def test_every_image_runs_once_and_in_order(n: int, sizes: list[int]) -> None:
    cut = list(split_for_graphs(n, sizes))
    assert [i for start, count, _ in cut for i in range(start, start + count)] == list(range(n))
    assert all(1 <= count <= size and size in sizes for _, count, size in cut)
    assert all(count == size for _, count, size in cut[:-1])  # only the tail is padded


@pytest.mark.parametrize(
    ("n", "expected"), [(1, [1]), (3, [4]), (5, [4, 1]), (33, [32, 1]), (48, [64]), (64, [64]), (100, [64, 32, 4])]
)
def test_padding_is_at_most_a_quarter(n: int, expected: list[int]) -> None:
    assert [size for _, _, size in split_for_graphs(n, list(SIZES))] == expected


def test_a_shape_without_a_graph_is_simply_run() -> None:
    double = GraphedFunction(lambda x: x * 2, memory=None)
    assert torch.equal(double(torch.ones(3, 2)), torch.full((3, 2), 2.0))
