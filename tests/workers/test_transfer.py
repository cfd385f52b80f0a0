"""Arrays through a function on a device; the overlapped way needs CUDA and is tested in engines/test_cuda.py."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from dat_workers.transfer import through

CPU = torch.device("cpu")


def test_results_come_by_name_and_in_order() -> None:
    jobs = [{"x": np.full((2, 3), i, np.uint8), "y": np.full(2, i, np.float16)} for i in range(4)]

    def compute(given: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sum": given["x"].float() + given["y"].float()[:, None], "x": given["x"]}

    results = list(through(CPU, jobs, compute))
    assert [r["sum"].tolist() for r in results] == [[[2.0 * i] * 3] * 2 for i in range(4)]
    assert all(r["x"].dtype == np.uint8 and r["sum"].dtype == np.float32 for r in results)


def test_the_callers_array_is_neither_kept_nor_written() -> None:
    """A view of a request's body is read-only, and its buffer is used again."""
    given = np.arange(6, dtype=np.float32)[::-1]
    given.flags.writeable = False
    (result,) = through(CPU, [{"x": given}], lambda job: {"x": job["x"].mul_(0)})
    assert given.tolist() == [5, 4, 3, 2, 1, 0]
    assert not np.shares_memory(result["x"], given)


def test_jobs_are_taken_one_at_a_time() -> None:
    taken = []

    def jobs() -> object:
        for i in range(3):
            taken.append(i)
            yield {"x": np.zeros(1)}

    results = through(CPU, jobs(), lambda job: job)  # type: ignore[arg-type]
    next(results)
    assert taken == [0]


def test_an_error_comes_out_as_it_is() -> None:
    def compute(given: dict[str, Tensor]) -> dict[str, Tensor]:
        raise RuntimeError("no such kernel")

    with pytest.raises(RuntimeError, match="no such kernel"):
        list(through(CPU, [{"x": np.zeros(1)}], compute))
