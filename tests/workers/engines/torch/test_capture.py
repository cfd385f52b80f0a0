"""The graphs that an engine captures, and what it does when memory runs out, with a stand-in for CUDA."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dat_workers.codecs.networks.vqgan import VQGAN
from dat_workers.codecs.spec import CodecSpec
from dat_workers.engines.base import rows_at_once
from dat_workers.engines.torch.engine import TorchEngine
from dat_workers.engines.torch.graphs import SIZES, CaptureMemory, GraphedFunction
from dat_workers.errors import OutOfMemory
from tests.workers.engines.torch.fake_cuda import FakeCuda, fake_cuda

__all__ = ["fake_cuda"]
TOY = CodecSpec("toy", ch=32, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(), codebook_size=16, latent_dim=4)
SIDE = 16


class Scarce:
    """Memory for a limited number of images: more of them at once raise an error."""

    def __init__(self, most: int, error: Exception | None = None) -> None:
        self.most = most
        self.error = error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        self.sizes: list[int] = []  # of the calls that went well

    def __call__(self, x: Tensor) -> Tensor:
        if len(x) > self.most:
            raise self.error
        self.sizes.append(len(x))
        return torch.zeros(len(x))


def engine_with_graphs(encode: Scarce, decode: Scarce) -> TorchEngine:
    """An engine on the CPU that believes in graphs, with functions in place of the codec."""
    torch.manual_seed(0)
    engine = TorchEngine(VQGAN(TOY), torch.device("cpu"), "fp32")
    engine.tricks, engine.batch = replace(engine.tricks, graphs=True), SIZES[-1]
    memory = CaptureMemory.on(torch.device("cuda:0"))
    engine._run_encode, engine._run_decode = GraphedFunction(encode, memory), GraphedFunction(decode, memory)
    return engine


def captured_sizes(function: GraphedFunction) -> list[int]:
    return sorted(shape[0] for shape in function._captured)


def test_both_functions_are_captured_on_one_stream_with_one_pool(
    fake_cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On two streams the allocator would keep the memory of both, because it never mixes the blocks of streams."""
    parse = TorchEngine.__init__.__globals__["Tricks"].parse
    monkeypatch.setattr(
        "dat_workers.engines.torch.engine.Tricks.parse",
        lambda text, cuda: replace(parse(text, cuda=cuda), graphs=True),
    )
    engine = TorchEngine(VQGAN(TOY), torch.device("cpu"), "fp32")
    engine.batch = 2
    engine.warm_up(SIDE)
    assert len(fake_cuda.captures) == 4  # encode and decode of 2 and of 1
    assert len({id(stream) for stream, _ in fake_cuda.captures}) == 1
    assert len({id(pool) for _, pool in fake_cuda.captures}) == 1


@pytest.mark.parametrize(
    ("encode", "decode", "side", "sizes", "rows"),
    [
        (64, 64, 224, SIZES, 64),
        (20, 64, 224, (1, 2, 4, 8, 16), 16),  # the encoder runs out
        (64, 8, 224, (1, 2, 4, 8), 8),  # the decoder does, after the encoder was captured
        (64, 2, 448, (1, 2), 2),
    ],
)
def test_a_size_without_memory_is_dropped_and_the_batch_becomes_smaller(
    encode: int, decode: int, side: int, sizes: tuple[int, ...], rows: int, fake_cuda: FakeCuda,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    engine = engine_with_graphs(Scarce(encode), Scarce(decode))
    with caplog.at_level(logging.WARNING, "dat_workers"):
        engine.warm_up(side)
    assert captured_sizes(engine._run_encode) == captured_sizes(engine._run_decode) == list(sizes)
    assert rows_at_once(engine, side * side) == rows
    lines = [record.getMessage() for record in caplog.records]
    dropped = [size for size in (64, 32, 16, 8, 4, 2) if rows < size <= 64 * 224 * 224 // side**2]
    assert [int(line.split(" images of ")[0].split()[-1]) for line in lines] == dropped
    assert all(f"images of {side} x {side} at once" in line for line in lines)
    assert all("CUDA out of memory" in line for line in lines)
    if lines:
        assert lines[-1].endswith(f"at most {rows} are computed at once")


def test_without_memory_for_one_image_the_error_says_so(fake_cuda: FakeCuda) -> None:
    engine = engine_with_graphs(Scarce(64), Scarce(0))
    with pytest.raises(OutOfMemory, match=r"one image of 224 x 224.*CUDA out of memory.*all,-graphs"):
        engine.warm_up(224)


def test_another_error_is_not_taken_for_a_lack_of_memory(fake_cuda: FakeCuda) -> None:
    engine = engine_with_graphs(Scarce(8, RuntimeError("CUDA error: misaligned address")), Scarce(64))
    with pytest.raises(RuntimeError, match="misaligned"):
        engine.warm_up(224)
