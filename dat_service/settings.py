"""Everything that can be set about a running service: one frozen object from flags and DAT_* variables."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from dat_workers.engines.config import EngineConfig

MIB = 1024 * 1024
OTHER_VARIABLES = ("DAT_HOME",)  # where codecs are kept, dat_workers/codecs/store.py


class Settings(BaseSettings):
    """Settings of one service; every field is also a variable, `port` being DAT_PORT.

    >>> Settings(port=9000).port
    9000
    """

    model_config = SettingsConfigDict(env_prefix="DAT_", frozen=True, extra="forbid")

    codec: str = Field("tiny-f8", description="Codec to serve.")
    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 for all.")
    port: int = Field(8000, ge=1, le=65535, description="Port to listen on.")
    engine: Literal["auto", "torch", "cpu", "onnx", "reference"] = Field(
        "auto", description="How the codec is run: auto is torch on CUDA, cpu elsewhere."
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, ...")
    dtype: Literal["auto", "fp32", "tf32", "mixed", "fp16", "bf16"] = Field(
        "auto", description="auto is mixed on CUDA (encoder fp32, decoder fp16) and fp32 on a CPU."
    )
    tricks: str = Field("auto", description="What makes it fast, dat_workers/engines/tricks.py: all on CUDA.")
    threads: int = Field(0, ge=0, le=1024, description="CPU threads of the engine; 0 for all cores.")
    # absolute: it is read in other processes, and there are other working directories
    api_key_file: Annotated[Path, AfterValidator(Path.absolute)] | None = Field(
        None, description="File with one API key a line; none: no key asked."
    )
    max_body_bytes: int = Field(256 * MIB, ge=1024, description="Largest request body.")
    max_json_bytes: int = Field(2 * MIB, ge=1024, description="Largest JSON part, of a request or an answer.")
    max_images: int = Field(1024, ge=1, description="Most images in a request.")
    max_image_pixels: int = Field(2048 * 2048, ge=64, description="Most pixels of one image.")
    max_pixels: int = Field(64 * MIB, ge=64, description="Most pixels of all images in a request.")
    max_requests: int = Field(256, ge=1, description="Requests held at once; more get 503 with Retry-After.")
    max_held_bytes: int = Field(4096 * MIB, ge=1024, description="Bytes of all requests and answers held at once.")
    max_queue_s: float = Field(10.0, gt=0, description="Longest expected wait for the codec; more gets 503.")
    max_wait_ms: float | None = Field(
        None, ge=0, le=1000, description="How long a batch waits to be filled; none: 2 on CUDA, 0 on a CPU."
    )
    watchdog_s: float = Field(
        120.0, gt=0, description="A batch that takes longer has hung: the replica is replaced."
    )
    body_timeout_s: float = Field(15.0, gt=0, description="Longest silence within a body, or of a reader.")
    replicas: int = Field(1, ge=1, le=1024, description="Replicas of the codec, each with a copy of it.")
    autoscale: str | None = Field(
        None,
        pattern=r"^[0-9]+:[0-9]+$",
        description="MIN:MAX replicas, by images that wait; none: always `replicas`.",
    )
    gpus: float | None = Field(
        None, ge=0, le=64, description="GPUs of a replica, 0.5 for two on one; none: 1 where there is one."
    )
    log_format: Literal["text", "json"] = Field(
        "text", description="Log lines for people, or one JSON object each."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least level that is logged."
    )

    @model_validator(mode="after")
    def _check_bytes(self) -> Self:
        if self.max_held_bytes < 2 * self.max_body_bytes:
            raise ValueError(
                f"max_held_bytes is {self.max_held_bytes}, must be at least twice max_body_bytes "
                f"({self.max_body_bytes}): a request and its answer"
            )
        return self

    @property
    def engine_config(self) -> EngineConfig:
        """How the codec is run. Raises ValueError for values that do not go together."""
        return EngineConfig(self.engine, self.device, self.dtype, self.tricks, self.threads)


class SettingsError(ValueError):
    """A flag or DAT_* variable is not usable."""


def make_settings(**flags: Any) -> Settings:
    """Settings from flags (None: not given) over DAT_* variables over defaults. Raises SettingsError."""
    unknown = sorted(
        name
        for name in os.environ
        if name.startswith("DAT_") and name[4:].lower() not in Settings.model_fields and name not in OTHER_VARIABLES
    )
    if unknown:
        raise SettingsError(f"{', '.join(unknown)}: no such setting; see dat_service/settings.py for all")
    try:
        return Settings(**{name: value for name, value in flags.items() if value is not None})
    except ValidationError as error:
        lines = [f"{'.'.join(str(p) for p in e['loc'])}: {e['msg']} (got {e['input']!r})" for e in error.errors()]
        raise SettingsError("; ".join(lines)) from error
