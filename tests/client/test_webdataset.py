from __future__ import annotations

import io
import json
import pickle
import random
from collections import Counter
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
import webdataset
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from dat_client import InvalidDataset
from dat_client.webdataset import load, prepared, read_manifest, read_settings, view_of

from .precomputed import encoded, npy, picture, write_pair, write_shard

NAMES = [f"train-{i:06}.tar" for i in range(5)]


def q_of(x: Image.Image) -> Image.Image:
    """Stands in for Q."""
    return ImageOps.invert(x)


def one_view(number: int, x: Image.Image) -> dict[str, Any]:
    return {"png": encoded(q_of(x)), "indices.npy": npy(np.full((4, 5), 65535 - number, np.uint16))}


def tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())


def pictures(number: int) -> tuple[Tensor, Tensor]:
    """Returns x and Q(x) of a sample."""
    x = picture(number)
    return tensor(x), tensor(q_of(x))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """SRC and DST: 5 shards of 4 samples, of which 3 were skipped."""
    return write_pair(tmp_path_factory.mktemp("pair"), NAMES, 4, one_view, skipped=(0, 6, 19))


@pytest.fixture(scope="module")
def dst(pair: tuple[Path, Path]) -> Path:
    return pair[1]


KEPT = [n for n in range(20) if n not in (0, 6, 19)]


def numbers(items: Any) -> list[int]:
    """Which samples these are, by their tokens."""
    return [65535 - int(tokens.flatten()[0]) for tokens, _ in items]


def test_reconstructions_and_labels(dst: Path) -> None:
    items = list(load(dst))
    assert len(items) == len(KEPT)
    for number, (x_hat, label) in zip(KEPT, items, strict=True):
        assert x_hat.dtype == torch.uint8
        assert torch.equal(x_hat, pictures(number)[1])
        assert label == number % 10
        assert type(label) is int


def test_tokens_are_int32(dst: Path) -> None:
    tokens, label = next(iter(load(dst, tokens=True)))
    assert tokens.dtype == torch.int32
    assert tokens.tolist() == [[65534] * 5] * 4  # above 32767: not read as int16
    assert label == 1


