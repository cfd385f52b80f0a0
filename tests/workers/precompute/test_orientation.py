"""x and Q(x) are the same way up for a viewer that obeys the EXIF orientation, and for one that ignores it."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from dat_client.dataset_format.pictures import orientation_exif
from dat_client.webdataset import load
from dat_workers.engines.config import EngineConfig
from dat_workers.precompute import precompute
from dat_workers.precompute.recipe import Recipe
from tests.workers.precompute.shards import picture, read_tar

TAG = 0x0112


def source_of(root: Path, form: str, value: int) -> Image.Image:
    """Writes one picture with an orientation into a class folder, and returns it without."""
    image = picture(0).crop((0, 0, 40, 24))
    (root / "cat").mkdir(parents=True)
    image.save(root / "cat" / f"1.{form}", exif=orientation_exif(value) or b"")
    return image


def viewed(content: bytes) -> np.ndarray:
    """The pixels [H,W,3] that a viewer shows, which obeys the tag."""
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(content))).convert("RGB"))


@pytest.mark.parametrize("value", [1, 6])
@pytest.mark.parametrize("upright", [False, True])
@pytest.mark.parametrize("form", ["png", "webp", "jpg"])
def test_a_pair_is_the_same_way_up(tmp_path: Path, form: str, upright: bool, value: int) -> None:
    source_of(tmp_path / "src", "png", value)
    precompute(
        tmp_path / "src", tmp_path / "dst", codec="identity", picture=form, quality=100, upright=upright,
        outputs=["reconstruction", "image"], engine_config=EngineConfig(threads=1),
    )  # fmt: skip
    files = read_tar(tmp_path / "dst" / "000000.tar")
    turned = upright and value == 6
    original = files[f"cat/1.image.{form if turned else 'png'}"]
    assert turned or original == (tmp_path / "src" / "cat" / "1.png").read_bytes()
    q = files[f"cat/1.{form}"]
    for content in (original, q):
        with Image.open(io.BytesIO(content)) as stored:
            assert stored.size == ((24, 40) if turned else (40, 24))
            assert stored.getexif().get(TAG, 1) == (1 if upright else value)
    limit = 0 if form == "png" else 60  # jpg and webp lose something
    assert np.abs(viewed(original).astype(int) - viewed(q)).max() <= limit
    for options in ({"image": True}, {"source": tmp_path / "src"}):
        ((x, x_hat, label),) = load(tmp_path / "dst", **options)
        assert x.shape == x_hat.shape == ((3, 40, 24) if turned else (3, 24, 40))
        assert np.abs(x.numpy().astype(int) - x_hat.numpy()).max() <= limit
        assert label == 0


def test_crops_have_the_tag_too_and_load_cuts_x_alike(tmp_path: Path) -> None:
    source_of(tmp_path / "src", "jpg", 8)
    precompute(
        tmp_path / "src", tmp_path / "dst", codec="identity", picture="png", crop=16, augment=2,
        outputs=["reconstruction", "image"], engine_config=EngineConfig(threads=1),
    )  # fmt: skip
    files = read_tar(tmp_path / "dst" / "000000.tar")
    for name in ("0.png", "0.image.png", "1.png", "1.image.png"):
        assert Image.open(io.BytesIO(files[f"cat/1.{name}"])).getexif()[TAG] == 8
    for x, x_hat, _ in load(tmp_path / "dst", source=tmp_path / "src", view="all"):
        assert np.array_equal(x.numpy(), x_hat.numpy())


@pytest.mark.parametrize("upright", [False, True])
def test_x_of_sixteen_bits_is_the_same_from_the_source_and_from_the_shard(tmp_path: Path, upright: bool) -> None:
    (tmp_path / "src" / "cat").mkdir(parents=True)
    values = np.random.default_rng(0).integers(0, 1 << 16, (24, 40), dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "src" / "cat" / "1.png", exif=orientation_exif(3))
    precompute(
        tmp_path / "src", tmp_path / "dst", codec="identity", picture="png", upright=upright,
        outputs=["reconstruction", "image"], engine_config=EngineConfig(threads=1),
    )  # fmt: skip
    expected = np.stack([(values >> 8).astype(np.uint8)] * 3)
    expected = expected[:, ::-1, ::-1] if upright else expected
    for options in ({"image": True}, {"source": tmp_path / "src"}):
        ((x, x_hat, _),) = load(tmp_path / "dst", **options)
        assert np.array_equal(x.numpy(), expected)
        assert np.array_equal(x_hat.numpy(), expected)


def test_the_id_of_other_recipes_is_that_from_before_the_setting() -> None:
    recipe = Recipe("tiny-f8", crop=224)
    assert "upright" not in json.loads(recipe.to_json())
    assert recipe.id == "c85df9b90eb6"
    assert Recipe.from_json(recipe.to_json()) == recipe
    turned = Recipe("tiny-f8", crop=224, upright=True)
    assert Recipe.from_json(turned.to_json()) == turned
    assert turned.id != recipe.id
    assert "upright: False, now True" in recipe.differences(turned)
