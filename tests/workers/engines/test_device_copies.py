"""Batches on a device; that overlapped copies mix nothing up needs CUDA and is tested in torch/test_cuda.py."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from dat_workers.engines import device_copies
from dat_workers.engines.device_copies import DeviceBatch, run_on_device
from tests.workers.engines.torch.fake_cuda import FakeCuda

CPU = torch.device("cpu")


def test_results_come_by_name_and_in_order() -> None:

    def compute(given: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sum": given["x"].float() + given["y"].float()[:, None], "x": given["x"]}

    arrays = [{"x": [np.full((2, 3), i, np.uint8)], "y": [np.full(2, i, np.float16)]} for i in range(4)]
    results = list(run_on_device(CPU, [DeviceBatch(a, compute) for a in arrays]))
    assert [r["sum"].tolist() for r in results] == [[[2.0 * i] * 3] * 2 for i in range(4)]
    assert all(r["x"].dtype == np.uint8 and r["sum"].dtype == np.float32 for r in results)


def test_parts_are_joined_and_no_job_gives_nothing() -> None:
    parts = [np.full((rows, 2), rows, np.float32) for rows in (1, 3)]
    (result,) = run_on_device(CPU, [None, DeviceBatch({"x": parts}, lambda given: given), None])
    assert result["x"][:, 0].tolist() == [1, 3, 3, 3]


def test_the_callers_array_is_neither_kept_nor_written() -> None:
    """A view of a request's body is read-only, and its buffer is used again."""
    given = np.arange(6, dtype=np.float32)[::-1]
    given.flags.writeable = False
    (result,) = run_on_device(CPU, [DeviceBatch({"x": [given]}, lambda job: {"x": job["x"].mul_(0)})])
    assert given.tolist() == [5, 4, 3, 2, 1, 0]
    assert not np.shares_memory(result["x"], given)


def test_jobs_are_taken_one_at_a_time() -> None:
    taken = []

    def jobs() -> object:
        for i in range(3):
            taken.append(i)
            yield DeviceBatch({"x": [np.zeros(1)]}, lambda given: given)

    results = run_on_device(CPU, jobs())  # type: ignore[arg-type]
    next(results)
    assert taken == [0]


def test_an_error_comes_out_as_it_is() -> None:
    def compute(given: dict[str, Tensor]) -> dict[str, Tensor]:
        raise RuntimeError("no such kernel")

    with pytest.raises(RuntimeError, match="no such kernel"):
        list(run_on_device(CPU, [DeviceBatch({"x": [np.zeros(1)]}, compute)]))


def test_pinned_memory_and_waiting_belong_to_the_device_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """On cuda:1, pinned memory that is taken while cuda:0 is current would open a context there."""
    cuda = FakeCuda(monkeypatch)
    pinned_on: list[int] = []
    waits: list[bool] = []

    def pinned_empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        pinned_on.append(cuda.current_device)
        return torch.empty(tuple(shape), dtype=dtype)

    def event(**options: bool) -> SimpleNamespace:
        return SimpleNamespace(record=lambda stream: None, synchronize=lambda: waits.append(options["blocking"]))

    monkeypatch.setattr(device_copies, "pinned_empty", pinned_empty)
    monkeypatch.setattr(torch.cuda, "Event", event)
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: None)
    to = Tensor.to
    monkeypatch.setattr(Tensor, "to", lambda tensor, device, non_blocking: to(tensor, "cpu"))
    device_copies.copy_streams.cache_clear()
    batches = [DeviceBatch({"x": [np.full(2, i)]}, lambda given: {"y": given["x"] + 1}) for i in range(3)]
    results = []
    for result in run_on_device(torch.device("cuda:1"), [*batches, None], overlap=True):
        assert cuda.current_device == 0  # the consumer's
        results.append(result["y"].tolist())
    assert results == [[1, 1], [2, 2], [3, 3]]
    assert pinned_on == [1] * 6  # an input and a result of each batch
    assert waits == [True] * 3
    device_copies.copy_streams.cache_clear()
