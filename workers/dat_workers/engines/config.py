"""Names, defaults and checks of the settings that choose an engine and how it runs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal, get_args

from dat_workers.engines.torch.tricks import Tricks

EngineName = Literal["auto", "torch", "cpu", "onnx", "reference"]
EngineDtype = Literal["auto", "fp32", "tf32", "mixed", "fp16", "bf16"]  # mixed: encoder in fp32, decoder in fp16
ENGINES: tuple[str, ...] = get_args(EngineName)
ENGINE_DTYPES: tuple[str, ...] = get_args(EngineDtype)
FP32_ENGINES = ("cpu", "onnx", "reference")  # engines that have no precision but fp32, and no tricks


@dataclass(frozen=True)
class EngineConfig:
    """Chooses the engine that runs a codec, its device, its precision and its optimisations.

    >>> EngineConfig("torch", device="cuda", tricks="all,-graphs")
    EngineConfig(engine='torch', device='cuda', dtype='auto', tricks='all,-graphs', threads=0, gpu_share=1.0)

    engine: one of `ENGINES`; `auto` is `torch` on CUDA and `cpu` elsewhere. device: auto, cpu, cuda or cuda:N.
    dtype: one of `ENGINE_DTYPES`. tricks: the optimisations of the torch engine, as `Tricks.parse` reads them.
    threads: CPU threads of the engine, 0 for all cores that this process may use. gpu_share: the share of the GPU's
    memory that this process may use; the batches of the torch engine fit it. Raises ValueError for an unknown
    engine or dtype, for negative threads, for a share outside 0 to 1, and for tricks with an engine that has none.
    The device is not checked until the engine is created.
    """

    engine: str = "auto"
    device: str = "auto"
    dtype: str = "auto"
    tricks: str = "auto"
    threads: int = 0
    gpu_share: float = 1.0

    def __post_init__(self) -> None:
        if self.engine not in ENGINES:
            raise ValueError(f"engine is {self.engine!r}, but must be one of {ENGINES}")
        if self.dtype not in ENGINE_DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}, but must be one of {ENGINE_DTYPES}")
        if self.threads < 0:
            raise ValueError(f"threads is {self.threads}, but must be 0 (all cores) or more")
        if not 0 < self.gpu_share <= 1:
            raise ValueError(f"gpu_share is {self.gpu_share}, but must be above 0 and at most 1")
        Tricks.parse(self.tricks, cuda=False)
        if self.engine in FP32_ENGINES and self.tricks not in ("auto", "none"):
            raise ValueError(
                f"tricks is {self.tricks!r}, but the engine {self.engine!r} has no tricks; use --tricks auto or "
                "--engine torch"
            )

    @property
    def cpu_threads(self) -> int:
        """The number of CPU threads to use: `threads`, or the number of available cores if that is 0."""
        return self.threads or len(os.sched_getaffinity(0))


DEFAULT_ENGINE = EngineConfig()
