"""Creates the engine that a configuration names."""

from __future__ import annotations

import torch

from dat_workers.codecs.networks.vqgan import VQGAN
from dat_workers.engines.base import Engine
from dat_workers.engines.config import ENGINE_DTYPES, FP32_ENGINES, EngineConfig
from dat_workers.engines.torch.precision import fix_arithmetic


def engine_dtype_pairs(cuda: bool) -> list[tuple[str, str]]:
    """Returns every (engine, dtype) that can run on CUDA, or on a CPU if `cuda` is False, except the reference."""
    dtypes = [dtype for dtype in ENGINE_DTYPES if dtype != "auto" and (cuda or dtype != "tf32")]
    return [*(("torch", dtype) for dtype in dtypes), *([] if cuda else [("cpu", "fp32")]), ("onnx", "fp32")]


def pick_device(device: str) -> torch.device:
    """Returns the device of that name; `auto` is CUDA if there is a GPU. Raises ValueError if there is none."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        picked = torch.device(device)
        torch.empty(0, device=picked)
        if picked.type not in ("cpu", "cuda"):
            raise RuntimeError("must be auto, cpu, cuda or cuda:N")
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device is {device!r}: {str(error).splitlines()[0]}") from error
    return picked


def check_config(config: EngineConfig) -> str:
    """Returns the name of the engine that the configuration stands for, without loading a codec.

    Raises ValueError for a device that does not exist and for settings that exclude each other. The devices of the
    engine `onnx` are those of ONNX Runtime; they are checked when it is created.
    """
    name, dtype = config.engine, config.dtype
    device = pick_device("cpu" if name == "onnx" else config.device)
    if name == "auto":
        simple = dtype in ("auto", "fp32") and config.tricks in ("auto", "none")
        name = "cpu" if device.type == "cpu" and simple else "torch"
    if name in FP32_ENGINES and dtype not in ("auto", "fp32"):
        raise ValueError(f"dtype is {dtype!r}, but must be auto or fp32 for the engine {name!r}")
    if name == "cpu" and device.type != "cpu":
        raise ValueError(f"device is {str(device)!r}, but the engine 'cpu' runs only on a CPU; on CUDA use 'torch'")
    if dtype == "tf32" and device.type != "cuda":
        raise ValueError(f"dtype is 'tf32', which needs CUDA, but device is {str(device)!r}")
    return name


def create(config: EngineConfig, model: VQGAN) -> Engine:
    """Creates the configured engine for `model`; `auto` is the fastest engine that needs no optional package.

    >>> create(EngineConfig(device="cpu"), model).name  # doctest: +SKIP
    'cpu'

    PyTorch's number of threads is not changed, because it applies to the whole process. Raises ValueError for a
    device that does not exist and for settings that exclude each other, and RuntimeError if a package is missing.
    """
    fix_arithmetic()
    name = check_config(config)
    if name == "onnx":
        from dat_workers.engines.onnx.engine import OnnxEngine

        return OnnxEngine(model, config.device)
    device = pick_device(config.device)
    if name == "cpu":
        from dat_workers.engines.cpu.engine import CpuEngine

        return CpuEngine(model, device)
    if name == "reference":
        from dat_workers.engines.reference import ReferenceEngine

        return ReferenceEngine(model, device)
    from dat_workers.engines.torch.engine import TorchEngine

    return TorchEngine(model, device, config.dtype, config.tricks, config.gpu_share)
