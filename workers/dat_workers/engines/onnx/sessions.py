"""Opens ONNX graphs in ONNX Runtime and runs them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TENSORRT, CUDA, CPU = PROVIDERS = ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider")


def require_packages(*packages: str) -> None:
    """Raises RuntimeError, which names the pip command to run, if one of the packages cannot be imported."""
    for package in packages:
        try:
            __import__(package)
        except ImportError as error:
            raise RuntimeError(
                f"ONNX needs the package {package} ({error}); run: pip install 'dat-service[onnx]'"
            ) from error


def pick_providers(device: str) -> list[str]:
    """Returns the members of `PROVIDERS` that ONNX Runtime has and that run on `device`, fastest first.

    Raises ValueError if none of them runs on `device`.
    """
    import onnxruntime

    available = [name for name in PROVIDERS if name in onnxruntime.get_available_providers()]
    if device == "cpu":
        return [CPU]
    if device == "auto":
        return available
    if device.split(":")[0] != "cuda":
        raise ValueError(f"device is {device!r}, but must be auto, cpu, cuda or cuda:N for the engine 'onnx'")
    if len(available) == 1:
        raise ValueError(
            f"device is {device!r}, but this ONNX Runtime has only {', '.join(available)}. On a GPU machine run: "
            "pip uninstall onnxruntime && pip install 'dat-service[onnx-gpu]'"
        )
    return available


def open_session(graph: Path | bytes, providers: list[str]) -> Any:
    """Opens a graph, given as a file or as bytes, in a session with the first of `providers` that starts."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Threads that spin between calls would take the cores from PyTorch's threads, which work in between.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3  # errors
    settings: dict[str, dict[str, str]] = {CUDA: {"use_tf32": "0"}}  # TF32's 10 bits of mantissa are too few for δ
    if TENSORRT in providers:
        os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")  # TensorRT's provider has no option for TF32
    if isinstance(graph, Path):
        settings[TENSORRT] = {"trt_engine_cache_enable": "1", "trt_engine_cache_path": str(graph.parent)}
    return onnxruntime.InferenceSession(
        graph if isinstance(graph, bytes) else str(graph),
        options,
        providers=[(name, settings.get(name, {})) for name in providers],
    )


def run(session: Any, value: Tensor) -> Tensor:
    """Runs a graph that has one input and one output, and returns the output."""
    output = session.run(None, {session.get_inputs()[0].name: value.contiguous().numpy()})[0]
    return torch.from_numpy(output)
