"""Small pictures share a kernel call, and each result is bit-equal to that of the picture by itself."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dat_workers.codecs.networks.vqgan import VQGAN
from dat_workers.codecs.spec import CodecSpec
from dat_workers.codecs.store import load_model
from dat_workers.discretizer import Discretizer
from dat_workers.engines.base import rows_at_once
from dat_workers.engines.config import EngineConfig
from dat_workers.engines.cpu.engine import CpuEngine
from dat_workers.engines.cpu.tiles import Tiles, for_tiles, tile_rows, tile_sizes
from dat_workers.engines.factory import create

CPU = torch.device("cpu")
FULL = {(32, 32): 32, (24, 24): 32, (40, 56): 8, (64, 64): 8}  # rows of a full tile


@pytest.fixture(scope="module")
def engine() -> CpuEngine:
    return CpuEngine(load_model("tiny-f8"), CPU)


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def results(engine: CpuEngine, images: Tensor) -> list[Tensor]:
    """Tokens, the images that they stand for, and the same images decoded exactly."""
    tokens = engine.encode(images)
    return [tokens, engine.decode(tokens), engine.decode(tokens, exact=True)]


def by_itself(engine: CpuEngine, images: Tensor) -> list[Tensor]:
    parts = [results(engine, image) for image in torch.split(images, 1)]
    return [torch.cat(outputs) for outputs in zip(*parts, strict=True)]


def noise(count: int, size: tuple[int, int], seed: int = 0) -> Tensor:
    return torch.rand(count, 3, *size, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", FULL)
def test_every_composition_of_a_batch_gives_the_same_bits(engine: CpuEngine, size: tuple[int, int]) -> None:
    """All sizes of batches and tiles, every position in a tile, and every other content around a picture."""
    images = noise(2 * FULL[size] + 3, size)
    images[1:8] = torch.tensor([0, 1, 0.5, 1e-30, 1e20, -1e20, torch.nan])[:, None, None, None]
    alone = by_itself(engine, images)
    assert (alone[0][7] == -1).all()  # the NaN, and no other
    assert (alone[0][8:] >= 0).all()
    order = torch.Generator().manual_seed(1)
    counts = [2, 3, FULL[size], FULL[size] + 1, 2 * FULL[size], 2 * FULL[size] + 3]
    for count in counts:
        chosen = torch.randperm(len(images), generator=order)[:count]
        together = results(engine, images[chosen])
        for ours, expected in zip(together, alone, strict=True):
            assert torch.equal(ours.nan_to_num(), expected[chosen].nan_to_num())
    assert not torch.equal(alone[1][8], alone[1][9])


def test_a_picture_in_each_position_of_a_tile(engine: CpuEngine) -> None:
    picture = noise(1, (32, 32), seed=5)
    tokens, image, exact = results(engine, picture)
    for position in range(0, 64, 5):
        company = noise(64, (32, 32), seed=position + 10)
        company[position] = picture
        ours = results(engine, company)
        assert all(torch.equal(a[position], b[0]) for a, b in zip(ours, (tokens, image, exact), strict=True))


def test_pictures_do_share_kernel_calls() -> None:
    ours = CpuEngine(load_model("tiny-f8"), CPU)
    images = noise(70, (32, 32))
    ours.encode(images)  # compares tiles with single pictures, once
    calls: list[int] = []
    ours.tile_model.encoder.conv_in.register_forward_hook(lambda module, given, out: calls.append(len(out)))
    ours.encode(images)
    assert sorted(calls, reverse=True) == tile_sizes(70, 32, ours.tiles.count)
    calls.clear()
    ours.encode(images[:1])
    assert calls == [1]  # and no padding


def test_bits_do_not_depend_on_the_number_of_threads(engine: CpuEngine, threads: int) -> None:
    images = noise(9, (40, 56))
    other = CpuEngine(load_model("tiny-f8"), CPU)
    assert other.tiles.count == threads
    assert all(map(torch.equal, results(other, images), results(engine, images)))


def test_threads_of_the_process_stay_as_they_are(threads: int) -> None:
    tiles = Tiles()
    assert torch.get_num_threads() == threads
    later: list[int] = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [threads]
    inside = tiles.run(lambda x: x * torch.get_num_threads(), as_it_is, torch.ones(8, 1, 2, 2), 1)
    assert inside.unique().tolist() == [1]


def as_it_is(x: Tensor) -> Tensor:
    return x


def test_a_network_that_depends_on_company_is_computed_picture_by_picture() -> None:
    """So would be one whose kernels add in another order for several pictures."""
    tiles = Tiles()
    calls: list[int] = []

    def depends(rows: Tensor) -> Tensor:
        calls.append(len(rows))
        return rows + (1e-7 if len(rows) == 4 else 0)

    rows = torch.randn(16, 1, 2, 2)
    assert tiles.prepare(depends, (1, 2, 2), 8) == 1
    calls.clear()
    assert torch.equal(tiles.run(depends, as_it_is, rows, 8), rows)
    assert calls == [1] * 16
    assert tiles.prepare(as_it_is, (1, 2, 2), 8) == 8


def test_checks_are_bounded() -> None:
    """A client that sends pictures of ever new sizes does not have each of them checked."""
    tiles = Tiles()
    sizes = [tiles.prepare(as_it_is, (1, 1, width), 4) for width in range(1, 80)]
    assert sizes == [4] * 64 + [1] * 15
    assert tiles.prepare(as_it_is, (1, 1, 5), 4) == 4


@pytest.mark.parametrize(
    ("side", "channels", "rows"),
    [(8, 32, 32), (32, 32, 32), (64, 32, 8), (88, 32, 4), (96, 32, 1), (224, 32, 1), (32, 64, 8), (32, 128, 1)],
)
def test_rows_of_a_tile(side: int, channels: int, rows: int) -> None:
    assert tile_rows(side * side, channels) == rows


@given(rows=st.integers(1, 300), most=st.sampled_from([1, 2, 8, 32]), threads=st.integers(1, 64))
def test_sizes_of_tiles(rows: int, most: int, threads: int) -> None:
    sizes = tile_sizes(rows, most, threads)
    assert sum(sizes) == rows
    assert all(size <= most and size & (size - 1) == 0 for size in sizes)
    assert len(sizes) >= min(rows, threads)  # no thread is idle that could have a picture
    assert sizes == sorted(sizes, reverse=True)


def test_rows_at_once(engine: CpuEngine) -> None:
    """What the batcher collects: four full tiles, where the time of a batch at 224² allows it."""
    assert [rows_at_once(engine, side * side) for side in (16, 32, 64, 224, 448)] == [128, 128, 32, 4, 1]
    wide = CodecSpec("wide", ch=128, ch_mult=(1, 1), num_res_blocks=1, codebook_size=8, latent_dim=4)
    assert rows_at_once(CpuEngine(VQGAN(wide), CPU), 32 * 32) == 4


def test_copies_for_tiles_share_their_tensors(engine: CpuEngine) -> None:
    copied = for_tiles(engine.model)
    pairs = zip(copied.parameters(), engine.model.parameters(), strict=True)
    assert all(ours is theirs for ours, theirs in pairs)
    assert type(engine.model.encoder.conv_in) is torch.nn.Conv2d


@pytest.mark.parametrize(("codebook_size", "dim"), [(512, 4), (2048, 4), (512, 16)])
def test_other_geometries(codebook_size: int, dim: int) -> None:
    """Attention between the blocks, codebooks with and without balls, f = 2: 256 positions at 32²."""
    torch.manual_seed(0)
    geometry = {"ch": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "attn_resolutions": (128,), "z_channels": 4}
    spec = CodecSpec("toy", **geometry, codebook_size=codebook_size, latent_dim=dim)  # type: ignore[arg-type]
    model = VQGAN(spec).eval().requires_grad_(False)
    images = noise(11, (30, 34))
    ours = CpuEngine(model, CPU)
    assert all(map(torch.equal, results(ours, images), by_itself(ours, images)))
    assert list(ours.tiles._most.values()) == [32, 32, 32]
    assert torch.equal(ours.encode(images), nearest_in_fp64(model, images))


def nearest_in_fp64(model: VQGAN, images: Tensor) -> Tensor:
    exact = copy.deepcopy(model).double()
    with torch.inference_mode():
        z = exact.latents(images.double() * 2 - 1)
        return torch.cat([exact.quantize.nearest(one) for one in torch.split(z, 1)])


@pytest.mark.parametrize(("side", "step"), [(32, 24), (64, 40)])
def test_tokens_are_those_of_fp64(engine: CpuEngine, photographs: np.ndarray, side: int, step: int) -> None:
    """No more of them differ than of the reference's; benchmarks/small_pictures.py counts 100,000."""
    x = torch.from_numpy(photographs[2:3]).float() / 255
    crops = x.unfold(2, side, step).unfold(3, side, step).permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, side, side)
    reference = create(EngineConfig("reference", device="cpu"), load_model("tiny-f8"))
    expected = nearest_in_fp64(engine.model, crops)
    of_reference = torch.cat([reference.encode(crop) for crop in torch.split(crops, 1)])
    wrong = int((engine.encode(crops) != expected).sum())
    assert wrong <= int((of_reference != expected).sum())
    assert wrong <= 2e-4 * expected.numel()


def test_the_service_batches_small_pictures_of_many_requests() -> None:
    codec = Discretizer.from_store("tiny-f8", EngineConfig("cpu", device="cpu"))
    task = codec.prepare(np.zeros((1, 3, 30, 25), np.uint8)).task
    assert codec.rows_at_once(task) == 128
    images = (noise(40, (30, 25)) * 255).to(torch.uint8).numpy()
    outputs = ("reconstruction", "indices")
    together = codec.discretize(images, outputs=outputs)
    for i in range(0, 40, 7):
        alone = codec.discretize(images[i : i + 1], outputs=outputs)
        assert all(np.array_equal(together[name][i : i + 1], alone[name]) for name in outputs)