def test_every_key_once_over_ranks_and_workers(dst: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for shuffle in (0, 8):
        data = load(dst, tokens=True, shuffle=shuffle)
        for _ in range(2):  # epochs
            read = []
            for rank in range(2):
                monkeypatch.setenv("RANK", str(rank))
                loader = DataLoader(data, batch_size=2, num_workers=2)
                for tokens, labels in loader:
                    batch = numbers(zip(tokens, labels, strict=True))
                    assert labels.tolist() == [number % 10 for number in batch]
                    read += batch
            assert sorted(read) == KEPT


def test_a_spawned_worker_knows_its_rank(dst: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch.multiprocessing.spawn a worker has neither the variables of torchrun nor the process group."""
    data = load(dst, tokens=True)
    read = []
    for rank in range(2):
        with monkeypatch.context() as trainer:
            trainer.setenv("RANK", str(rank))
            trainer.setenv("WORLD_SIZE", "2")
            sent = ForkingPickler.dumps(data)
        read.append(numbers(pickle.loads(sent)))
    assert sorted(read[0] + read[1]) == KEPT
    assert min(map(len, read)) > 0


@pytest.mark.parametrize("workers", [0, 2])
def test_epochs_differ_and_a_seed_repeats_them(dst: Path, workers: int) -> None:
    def epochs(seed: int, **how: Any) -> list[list[int]]:
        data = load(dst, tokens=True, shuffle=8, seed=seed)
        loader = DataLoader(data, batch_size=None, num_workers=workers, **how)
        return [numbers(loader) for _ in range(3)]

    first = epochs(1)
    assert first[0] != first[1] != first[2] != first[0]
    assert all(sorted(epoch) == KEPT for epoch in first)
    torch.manual_seed(5)  # not by torch's seed
    assert epochs(1) == first
    assert epochs(2) != first
    if workers:
        assert epochs(1, persistent_workers=True) == first
    assert numbers(load(dst, tokens=True)) == KEPT  # as stored


def test_pipeline_has_webdatasets_methods(dst: Path) -> None:
    data = load(dst, shuffle=4).map(lambda item: item[1]).repeat()
    labels = [label for label, _ in zip(data, range(3 * len(KEPT)), strict=False)]
    assert Counter(labels) == Counter(3 * [number % 10 for number in KEPT])


@pytest.mark.parametrize("pattern", ["{src}", "{src}/", "{src}/train-{{000000..000009}}.tar", "file://{src}"])
def test_x_from_the_source_beside_its_reconstruction(pair: tuple[Path, Path], pattern: str) -> None:
    src, dst = pair
    items = list(load(dst, source=pattern.format(src=src)))
    for number, (x, x_hat, label) in zip(KEPT, items, strict=True):
        assert torch.equal(x, pictures(number)[0])
        assert torch.equal(x_hat, pictures(number)[1])
        assert label == number % 10


def test_shuffled_pairs_stay_pairs(pair: tuple[Path, Path]) -> None:
    for x, tokens, label in load(pair[1], source=pair[0], tokens=True, shuffle=100):
        number = 65535 - int(tokens[0, 0])
        assert torch.equal(x, pictures(number)[0])
        assert label == number % 10


@pytest.mark.parametrize("names", [["val/000.tar", "train/000.tar"]])
def test_nested_shards(tmp_path: Path, names: list[str]) -> None:
    src, dst = write_pair(tmp_path, names, 2, one_view)
    assert list(read_manifest(dst)) == sorted(names)
    for source in (src, f"{src}/{{train,val}}/000.tar"):
        items = list(load(dst, source=source))
        assert sorted(255 - int(x_hat[0, 0, 0]) for _, x_hat, _ in items) == sorted(
            int(x[0, 0, 0]) for x, _, _ in items
        )
        assert len(items) == 4
    with pytest.raises(InvalidDataset, match=r"source: 0 of .*train/000.tar are named val/000.tar"):
        load(dst, source=f"{src}/train/000.tar")


VIEWS = [
    {"box": [3, 5, 20, 24], "size": [16, 16], "flip": False, "variant": 0, "seed": 1},
    {"box": [0, 0, 40, 32], "size": [16, 16], "flip": True, "variant": 0, "seed": 2},
    {"box": [11, 1, 9, 13], "size": [16, 16], "flip": True, "variant": 0, "seed": 3},
]


def pillows_own(x: Image.Image, view: dict[str, Any]) -> Image.Image:
    left, top, width, height = view["box"]
    box = (left, top, left + width, top + height)
    cut = x.resize(view["size"][::-1], Image.Resampling.BILINEAR, box=box)
    return ImageOps.mirror(cut) if view["flip"] else cut


def three_views(number: int, x: Image.Image) -> dict[str, Any]:
    fields: dict[str, Any] = {"views.json": json.dumps(VIEWS).encode()}
    for i, view in enumerate(VIEWS):
        cut = pillows_own(x, view)
        fields[f"{i}.png"] = encoded(q_of(cut))
        fields[f"{i}.indices.npy"] = npy(np.full((2, 2), 65535 - number - 100 * i, np.uint16))
        fields[f"{i}.image.png"] = encoded(cut)
    return fields


@pytest.fixture(scope="module")
def augmented(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """SRC and DST with three views a sample: 2 shards of 6 samples."""
    outputs = ["reconstruction", "indices", "image"]
    folder = tmp_path_factory.mktemp("augmented")
    return write_pair(folder, NAMES[:2], 6, three_views, outputs=outputs, augment=3, skipped=[2])


@pytest.mark.parametrize("stored", [False, True])
def test_views_are_cut_as_pillow_cuts_them(augmented: tuple[Path, Path], stored: bool) -> None:
    src, dst = augmented
    items = list(load(dst, view="all", image=True) if stored else load(dst, view="all", source=src))
    of = [(number, i) for number in range(12) if number != 2 for i in range(3)]
    for (number, i), (x, x_hat, label) in zip(of, items, strict=True):
        cut = pillows_own(picture(number), VIEWS[i])
        assert torch.equal(x, tensor(cut))  # bit for bit
        assert torch.equal(x_hat, tensor(q_of(cut)))
        assert label == number % 10


def test_one_view_by_its_number(augmented: tuple[Path, Path]) -> None:
    assert {number // 100 for number in numbers(load(augmented[1], tokens=True, view=2))} == {2}
    with pytest.raises(
        InvalidDataset, match=r"train-000000.tar, sample 0000: view 3 of 3 does not exist: the first is 0"
    ):
        next(iter(load(augmented[1], view=3)))


def test_random_views(augmented: tuple[Path, Path]) -> None:
    data = load(augmented[1], tokens=True, seed=3)
    epochs = [numbers(data) for _ in range(12)]
    for epoch in epochs:
        assert [number % 100 for number in epoch] == [number for number in range(12) if number != 2]
    read = Counter(number // 100 for epoch in epochs for number in epoch)
    assert set(read) == {0, 1, 2}
    assert min(read.values()) > 20  # of 132
    assert epochs[0] != epochs[1]
    again = load(augmented[1], tokens=True, seed=3)
    assert numbers(again) == epochs[0]
    in_workers = DataLoader(load(augmented[1], tokens=True, seed=3), batch_size=None, num_workers=2)
    assert sorted(numbers(in_workers)) == sorted(epochs[0])
    assert numbers(load(augmented[1], tokens=True, seed=4)) != epochs[0]


def test_variants_share_their_x(tmp_path: Path) -> None:
    def variants(number: int, x: Image.Image) -> dict[str, Any]:
        views = [{"variant": i, "seed": i} for i in range(2)]
        cut = x.crop((12, 8, 28, 24))
        both = {f"{i}.png": encoded(q_of(cut).rotate(90 * i)) for i in range(2)}
        return {"views.json": json.dumps(views).encode()} | both

    src, dst = write_pair(tmp_path, NAMES[:1], 2, variants, crop=16, variants=2, outputs=["reconstruction"])
    for number, (x, x_hat, _) in zip((0, 0, 1, 1), load(dst, source=src, view="all"), strict=True):
        assert torch.equal(x, tensor(picture(number).crop((12, 8, 28, 24))))
        assert x_hat.shape == x.shape


@pytest.mark.parametrize("size", [(100, 60), (61, 97), (64, 64), (224, 301)])
@pytest.mark.parametrize(("resize", "crop"), [(None, 31), (48, None), (48, 40), (64, 41), (None, None)])
def test_geometry_is_torchvisions(size: tuple[int, int], resize: int | None, crop: int | None) -> None:
    x = picture(1, size)
    steps: list[Any] = [v2.Resize(resize)] if resize else []
    steps += [v2.CenterCrop(crop)] if crop else []
    expected = v2.Compose([*steps, v2.Identity()])(x)
    assert np.array_equal(prepared(x, {"resize": resize, "crop": crop}), expected)


def test_a_view_is_torchvisions_resized_crop() -> None:
    # torchvision crops first, so that what lies outside does not count: the same where nothing is scaled.
    x = picture(1, (100, 60))
    view = {"box": [7, 9, 30, 20], "size": [20, 30], "flip": False}
    assert np.array_equal(view_of(x, view), v2.functional.resized_crop(x, 9, 7, 20, 30, [20, 30]))


def test_resized_and_cropped_x(tmp_path: Path) -> None:
    geometry = {"resize": 24, "crop": 17}

    def smaller(_: int, x: Image.Image) -> dict[str, Any]:
        return {"png": encoded(q_of(prepared(x, geometry)))}

    src, dst = write_pair(tmp_path, NAMES[:1], 3, smaller, size=(40, 32), **geometry)
    for number, (x, x_hat, _) in enumerate(load(dst, source=src)):
        assert torch.equal(x, tensor(prepared(picture(number), geometry)))
        assert x.shape == x_hat.shape == (3, 17, 17)


def test_stored_images_of_any_suffix(tmp_path: Path) -> None:
    def with_image(number: int, x: Image.Image) -> dict[str, Any]:
        suffix = ("jpeg", "png", "jpg")[number]
        stored = encoded(x, "PNG" if suffix == "png" else "JPEG")
        return {"jpg": encoded(q_of(x), "JPEG"), f"image.{suffix}": stored}

    _, dst = write_pair(tmp_path, NAMES[:1], 3, with_image, outputs=["reconstruction", "image"], picture="jpg")
    for number, (x, x_hat, _) in enumerate(load(dst, image=True)):
        jpeg = Image.open(io.BytesIO(encoded(q_of(picture(number)), "JPEG"))).convert("RGB")
        assert torch.equal(x_hat, tensor(jpeg))
        assert (x.float() - pictures(number)[0].float()).abs().mean() < 10


def test_other_pictures_than_rgb(tmp_path: Path) -> None:
    grey = picture(3).convert("L")
    _, dst = write_pair(tmp_path, NAMES[:1], 1, lambda *_: {"png": encoded(q_of(grey))})
    (x_hat, _), *_ = load(dst)
    assert torch.equal(x_hat, tensor(q_of(grey).convert("RGB")))


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_webdataset_alone_reads_them(augmented: tuple[Path, Path], dst: Path) -> None:
    urls = [str(dst / name) for name in NAMES]
    plain = webdataset.WebDataset(urls, shardshuffle=False).decode("torchrgb8").to_tuple("__key__", "png", "cls")
    for number, (key, x_hat, label) in zip(KEPT, plain, strict=True):
        assert key == f"{number:04}"
        assert torch.equal(x_hat, pictures(number)[1])
        assert label == number % 10
    views = next(iter(webdataset.WebDataset([str(augmented[1] / NAMES[0])], shardshuffle=False)))
    assert json.loads(views["views.json"]) == VIEWS
    assert {"0.png", "2.indices.npy", "1.image.png", "cls"} <= set(views)


@pytest.mark.parametrize("address", ["memory://q{n}/deep", "file://{tmp}/q"])
def test_fsspec_addresses(pair: tuple[Path, Path], tmp_path: Path, address: str) -> None:
    base = address.format(n=random.randrange(1 << 60), tmp=tmp_path)
    for name, folder in zip(("src", "dst"), pair, strict=True):
        fs, path = fsspec.url_to_fs(f"{base}/{name}")
        fs.put(f"{folder}/", path, recursive=True)
    assert read_settings(f"{base}/dst") == read_settings(pair[1])
    assert read_manifest(f"{base}/dst") == read_manifest(pair[1])
    for source in ("src", "src/train-{000000..000004}.tar"):
        data = load(f"{base}/dst/", source=f"{base}/{source}", tokens=True)
        loader = DataLoader(data, batch_size=None, num_workers=2)
        read = {65535 - int(tokens[0, 0]): x for x, tokens, _ in loader}
        assert sorted(read) == KEPT
        assert all(torch.equal(x, pictures(number)[0]) for number, x in read.items())
    fs.rm(fsspec.url_to_fs(base)[1], recursive=True)


def test_chained_addresses_in_patterns(pair: tuple[Path, Path]) -> None:
    source = f"simplecache::file://{pair[0]}/train-{{000000..000004}}.tar"
    assert len(list(load(pair[1], source=source))) == len(KEPT)


def test_relative_paths_and_a_home(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(pair[1].parent)
    data = load("dst", source="src/train-{000000..000004}.tar")
    monkeypatch.setenv("HOME", str(pair[1].parent))
    at_home = load("~/dst")
    monkeypatch.chdir("/")
    assert len(list(data)) == len(list(at_home)) == len(KEPT)


def test_unfinished_shards_are_not_read(tmp_path: Path) -> None:
    _, dst = write_pair(tmp_path, NAMES[:2], 2, one_view)
    (dst / "manifest" / f"{NAMES[0]}.json").unlink()
    assert numbers(load(dst, tokens=True)) == [2, 3]
    (dst / "manifest" / f".{NAMES[0]}.json.0123.tmp").write_text("{")
    assert list(read_manifest(dst)) == NAMES[1:2]
    (dst / "manifest" / f"{NAMES[1]}.json").unlink()
    with pytest.raises(InvalidDataset, match="no shard is finished"):
        load(dst)


def edited(dst: Path, path: str, **changes: Any) -> None:
    (dst / path).write_text(json.dumps(json.loads((dst / path).read_text()) | changes))


@pytest.fixture
def own(tmp_path: Path) -> tuple[Path, Path]:
    """SRC and DST of a test's own: 2 shards of 2."""
    return write_pair(tmp_path, NAMES[:2], 2, one_view)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image": True}, "holds reconstruction, indices, no image"),
        ({"image": True, "source": "/src"}, "give one of them"),
        ({"label": "json"}, r"train-000000.tar, sample 0000: no json, only cls, indices.npy, png"),
        ({"label": "png"}, "sample 0000: png is b'.x89PNG.*must be an integer"),
        ({"view": -1}, "view: must be 'random', 'all' or the number of a view, got -1"),
        ({"view": "first"}, "got 'first'"),
        ({"view": 1}, "sample 0000: view 1 of 1"),
    ],
)
def test_missing_fields_and_wrong_options_are_named(
    own: tuple[Path, Path], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidDataset, match=message):
        next(iter(load(own[1], **options)))


