"""The pruned search gives the published formula's index, whatever the codebook and the vectors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from dat_workers.codecs.networks.vqgan import Codebook
from dat_workers.codecs.store import load_model
from dat_workers.engines.cpu.ball_search import BallSearch, group_neighbours, pick_search


def codebook(vectors: torch.Tensor) -> Codebook:
    made = Codebook(*vectors.shape)
    made.embedding.weight.data.copy_(vectors)
    return made.requires_grad_(False)


def as_latents(rows: torch.Tensor) -> torch.Tensor:
    """[P,d] to [1,d,1,P]."""
    return rows.t()[None, :, None]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    size=st.sampled_from([2048, 4096, 6144]),
    dim=st.integers(1, 4),
    flat=st.integers(0, 3),
    scale=st.floats(1e-3, 1e3),
    away=st.sampled_from([0.0, 1.0, 30.0]),
    grid=st.booleans(),
)
@example(seed=399661485, size=6144, dim=4, flat=3, scale=1.8698147791624233, away=30.0, grid=False)
def test_index_is_that_of_the_plain_search(
    seed: int, size: int, dim: int, flat: int, scale: float, away: float, grid: bool
) -> None:
    """Codebooks in d dimensions or in fewer, away from zero (where the formula cancels), with ties and copies."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(size, dim, generator=generator)
    vectors[:, : min(flat, dim - 1)] *= 1e-3
    if grid:
        vectors = (vectors * 4).round() / 4  # copies, and exact ties between others
    vectors = (vectors + away) * scale
    picked = vectors[torch.randint(0, size, (200,), generator=generator)]
    noise = torch.randn(200, dim, generator=generator)
    halfway = (picked[:100] + picked[100:]) / 2
    rows = torch.cat([picked, picked + 0.1 * scale * noise, picked + scale * noise, halfway, -5 * picked[:20]])
    plain = codebook(vectors)
    assert torch.equal(BallSearch(plain).nearest(as_latents(rows)), plain.nearest(as_latents(rows)))


@pytest.mark.parametrize(("height", "width"), [(4, 4), (3, 5), (8, 8), (33, 40)])
def test_the_images_of_a_batch_do_not_depend_on_each_other(height: int, width: int) -> None:
    """Near-ties in some images and none in others; the exact search gives the nearest entry in fp64."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(2048, 4, generator=generator)
    vectors[:, :3] *= 1e-3
    vectors = (vectors + 30) * 3.7
    z = torch.randn(9, 4, height, width, generator=generator) + 111
    halfway = (vectors[:1000:2] + vectors[1:1000:2]).mul(0.5).repeat(20, 1)[: 5 * height * width]
    z[4:] = halfway.reshape(5, height, width, 4).permute(0, 3, 1, 2)
    plain = codebook(vectors)
    search = BallSearch(plain)
    assert torch.equal(search.nearest(z), torch.cat([plain.nearest(one) for one in torch.split(z, 1)]))
    exact = search.nearest(z, exact=True)
    assert torch.equal(exact, torch.cat([search.nearest(one, exact=True) for one in torch.split(z, 1)]))
    rows = z.double().permute(0, 2, 3, 1).reshape(-1, 1, 4)
    distances = torch.cat([(part - vectors.double()).square().sum(2) for part in torch.split(rows, 64)])
    found = distances.gather(1, exact.view(-1, 1))[:, 0]
    assert torch.allclose(found, distances.amin(1), rtol=1e-12, atol=0)
    assert not torch.equal(exact, search.nearest(z))


def test_no_block_of_vectors_is_too_short_to_round_as_the_whole() -> None:
    """MKL rounds products of a few rows otherwise; the published quantizer has one product."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(8192, 4, generator=generator)
    vectors[:, :3] *= 1e-3  # on a line, and away from zero: ties that rounding decides
    vectors = (vectors + 30) * 3.7
    for count in (513, 514, 515, 1027):  # blocks hold 512
        rows = (vectors[:count] + vectors[-count:]) / 2
        norms = rows.square().sum(1, keepdim=True) + vectors.square().sum(1)
        whole = torch.addmm(norms, rows, vectors.t(), alpha=-2.0).argmin(1)
        assert torch.equal(codebook(vectors).nearest(as_latents(rows))[0, 0], whole)


def test_tokens_of_photographs(photographs: np.ndarray) -> None:
    model = load_model("tiny-f8")
    z = model.latents(torch.from_numpy(photographs[:2]).float() / 127.5 - 1)
    search = BallSearch(model.quantize)
    asked: list[int] = []
    plain = model.quantize.nearest

    def counted(rows: torch.Tensor) -> torch.Tensor:
        asked.append(rows.shape[-1])
        return plain(rows)

    wanted = plain(z)
    model.quantize.nearest = counted  # type: ignore[method-assign]
    assert torch.equal(search.nearest(z), wanted)
    assert 0 < sum(asked) < 0.1 * wanted.numel()  # the formula is asked for near-ties, and seldom


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e18, 1e25, -3e38])
def test_extreme_vectors_are_left_to_the_formula(value: float) -> None:
    plain = codebook(torch.randn(2048, 4, generator=torch.Generator().manual_seed(0)))
    rows = torch.full((3, 4), value)
    rows[1] = 0.5
    assert torch.equal(BallSearch(plain).nearest(as_latents(rows)), plain.nearest(as_latents(rows)))


@pytest.mark.parametrize(("size", "dim", "suits"), [(16384, 4, True), (16384, 8, False), (256, 4, False)])
def test_which_codebooks_it_is_for(size: int, dim: int, suits: bool) -> None:
    assert isinstance(pick_search(Codebook(size, dim)), BallSearch) is suits


def test_every_entry_is_in_one_group() -> None:
    members = group_neighbours(torch.randn(6144, 3))
    assert torch.equal(members.flatten().sort()[0], torch.arange(6144))
