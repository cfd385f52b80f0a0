"""The codecs this service knows by name (Table 5 of the DAT paper), with geometry, source and licence.

Geometry is that of the published configuration files: latent-diffusion's
`models/first_stage_models/{vq-f8,vq-f8-n256,vq-f16}/config.yaml`, taming-transformers'
`configs/model.yaml` beside each checkpoint.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from dat_workers.codecs.spec import CodecError, CodecSpec


class UnknownCodec(CodecError):
    """No codec of that name is registered or installed."""

    def __init__(self, name: str, known: Iterable[str]) -> None:
        names = list(known)
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(names)}"
        super().__init__(f"unknown codec {name!r}; {hint}")
        self.name = name
        self.near = near


_LDM = "https://ommer-lab.com/files/latent-diffusion"
_HEIBOX = "https://heibox.uni-heidelberg.de/d"
_LDM_LICENCE = "MIT (repository CompVis/latent-diffusion; no separate licence is stated for the weights)"
_TAMING_LICENCE = "MIT (repository CompVis/taming-transformers; no separate licence is stated for the weights)"


def _f8(name: str, codebook_size: int, archive: str, summary: str) -> CodecSpec:
    return CodecSpec(
        name,
        ch_mult=(1, 2, 2, 4),
        attn_resolutions=(32,),
        z_channels=4,
        codebook_size=codebook_size,
        latent_dim=4,
        source_url=f"{_LDM}/{archive}",
        source_member="model.ckpt",
        licence=_LDM_LICENCE,
        summary=summary,
    )


def _imagenet_f16(name: str, codebook_size: int, page: str, summary: str) -> CodecSpec:
    return CodecSpec(
        name,
        ch_mult=(1, 1, 2, 2, 4),
        attn_resolutions=(16,),
        z_channels=256,
        codebook_size=codebook_size,
        latent_dim=256,
        source_url=f"{_HEIBOX}/{page}/files/?p=%2Fckpts%2Flast.ckpt&dl=1",
        licence=_TAMING_LICENCE,
        summary=summary,
    )


_ENTRIES = (
    CodecSpec(
        "tiny-f8",
        ch=32,
        ch_mult=(1, 1, 2, 4),
        num_res_blocks=1,
        z_channels=4,
        codebook_size=16384,
        latent_dim=4,
        licence="that of this package",
        summary="small VQGAN of the same family; ships inside the package, the default",
    ),
    _f8(
        "vqgan-openimages-f8-16384",
        16384,
        "vq-f8.zip",
        "the DAT paper's main codec: latent-diffusion vq-f8, OpenImages (PSNR 23.07, rFID 1.14)",
    ),
    CodecSpec(
        "vqgan-openimages-f16-16384",
        ch_mult=(1, 1, 2, 2, 4),
        attn_resolutions=(16,),
        z_channels=8,
        codebook_size=16384,
        latent_dim=8,
        source_url=f"{_LDM}/vq-f16.zip",
        source_member="model.ckpt",
        licence=_LDM_LICENCE,
        summary="latent-diffusion vq-f16, OpenImages (PSNR 20.83, rFID 5.15)",
    ),
    _f8(
        "vqgan-openimages-f8-256",
        256,
        "vq-f8-n256.zip",
        "latent-diffusion vq-f8 with 256 codebook vectors, OpenImages (PSNR 22.35, rFID 1.49)",
    ),
    _imagenet_f16(
        "vqgan-imagenet-f16-16384",
        16384,
        "a7530b09fed84f80a887",
        "taming-transformers vqgan_imagenet_f16_16384 (rFID 4.98)",
    ),
    _imagenet_f16(
        "vqgan-imagenet-f16-1024",
        1024,
        "8088892a516d4e3baf92",
        "taming-transformers vqgan_imagenet_f16_1024 (rFID 7.94)",
    ),
    CodecSpec(
        "identity",
        architecture="identity",
        licence="none needed",
        summary="copies its input: for measuring everything but the codec",
    ),
)

REGISTRY: dict[str, CodecSpec] = {spec.name: spec for spec in _ENTRIES}


def get(name: str) -> CodecSpec:
    """The registry's entry of that name.

    >>> get("vqgan-openimages-f8-16384").factor
    8

    Raises UnknownCodec, with the names nearest to it.
    """
    try:
        return REGISTRY[name]
    except KeyError:
        raise UnknownCodec(name, REGISTRY) from None
