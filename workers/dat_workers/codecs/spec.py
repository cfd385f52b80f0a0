"""Describes a codec apart from its weights: geometry, source and licence."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from dat_client.errors import shown

ARCHITECTURES = ("vqgan", "identity")

# The limits of a geometry. Without them, a file of a few bytes could describe a network that no memory holds.
LIMITS = {
    "ch": (1, 4096),
    "num_res_blocks": (1, 64),
    "resolution": (1, 65536),
    "z_channels": (1, 4096),
    "codebook_size": (2, 65536),  # indices are uint16, and a single entry would make every picture the same
    "latent_dim": (1, 4096),
}
MOST_LEVELS = 12


class CodecError(ValueError):
    """A codec's description, file or weights are invalid."""


@dataclass(frozen=True)
class CodecSpec:
    """Describes one codec of the registry, or one that a user imported.

    >>> CodecSpec("toy", ch=32, ch_mult=(1, 1), codebook_size=256, latent_dim=4).factor
    2

    The network's fields have the names of the published configuration files (taming-transformers,
    latent-diffusion), so that an entry can be compared with its source. Raises CodecError for values from which no
    network can be built.
    """

    name: str
    architecture: str = "vqgan"
    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 2, 4)
    num_res_blocks: int = 2
    attn_resolutions: tuple[int, ...] = ()
    resolution: int = 256  # side of the training images in pixels; level i has resolution / 2^i
    z_channels: int = 4
    codebook_size: int = 0  # K
    latent_dim: int = 0  # d, the size of one codebook vector ("embed_dim" in the published files)
    source_url: str | None = None
    source_member: str | None = None  # the checkpoint's name inside a zip
    licence: str = "unknown"
    summary: str = ""

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            raise CodecError(
                f"codec {self.name!r}: architecture is {self.architecture!r}, but must be one of {ARCHITECTURES}"
            )
        if self.architecture == "identity":
            return
        for field, (low, high) in LIMITS.items():
            value = getattr(self, field)
            if type(value) is not int or not low <= value <= high:
                raise CodecError(
                    f"codec {self.name!r}: {field} is {shown(value)}, "
                    f"but must be a whole number from {low} to {high}"
                )
        low, high = 1, LIMITS["ch"][1]
        if not 1 <= len(self.ch_mult) <= MOST_LEVELS or any(
            type(m) is not int or not low <= m <= high for m in self.ch_mult
        ):
            raise CodecError(
                f"codec {self.name!r}: ch_mult is {shown(self.ch_mult)}, but must hold 1 to {MOST_LEVELS} whole "
                f"numbers from {low} to {high}"
            )
        if any(self.ch * m % 32 for m in (1, *self.ch_mult)):
            raise CodecError(
                f"codec {self.name!r}: ch={self.ch} with ch_mult={self.ch_mult} gives numbers of channels that are "
                "not multiples of 32, the number of groups of every GroupNorm; choose ch as a multiple of 32"
            )

    @property
    def factor(self) -> int:
        """The factor f: one latent vector stands for a square of f x f pixels."""
        return 1 if self.architecture == "identity" else 2 ** (len(self.ch_mult) - 1)

    @property
    def has_tokens(self) -> bool:
        """True if the codec has a codebook (`identity` has none)."""
        return self.codebook_size > 0

    @property
    def widths(self) -> list[int]:
        """The number of channels of each level, from the highest resolution to the lowest."""
        return [self.ch * m for m in self.ch_mult]

    @property
    def attention_levels(self) -> list[int]:
        """The numbers of the levels whose blocks are followed by attention; level i works at resolution / 2^i."""
        return [i for i in range(len(self.ch_mult)) if self.resolution >> i in self.attn_resolutions]

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields as plain JSON types; `from_dict` is the inverse."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CodecSpec:
        """Builds a spec from the result of `to_dict`.

        Raises CodecError for a field that is unknown or of the wrong type.
        """
        unknown = sorted(set(values) - set(cls.__dataclass_fields__))
        if unknown:
            raise CodecError(
                f"the codec description has unknown fields {unknown}; was it written by a different version of "
                "dat-service?"
            )
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        try:
            return cls(**fields)
        except TypeError as error:
            raise CodecError(f"the codec description is invalid: {error}") from error