def test_folders_that_precompute_did_not_write_are_refused(own: tuple[Path, Path]) -> None:
    src, dst = own
    with pytest.raises(InvalidDataset, match=r"src: its precompute.json is missing"):
        load(src)
    with pytest.raises(InvalidDataset, match=r"nowhere: its precompute.json is missing"):
        load(f"memory://nowhere{random.randrange(1 << 60)}/nowhere")
    edited(dst, "precompute.json", format=2)
    with pytest.raises(InvalidDataset, match="format 2, this dat-client reads 1"):
        load(dst)
    edited(dst, "precompute.json", format=1)
    (dst / "precompute.json").rename(dst / "aside")
    for damaged in ("", "{", "[]"):
        (dst / "precompute.json").write_text(damaged)
        with pytest.raises(InvalidDataset, match=r"dst: its precompute.json is not JSON|dst: format None"):
            load(dst)
    (dst / "precompute.json").write_text('{"format": 1, "outputs": [], "crop": null}')
    with pytest.raises(InvalidDataset, match=r"dst: its precompute.json lacks augment, picture, resize, variants$"):
        load(dst)
    (dst / "aside").rename(dst / "precompute.json")
    edited(dst, f"manifest/{NAMES[1]}.json", settings="4567")
    with pytest.raises(InvalidDataset, match="shards of 2 different settings"):
        load(dst)


