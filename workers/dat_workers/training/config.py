"""The settings of a codec's training run."""

from __future__ import annotations

import posixpath
from dataclasses import dataclass, fields
from pathlib import Path

from dat_workers.codecs.file import geometry
from dat_workers.codecs.spec import CodecSpec


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a training run; when a run is resumed, the settings of `frozen_part` must be the same.

    Fields named `*_start` are shares of the run, 0..1. Raises ValueError for a value out of range and for a source
    that does not exist.
    """

    spec: CodecSpec
    sources: tuple[str | Path, ...]
    out: Path
    steps: int = 10_000
    batch: int = 32
    crop: int = 64  # pixels a side
    learning_rate: float = 5e-4
    codebook_start: float = 0.05  # before it, a plain autoencoder is trained, so that k-means gets stable latents
    discriminator_start: float = 0.85
    discriminator_weight: float = 0.1
    perceptual: str = "structure"  # or "lpips"
    perceptual_weight: float = 0.02
    commitment_weight: float = 0.25  # β of Eq. 8
    ema_decay: float = 0.999  # of the averaged weights, which become the codec
    pool: int = 2000  # decoded pictures held in memory
    validation: tuple[str | Path, ...] = ()
    validation_crop: int = 224
    init: Path | None = None  # codec file of the same geometry to start from; its codebook is used from the start
    seed: int = 0
    device: str = "cpu"
    skip: bool = False  # leave out pictures that are not usable
    upright: bool = False  # turn pictures by their EXIF orientation

    def __post_init__(self) -> None:
        f = self.spec.factor
        if self.crop % f or self.crop < 4 * f:
            raise ValueError(f"crop is {self.crop}, but must be a multiple of {f} and at least {4 * f}")
        for name in ("steps", "batch", "pool"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be at least 1")
        if not 0 <= self.codebook_start <= self.discriminator_start or self.codebook_start >= 1:
            raise ValueError(
                f"codebook_start is {self.codebook_start} and discriminator_start is {self.discriminator_start}: "
                "the codebook must start before the end of the run (1), and not after the discriminator"
            )
        if self.perceptual not in ("structure", "lpips"):
            raise ValueError(f"perceptual is {self.perceptual!r}, but must be 'structure' or 'lpips'")
        if self.init and not self.init.exists():
            raise ValueError(f"{self.init}: no such file")
        if not self.sources:
            raise ValueError("no shards or folders to train on: name at least one")

    def frozen_part(self) -> dict[str, object]:
        """Returns the settings that must be the same in the checkpoint from which a run continues."""
        free = set() if self.upright else {"upright"}  # so that it equals one from before the field existed
        free |= {"spec", "sources", "out", "init", "validation", "validation_crop", "device", "skip"}
        fixed = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in free}
        return {
            "geometry": geometry(self.spec),
            "sources": [posixpath.basename(str(source).rstrip("/")) for source in self.sources],
            "init": str(self.init),
            **fixed,
        }
