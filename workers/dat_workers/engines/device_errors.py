"""Tells a lack of memory and a lost device from other errors, by the texts of CUDA's libraries."""

from __future__ import annotations

import gc

import torch

from dat_workers.errors import OutOfMemory

# Errors are recognised by their text, because ONNX Runtime's and Triton's exceptions have types of their own. "CUDA
# error" begins PyTorch's messages, "CUDA failure" those of ONNX Runtime, "Triton Error [CUDA]" those of a kernel's
# launch. A status of cuDNN or cuBLAS that is not listed, such as NOT_SUPPORTED, concerns a single call.
DEVICE_LOST = (
    "CUDA error",
    "CUDA driver error",
    "CUDA failure",
    "Triton Error [CUDA]",
    *(
        f"{library}_STATUS_{status}"
        for library in ("CUBLAS", "CUDNN")
        for status in ("EXECUTION_FAILED", "INTERNAL_ERROR", "MAPPING_ERROR", "NOT_INITIALIZED")
    ),
)
NO_MEMORY = (
    "out of memory",
    "can't allocate memory",
    "Failed to allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
)


def is_device_lost(error: object) -> bool:
    """Returns True if the device cannot be used again: CUDA errors are permanent, but a lack of memory is not."""
    if not isinstance(error, Exception) or is_out_of_memory(error):
        return False
    accelerator_error = getattr(torch, "AcceleratorError", ())
    return isinstance(error, accelerator_error) or any(text in str(error) for text in DEVICE_LOST)


def is_out_of_memory(error: BaseException) -> bool:
    """Returns True if the error says that the GPU or the host ran out of memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError | OutOfMemory):
        return True
    return any(text in str(error) for text in NO_MEMORY)


def ran_out_of_memory(error: BaseException) -> bool:
    """Returns True if the error, or an error during whose handling it was raised, is a lack of memory.

    The capture of a CUDA graph that ran out of memory may fail once more when it is ended.
    """
    chain: BaseException | None = error
    while chain is not None:
        if is_out_of_memory(chain):
            return True
        chain = chain.__cause__ or chain.__context__
    return False


def free_cached_memory() -> None:
    """Returns the memory of objects that are no longer used to the GPU, such as the graphs of a dropped engine."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