def test_shards_that_changed_are_named(own: tuple[Path, Path]) -> None:
    dst = own[1]
    shard = dst / NAMES[0]
    whole = shard.read_bytes()
    edited(dst, f"manifest/{NAMES[0]}.json", samples=3)
    with pytest.raises(InvalidDataset, match=r"train-000000.tar: 2 samples, 3 by the manifest"):
        list(load(dst))
    shard.write_bytes(whole[:3000])
    with pytest.raises(InvalidDataset, match=r"train-000000.tar: not a whole tar file"):
        list(load(dst))
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"train-000000.tar"):
        list(load(dst))


@pytest.mark.parametrize("content", ["", "{", "[]", '{"shard": "train-000001.tar"}'])
def test_a_damaged_manifest_entry_is_named(own: tuple[Path, Path], content: str) -> None:
    (own[1] / "manifest" / f"{NAMES[1]}.json").write_text(content)
    with pytest.raises(InvalidDataset, match=r"manifest/train-000001.tar.json cannot be read: .* precompute again"):
        read_manifest(own[1])


def test_a_kept_field_is_not_taken_for_a_reconstruction(tmp_path: Path) -> None:
    """`--keep png --format png --augment 3` stores the original beside the views."""

    def beside(number: int, x: Image.Image) -> dict[str, Any]:
        return {**three_views(number, x), "png": encoded(x), "indices.npy": npy(np.zeros((2, 2), np.uint16))}

    _, dst = write_pair(tmp_path, NAMES[:1], 1, beside, augment=3)
    assert len(list(load(dst, view="all"))) == 3
    for (x_hat, _), view in zip(load(dst, view="all"), VIEWS, strict=True):
        assert torch.equal(x_hat, tensor(q_of(pillows_own(picture(0), view))))


