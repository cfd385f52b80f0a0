"""All settings of a service: one frozen object, filled from flags and DAT_* variables."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from dat_workers.engines.config import EngineConfig, EngineDtype, EngineName

MIB = 1024 * 1024
OTHER_VARIABLES = ("DAT_HOME",)  # the folder of installed codecs, dat_workers/codecs/store.py


class Settings(BaseSettings):
    """The settings of one service; every field is also an environment variable, for example `port` is DAT_PORT.

    >>> Settings(port=9000).port
    9000
    """

    model_config = SettingsConfigDict(env_prefix="DAT_", frozen=True, extra="forbid")

    codec: str = Field("tiny-f8", description="Codec to serve.")
    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 for all.")
    port: int = Field(8000, ge=1, le=65535, description="Port to listen on.")
    engine: EngineName = Field(
        "auto", description="Engine: auto (torch on CUDA, cpu elsewhere), torch, cpu, onnx or reference."
    )
    device: str = Field("auto", description="Device: auto (CUDA if there is a GPU), cpu, cuda or cuda:N.")
    dtype: EngineDtype = Field(
        "auto", description="fp32, tf32, mixed (decoder fp16), fp16, bf16 or auto (mixed on CUDA, fp32 elsewhere)."
    )
    tricks: str = Field(
        "auto", description="Optimisations: auto (all on CUDA, none elsewhere), all, none, or e.g. all,-graphs."
    )
    threads: int = Field(0, ge=0, le=1024, description="CPU threads of the engine; 0 for all cores.")
    # absolute, because replicas read it in other working directories
    api_key_file: Annotated[Path, AfterValidator(Path.absolute)] | None = Field(
        None, description="File with one API key per line. [default: no key required]"
    )
    max_body_bytes: int = Field(256 * MIB, ge=1024, description="Largest request body in bytes.")
    max_json_bytes: int = Field(2 * MIB, ge=1024, description="Most bytes of JSON in a request or response.")
    max_images: int = Field(1024, ge=1, description="Most images in a request.")
    max_image_pixels: int = Field(2048 * 2048, ge=64, description="Most pixels of one image.")
    max_pixels: int = Field(64 * MIB, ge=64, description="Most pixels of all images in a request.")
    max_requests: int = Field(256, ge=1, description="Most requests at once in a replica; more get 503.")
    max_held_bytes: int = Field(4096 * MIB, ge=1024, description="Most bytes of requests and responses at once.")
    max_queue_s: float = Field(10.0, gt=0, description="Requests expected to wait more seconds than this get 503.")
    max_wait_ms: float | None = Field(
        None, ge=0, le=1000, description="Milliseconds a batch waits to fill up. [default: 2 on CUDA, else 0]"
    )
    watchdog_s: float = Field(120.0, gt=0, description="A replica whose batch takes more seconds is replaced.")
    body_timeout_s: float = Field(15.0, gt=0, description="Longest pause while sending or reading, in seconds.")
    replicas: int = Field(1, ge=1, le=1024, description="Replicas of each codec, each with a copy of it.")
    autoscale: str | None = Field(
        None, pattern=r"^[0-9]+:[0-9]+$", description="MIN:MAX replicas, by the number of waiting images."
    )
    gpus: float | None = Field(
        None, ge=0, le=64, description="GPUs per replica; with 0.5, two share one. [default: 1 if present]"
    )
    log_format: Literal["text", "json"] = Field("text", description="Log lines as text or as JSON objects.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="Lowest level logged.")

    @model_validator(mode="after")
    def _check_bytes(self) -> Self:
        if self.max_held_bytes < 2 * self.max_body_bytes:
            raise ValueError(
                f"max_held_bytes is {self.max_held_bytes}, must be at least twice max_body_bytes "
                f"({self.max_body_bytes}), for one request and its response"
            )
        return self

    @property
    def engine_config(self) -> EngineConfig:
        """The settings of the engine. Raises ValueError for values that contradict each other."""
        return EngineConfig(self.engine, self.device, self.dtype, self.tricks, self.threads)


class SettingsError(ValueError):
    """A flag or a DAT_* variable is unusable."""


def make_settings(**flags: Any) -> Settings:
    """Returns the settings: flags that are not None, then DAT_* variables, then defaults. Raises SettingsError."""
    unknown = sorted(
        name
        for name in os.environ
        if name.startswith("DAT_") and name[4:].lower() not in Settings.model_fields and name not in OTHER_VARIABLES
    )
    if unknown:
        raise SettingsError(f"{', '.join(unknown)}: no such setting; dat_service/settings.py lists all")
    try:
        return Settings(**{name: value for name, value in flags.items() if value is not None})
    except ValidationError as error:
        lines = [f"{'.'.join(str(p) for p in e['loc'])}: {e['msg']} (got {e['input']!r})" for e in error.errors()]
        raise SettingsError("; ".join(lines)) from error
