"""A lack of memory, a lost device and other errors, by the messages of CUDA's libraries."""

from __future__ import annotations

import pytest
import torch

from dat_workers.engines.device_errors import is_device_lost, is_out_of_memory, ran_out_of_memory
from dat_workers.errors import OutOfMemory

LOST = [
    "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be asynchronously reported",
    "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm( handle, opa, opb, m, n, k)`",
    "CUDA driver error: unknown error",
    "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED",
    "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED_CUDART",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR",
    "cuDNN error: CUDNN_STATUS_MAPPING_ERROR",
    "Triton Error [CUDA]: an illegal memory access was encountered",
    "Triton Error [CUDA]: misaligned address",
    "[ONNXRuntimeError] : 1 : FAIL : CUDA failure 700: an illegal memory access was encountered ; GPU=0",
    "[ONNXRuntimeError] : 1 : FAIL : CUDNN failure 8: CUDNN_STATUS_EXECUTION_FAILED ; GPU=0",
    "[ONNXRuntimeError] : 1 : FAIL : CUBLAS failure 13: CUBLAS_STATUS_EXECUTION_FAILED ; GPU=0",
]
NO_MEMORY = [
    "CUDA out of memory. Tried to allocate 2.00 GiB",
    "CUDA error: out of memory",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "Triton Error [CUDA]: out of memory",
    "CUDA failure 2: out of memory ; GPU=0",
]
OTHER = [
    "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED",
    "cuDNN error: CUDNN_STATUS_BAD_PARAM",
    "out of resource: shared memory, Required: 262144, Hardware limit: 232448",
    "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!",
]


@pytest.mark.parametrize("message", LOST)
def test_lost(message: str) -> None:
    assert is_device_lost(RuntimeError(message))
    assert not is_out_of_memory(RuntimeError(message))


@pytest.mark.parametrize("message", NO_MEMORY)
def test_no_memory(message: str) -> None:
    assert is_out_of_memory(RuntimeError(message))
    assert not is_device_lost(RuntimeError(message))


@pytest.mark.parametrize("message", OTHER)
def test_neither(message: str) -> None:
    assert not is_out_of_memory(RuntimeError(message))
    assert not is_device_lost(RuntimeError(message))


def test_a_lack_of_memory_behind_a_second_error() -> None:
    second = RuntimeError("CUDA error: operation failed due to a previous error during capture")
    second.__context__ = torch.OutOfMemoryError("CUDA out of memory")
    assert is_device_lost(second)
    assert ran_out_of_memory(second)
    assert ran_out_of_memory(OutOfMemory("half of the batch"))
    assert not ran_out_of_memory(RuntimeError("CUDA error: unspecified launch failure"))