def test_a_picture_smaller_than_the_crop_is_another_source(tmp_path: Path) -> None:
    def cut(_: int, x: Image.Image) -> dict[str, Any]:
        return {"png": encoded(q_of(x.crop((4, 0, 36, 32))))}

    _, dst = write_pair(tmp_path, NAMES[:1], 1, cut, crop=32)
    smaller, _ = write_pair(tmp_path / "smaller", NAMES[:1], 1, one_view, size=(40, 31))
    with pytest.raises(InvalidDataset, match=r"sample 0000: .*40x31 pixels .* 32 or more, the crop"):
        list(load(dst, source=smaller))


def test_two_files_of_one_name(own: tuple[Path, Path]) -> None:
    shard = own[1] / NAMES[0]
    samples = [{"__key__": "0000", "png": b"", "cls": b"0"}] * 2
    write_shard(shard, samples)
    with pytest.raises(InvalidDataset, match=r"train-000000.tar, sample 0000: the field png is there twice"):
        list(load(own[1]))


def test_a_field_that_precompute_should_have_written(own: tuple[Path, Path]) -> None:
    edited(own[1], "precompute.json", picture="webp")
    with pytest.raises(InvalidDataset, match=r"sample 0000: no webp, only cls, indices.npy, png"):
        list(load(own[1]))
    edited(own[1], "precompute.json", augment=2)
    with pytest.raises(InvalidDataset, match=r"no views.json, only"):
        list(load(own[1], source=own[0], tokens=True))


