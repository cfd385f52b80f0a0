"""The codecs that this service knows by name (Table 5 of the DAT paper), with geometry, source and licence.

The geometry is that of the published configuration files: latent-diffusion's
`models/first_stage_models/{vq-f8,vq-f8-n256,vq-f16}/config.yaml`, and taming-transformers' `configs/model.yaml`
beside each checkpoint.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from dat_workers.codecs.spec import CodecError, CodecSpec


class CodecNotFound(CodecError):
    """No codec of that name is registered or installed; the message suggests similar names or lists all names."""

    def __init__(self, name: str, known_names: Iterable[str]) -> None:
        names = list(known_names)
        similar = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(similar)}?" if similar else f"known codecs: {', '.join(names)}"
        super().__init__(f"unknown codec {name!r}; {hint}")
        self.name, self.known_names = name, names

    def __reduce__(self) -> tuple[type[CodecNotFound], tuple[str, list[str]]]:
        """Makes it picklable; by default pickle passes only the message to the constructor."""
        return type(self), (self.name, self.known_names)


_LATENT_DIFFUSION = "https://ommer-lab.com/files/latent-diffusion"
_TAMING = "https://heibox.uni-heidelberg.de/d/{}/files/?p=%2Fckpts%2Flast.ckpt&dl=1"
_F8: dict[str, Any] = {"ch_mult": (1, 2, 2, 4), "attn_resolutions": (32,)}
_F16: dict[str, Any] = {"ch_mult": (1, 1, 2, 2, 4), "attn_resolutions": (16,)}


def _published(
    name: str,
    levels: dict[str, Any],
    codebook_size: int,
    latent_dim: int,
    source_url: str,
    summary: str,
) -> CodecSpec:
    repository = "latent-diffusion" if source_url.startswith(_LATENT_DIFFUSION) else "taming-transformers"
    return CodecSpec(
        name,
        **levels,
        z_channels=latent_dim,
        codebook_size=codebook_size,
        latent_dim=latent_dim,
        source_url=source_url,
        source_member="model.ckpt" if source_url.endswith(".zip") else None,
        licence=f"MIT (repository CompVis/{repository}; no separate licence is stated for the weights)",
        summary=summary,
    )


_ENTRIES = (
    CodecSpec(
        "tiny-f8",
        ch=32,
        ch_mult=(1, 1, 2, 4),
        num_res_blocks=1,
        codebook_size=16384,
        latent_dim=4,
        licence="the licence of this package",
        summary="small VQGAN of the same family; shipped inside the package; the default codec",
    ),
    _published(
        "vqgan-openimages-f8-16384", _F8, 16384, 4, f"{_LATENT_DIFFUSION}/vq-f8.zip",
        "the DAT paper's main codec: latent-diffusion vq-f8, OpenImages (PSNR 23.07, rFID 1.14)",
    ),
    _published(
        "vqgan-openimages-f16-16384", _F16, 16384, 8, f"{_LATENT_DIFFUSION}/vq-f16.zip",
        "latent-diffusion vq-f16, OpenImages (PSNR 20.83, rFID 5.15)",
    ),
    _published(
        "vqgan-openimages-f8-256", _F8, 256, 4, f"{_LATENT_DIFFUSION}/vq-f8-n256.zip",
        "latent-diffusion vq-f8 with 256 codebook vectors, OpenImages (PSNR 22.35, rFID 1.49)",
    ),
    _published(
        "vqgan-imagenet-f16-16384", _F16, 16384, 256, _TAMING.format("a7530b09fed84f80a887"),
        "taming-transformers vqgan_imagenet_f16_16384 (rFID 4.98)",
    ),
    _published(
        "vqgan-imagenet-f16-1024", _F16, 1024, 256, _TAMING.format("8088892a516d4e3baf92"),
        "taming-transformers vqgan_imagenet_f16_1024 (rFID 7.94)",
    ),
    CodecSpec(
        "identity",
        architecture="identity",
        licence="none needed",
        summary="returns its input unchanged; for measuring everything but the codec",
    ),
)  # fmt: skip

REGISTRY: dict[str, CodecSpec] = {spec.name: spec for spec in _ENTRIES}


def get(name: str) -> CodecSpec:
    """Returns the spec of the registered codec of that name.

    >>> get("vqgan-openimages-f8-16384").factor
    8

    Raises CodecNotFound for a name that is not in the registry; its message suggests similar names.
    """
    try:
        return REGISTRY[name]
    except KeyError:
        raise CodecNotFound(name, REGISTRY) from None
