"""Defines all settings of a service as one frozen object, which takes its values from flags and DAT_* variables."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from dat_workers.engines.config import EngineConfig, EngineDtype, EngineName

MIB = 1024 * 1024
OTHER_VARIABLES = ("DAT_HOME",)  # DAT_HOME is the folder of installed codecs; dat_workers/codecs/store.py reads it


class Settings(BaseSettings):
    """The settings of one service; every field is also an environment variable, for example `port` is DAT_PORT.

    >>> Settings(port=9000).port
    9000
    """

    model_config = SettingsConfigDict(env_prefix="DAT_", frozen=True, extra="forbid")

    codec: str = Field("tiny-f8", description="Name of the codec to serve.")
    host: str = Field("127.0.0.1", description="Address to listen on; 0.0.0.0 means all addresses.")
    port: int = Field(8000, ge=1, le=65535, description="Port to listen on.")
    engine: EngineName = Field(
        "auto", description="Engine: auto (torch on CUDA, cpu elsewhere), torch, cpu, onnx or reference."
    )
    device: str = Field("auto", description="Device: auto (CUDA if there is a GPU), cpu, cuda or cuda:N.")
    dtype: EngineDtype = Field(
        "auto",
        description="Dtype of the codec: fp32, tf32, fp16, bf16, mixed (encoder in fp32, decoder in fp16), or auto "
        "(mixed on CUDA, fp32 elsewhere).",
    )
    tricks: str = Field(
        "auto", description="Optimisations: auto (all on CUDA, none elsewhere), all, none, or e.g. all,-graphs."
    )
    threads: int = Field(0, ge=0, le=1024, description="CPU threads of the engine; 0 means one for each core.")
    # The path is made absolute, because replicas have different working directories.
    api_key_file: Annotated[Path, AfterValidator(Path.absolute)] | None = Field(
        None, description="File with one API key per line.  [default: no API key is required]"
    )
    max_body_bytes: int = Field(256 * MIB, ge=1024, description="Largest size of a request body, in bytes.")
    max_json_bytes: int = Field(2 * MIB, ge=1024, description="Largest JSON in a request or response, in bytes.")
    max_images: int = Field(1024, ge=1, description="Largest number of images in a request.")
    max_image_pixels: int = Field(2048 * 2048, ge=64, description="Largest number of pixels in one image.")
    max_pixels: int = Field(64 * MIB, ge=64, description="Largest number of pixels in a request.")
    max_requests: int = Field(
        256, ge=1, description="Largest number of requests at once in a replica; more get 503."
    )
    max_held_bytes: int = Field(
        4096 * MIB, ge=1024, description="Largest size of all requests and responses in a replica, in bytes."
    )
    max_queue_s: float = Field(
        10.0, gt=0, description="A request that would probably wait longer than this many seconds gets 503."
    )
    max_wait_ms: float | None = Field(
        None,
        ge=0,
        le=1000,
        description="Milliseconds a batch waits for more images.  [default: 2 on CUDA, else 0]",
    )
    watchdog_s: float = Field(
        120.0, gt=0, description="Replace a replica if one batch takes longer than this, in seconds."
    )
    body_timeout_s: float = Field(
        15.0, gt=0, description="Longest pause of a client while it sends or reads, in seconds."
    )
    min_body_rate: int = Field(
        50_000,
        ge=1,
        description="Fewest bytes per second of a client that sends or reads, after the pause that it may make.",
    )
    replicas: int = Field(1, ge=1, le=1024, description="Replicas of each codec; each loads its own copy.")
    autoscale: str | None = Field(
        None,
        pattern=r"^[0-9]+:[0-9]+$",
        description="Run MIN to MAX replicas, depending on how many images wait.  [default: --replicas]",
    )
    gpus: float | None = Field(
        None,
        ge=0,
        le=64,
        description="GPUs for each replica; with 0.5, two share one GPU.  [default: 1 if present]",
    )
    log_format: Literal["text", "json"] = Field("text", description="Log lines as text or as JSON objects.")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Lowest level that is logged."
    )

    @model_validator(mode="after")
    def _check_bytes(self) -> Self:
        if self.max_held_bytes < 2 * self.max_body_bytes:
            raise ValueError(
                f"max_held_bytes is {self.max_held_bytes}, but it must be at least twice max_body_bytes "
                f"({self.max_body_bytes}), so that one request and its response fit"
            )
        return self

    @property
    def engine_config(self) -> EngineConfig:
        """The engine's part of the settings. Raises ValueError if two of its values contradict each other."""
        share = self.gpus if self.gpus and self.gpus < 1 else 1.0
        return EngineConfig(self.engine, self.device, self.dtype, self.tricks, self.threads, share)


class SettingsError(ValueError):
    """A flag or a DAT_* variable has an unusable value, or a DAT_* variable is unknown."""


def make_settings(**flags: Any) -> Settings:
    """Returns the settings of a service.

    Each value comes from its flag if that is not None, else from its DAT_* variable if that is set, else from the
    default. Raises SettingsError for an unusable value and for an unknown DAT_* variable.
    """
    unknown = sorted(
        name
        for name in os.environ
        if name.startswith("DAT_") and name[4:].lower() not in Settings.model_fields and name not in OTHER_VARIABLES
    )
    if unknown:
        raise SettingsError(
            f"{', '.join(unknown)}: no setting has this name; dat_service/settings.py lists all settings"
        )
    try:
        return Settings(**{name: value for name, value in flags.items() if value is not None})
    except ValidationError as error:
        lines = [f"{'.'.join(str(p) for p in e['loc'])}: {e['msg']} (got {e['input']!r})" for e in error.errors()]
        raise SettingsError("; ".join(lines)) from error
