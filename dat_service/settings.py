"""All settings of a service: one frozen object, filled from flags and DAT_* variables."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from dat_workers.engines.config import EngineConfig

MIB = 1024 * 1024
OTHER_VARIABLES = ("DAT_HOME",)  # the folder of installed codecs, dat_workers/codecs/store.py


class Settings(BaseSettings):
    """The settings of one service; every field is also an environment variable, for example `port` is DAT_PORT.

    >>> Settings(port=9000).port
    9000
    """

    model_config = SettingsConfigDict(env_prefix="DAT_", frozen=True, extra="forbid")

    codec: str = Field("tiny-f8", description="The codec to serve.")
    host: str = Field("127.0.0.1", description="The address to listen on; 0.0.0.0 for all.")
    port: int = Field(8000, ge=1, le=65535, description="The port to listen on.")
    engine: Literal["auto", "torch", "cpu", "onnx", "reference"] = Field(
        "auto", description="The engine that runs the codec; auto is torch on CUDA, cpu elsewhere."
    )
    device: str = Field("auto", description="The device: auto, cpu, cuda, cuda:1, ...")
    dtype: Literal["auto", "fp32", "tf32", "mixed", "fp16", "bf16"] = Field(
        "auto", description="The precision; auto is mixed on CUDA (encoder fp32, decoder fp16) and fp32 on a CPU."
    )
    tricks: str = Field("auto", description="Optimisations (engines/torch/tricks.py); auto is all on CUDA.")
    threads: int = Field(0, ge=0, le=1024, description="CPU threads of the engine; 0 for all cores.")
    # absolute, because replicas read it in other working directories
    api_key_file: Annotated[Path, AfterValidator(Path.absolute)] | None = Field(
        None, description="File with one API key per line; without it, no key is required."
    )
    max_body_bytes: int = Field(256 * MIB, ge=1024, description="Largest request body in bytes.")
    max_json_bytes: int = Field(2 * MIB, ge=1024, description="Most bytes of JSON in a request or response.")
    max_images: int = Field(1024, ge=1, description="Most images in a request.")
    max_image_pixels: int = Field(2048 * 2048, ge=64, description="Most pixels of one image.")
    max_pixels: int = Field(64 * MIB, ge=64, description="Most pixels of all images in a request.")
    max_requests: int = Field(256, ge=1, description="Most requests at once; more get 503 with Retry-After.")
    max_held_bytes: int = Field(4096 * MIB, ge=1024, description="Most bytes of requests and responses at once.")
    max_queue_s: float = Field(10.0, gt=0, description="Requests expected to wait longer get 503.")
    max_wait_ms: float | None = Field(
        None, ge=0, le=1000, description="Longest wait for a batch to fill up; by default 2 on CUDA, 0 on a CPU."
    )
    watchdog_s: float = Field(120.0, gt=0, description="A replica is replaced if a batch takes longer.")
    body_timeout_s: float = Field(15.0, gt=0, description="Longest pause within a body or while reading.")
    replicas: int = Field(1, ge=1, le=1024, description="Number of replicas, each with a copy of the codec.")
    autoscale: str | None = Field(
        None, pattern=r"^[0-9]+:[0-9]+$", description="MIN:MAX replicas, by the number of waiting images."
    )
    gpus: float | None = Field(None, ge=0, le=64, description="GPUs per replica; by default 1 if there is one.")
    log_format: Literal["text", "json"] = Field("text", description="Log lines as text or as JSON objects.")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="The lowest level that is logged."
    )

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
