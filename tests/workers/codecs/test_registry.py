from __future__ import annotations

import doctest

import pytest

from dat_workers.codecs import file, registry, store
from dat_workers.codecs.registry import REGISTRY, CodecNotFound, get
from dat_workers.codecs.spec import CodecError


@pytest.mark.parametrize(
    ("name", "factor", "k", "d", "millions"),
    [
        ("vqgan-openimages-f8-16384", 8, 16384, 4, 67.7),
        ("vqgan-openimages-f8-256", 8, 256, 4, 67.7),
        ("vqgan-openimages-f16-16384", 16, 16384, 8, 69.6),
        ("vqgan-imagenet-f16-16384", 16, 16384, 256, 76.1),
        ("vqgan-imagenet-f16-1024", 16, 1024, 256, 72.1),
        ("tiny-f8", 8, 16384, 4, 2.8),
        ("identity", 1, 0, 0, 0.0),
    ],
)
def test_geometry_is_that_of_table_5(name: str, factor: int, k: int, d: int, millions: float) -> None:
    spec = get(name)
    assert spec.name == name
    assert (spec.factor, spec.codebook_size, spec.latent_dim) == (factor, k, d)

    assert round(file.parameter_count(spec) / 1e6, 1) == millions


def test_published_names_and_shapes() -> None:
    f8 = file.expected_shapes(get("vqgan-openimages-f8-16384"))
    assert f8["encoder.down.3.attn.1.proj_out.weight"] == (512, 512, 1, 1)
    assert f8["encoder.down.1.block.0.nin_shortcut.weight"] == (256, 128, 1, 1)
    assert f8["decoder.up.3.attn.2.q.weight"] == (512, 512, 1, 1)
    assert f8["decoder.up.1.upsample.conv.weight"] == (256, 256, 3, 3)
    assert "encoder.down.2.attn.0.q.weight" not in f8
    f16 = file.expected_shapes(get("vqgan-imagenet-f16-1024"))
    assert f16["encoder.conv_out.weight"] == (256, 512, 3, 3)
    assert f16["encoder.down.4.attn.0.k.weight"] == (512, 512, 1, 1)
    assert f16["quantize.embedding.weight"] == (1024, 256)
    assert f16["post_quant_conv.weight"] == (256, 256, 1, 1)


def test_every_published_entry_says_where_from_and_under_which_licence() -> None:
    for name, spec in REGISTRY.items():
        assert spec.licence != "unknown"
        assert spec.summary
        assert (spec.source_url is None) == (name in ("identity", "tiny-f8"))
        assert (spec.source_member is not None) == bool(spec.source_url and spec.source_url.endswith(".zip"))
    assert get("vqgan-imagenet-f16-1024").source_url == (
        "https://heibox.uni-heidelberg.de/d/8088892a516d4e3baf92/files/?p=%2Fckpts%2Flast.ckpt&dl=1"
    )


def test_unknown_name_lists_near_ones() -> None:
    with pytest.raises(CodecNotFound, match=r"'vqgan-openimage-f8'.*vqgan-openimages-f8-256") as caught:
        get("vqgan-openimage-f8")
    assert isinstance(caught.value, CodecError)
    with pytest.raises(CodecNotFound, match="known codecs: tiny-f8, "):
        get("§§§")


@pytest.mark.parametrize("module", [registry, file, store])
def test_examples(module: object) -> None:
    failed, tried = doctest.testmod(module)  # type: ignore[arg-type]
    assert tried > 0
    assert failed == 0