def test_another_source_is_noticed(own: tuple[Path, Path], tmp_path: Path) -> None:
    src, dst = own
    another_source, _ = write_pair(tmp_path / "other", NAMES[:2], 2, one_view, size=(33, 32))
    with pytest.raises(InvalidDataset, match=r"sample 0000: x has 33x32, Q\(x\) 40x32 pixels"):
        list(load(dst, source=another_source))
    fewer, _ = write_pair(tmp_path / "fewer", NAMES[:2], 1, one_view)
    with pytest.raises(InvalidDataset, match=r"source: sample 0001 is not in .*fewer/src/train-000000.tar"):
        list(load(dst, source=fewer))
    with pytest.raises(FileNotFoundError, match=r"nowhere/train-000000.tar"):
        list(load(dst, source=tmp_path / "nowhere"))
    with pytest.raises(InvalidDataset, match=r"source: 0 of .* are named train-000001.tar"):
        load(dst, source=src / NAMES[0])
    with pytest.raises(InvalidDataset, match=r"source: .*train-{0..1.tar has braces that are not in pairs"):
        load(dst, source=f"{src}/train-{{0..1.tar")


def test_a_damaged_picture_is_named(tmp_path: Path) -> None:
    _, dst = write_pair(tmp_path, NAMES[:1], 2, lambda n, x: {"png": encoded(x)[: 5000 if n == 0 else 100]})
    with pytest.raises(InvalidDataset, match=r"train-000000.tar, sample 0001: \w+"):
        list(load(dst))


def test_too_many_workers_are_refused(dst: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(InvalidDataset, match="5 shards for 3 ranks x 2 workers, some would get none"):
        list(DataLoader(load(dst), num_workers=2))
