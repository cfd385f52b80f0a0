"""What a codec is, apart from its weights: geometry, source and licence."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

ARCHITECTURES = ("vqgan", "identity")


class CodecError(ValueError):
    """A codec's description, file or weights are not what they must be."""


@dataclass(frozen=True)
class CodecSpec:
    """One codec of the registry, or one imported by a user.

    >>> CodecSpec("toy", ch=32, ch_mult=(1, 1), codebook_size=256, latent_dim=4).factor
    2

    Field names of the network are those of the published configuration files (taming-transformers,
    latent-diffusion), so that an entry can be read beside its source.
    """

    name: str
    architecture: str = "vqgan"
    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 2, 4)
    num_res_blocks: int = 2
    attn_resolutions: tuple[int, ...] = ()
    resolution: int = 256  # the side the network was trained at; places attn_resolutions among the levels
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
                f"codec {self.name!r}: architecture {self.architecture!r} is not one of {ARCHITECTURES}"
            )
        if self.architecture == "identity":
            return
        for field in ("ch", "num_res_blocks", "resolution", "z_channels", "codebook_size", "latent_dim"):
            value = getattr(self, field)
            if not isinstance(value, int) or value < 1:
                raise CodecError(f"codec {self.name!r}: {field} is {value!r}, must be a positive whole number")
        if not self.ch_mult or any(m < 1 for m in self.ch_mult):
            raise CodecError(f"codec {self.name!r}: ch_mult is {self.ch_mult!r}, must hold positive numbers")
        if any(self.ch * m % 32 for m in (1, *self.ch_mult)):
            raise CodecError(
                f"codec {self.name!r}: ch={self.ch} with ch_mult={self.ch_mult} gives channels that are no "
                "multiple of 32, the number of groups of every GroupNorm"
            )
        if self.codebook_size > 65536:
            raise CodecError(
                f"codec {self.name!r}: codebook_size is {self.codebook_size}, at most 65536 fit uint16 indices"
            )

    @property
    def factor(self) -> int:
        """f: pixels a side that one latent vector stands for."""
        return 1 if self.architecture == "identity" else 2 ** (len(self.ch_mult) - 1)

    @property
    def has_tokens(self) -> bool:
        """Whether the codec has a codebook (`identity` has none)."""
        return self.codebook_size > 0

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON types; `from_dict` turns it back."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> CodecSpec:
        """Raises CodecError for a field that is unknown or of the wrong kind."""
        unknown = sorted(set(values) - set(cls.__dataclass_fields__))
        if unknown:
            raise CodecError(f"codec description has unknown fields {unknown}")
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        try:
            return cls(**fields)
        except TypeError as error:
            raise CodecError(f"codec description is not usable: {error}") from error
