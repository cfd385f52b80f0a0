"""Whole jobs in this process, with `identity` where the codec does not matter and `tiny-f8` where it does."""

from __future__ import annotations

import errno
import io
import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import torch
from webdataset.tariterators import group_by_keys, tar_file_expander

from dat_client.dataset_format.views import view_of
from dat_workers.discretizer import Discretizer
from dat_workers.engines.config import EngineConfig
from dat_workers.errors import InvalidInput
from dat_workers.images.encoded import pixels
from dat_workers.precompute import NoSamples, OtherRecipe, SampleFailed, pipeline, precompute
from dat_workers.precompute.output_folder import OutputFolder
from dat_workers.precompute.recipe import Recipe
from dat_workers.precompute.shard_writer import ShardWriter
from dat_workers.precompute.views import random_crop, replace_sample_tokens
from tests.workers.precompute.shards import (
    as_array,
    contents,
    encoded,
    picture,
    read_tar,
    sample_files,
    write_shards,
    write_tar,
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Runs the codec of a comparison with one thread, as the jobs do: tokens depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(source: Path | str, dst: Path | str, codec: str = "identity", threads: int = 1, **options: Any) -> Any:
    return precompute(str(source), str(dst), codec=codec, engine_config=EngineConfig(threads=threads), **options)


def manifest(dst: Path, name: str) -> dict[str, Any]:
    entry: dict[str, Any] = json.loads((dst / "manifest" / f"{name}.json").read_text())
    return entry


def test_every_key_once_with_its_other_fields(tmp_path: Path) -> None:
    source, dst = write_shards(tmp_path / "src"), tmp_path / "dst"
    summary = run(source, dst, picture="png")
    assert (summary.shards, summary.samples, summary.images, summary.skipped) == (3, 15, 15, 0)
    for i in range(3):
        name = f"train-{i:06d}.tar"
        before, after = read_tar(source / name), read_tar(dst / name)
        assert list(before) == list(after)
        for field, content in before.items():
            if field.endswith(".cls"):
                assert after[field] == content
            else:
                assert np.array_equal(as_array(after[field]), as_array(content))
        entry = manifest(dst, name)
        assert (entry["samples"], entry["bytes"]) == (5, (dst / name).stat().st_size)
        assert entry["sha256"] == contents(dst)[name]
    assert (dst / "contact-sheet.html").stat().st_size > 1000
    keys = []
    for path in sorted(dst.glob("*.tar")):
        with path.open("rb") as stream:
            samples = group_by_keys(tar_file_expander([{"stream": stream, "url": str(path)}]))
            keys += [sample["__key__"] for sample in samples]
    assert keys == [f"{i:04d}" for i in range(15)]


def test_pictures_and_tokens_are_those_of_the_discretizer(tmp_path: Path) -> None:
    source, dst = write_shards(tmp_path / "src", 2, 3), tmp_path / "dst"
    run(source, dst, "tiny-f8", outputs=["reconstruction", "indices", "image"], picture="png")
    q = Discretizer.from_store("tiny-f8")
    files = {name: data for path in dst.glob("*.tar") for name, data in read_tar(path).items()}
    for i in range(6):
        x = as_array(encoded(picture(i)))
        expected = q.discretize(np.ascontiguousarray(x[None]), outputs=("reconstruction", "indices"))
        indices = np.load(io.BytesIO(files[f"{i:04d}.indices.npy"]))
        assert indices.dtype == np.uint16
        assert np.array_equal(indices, expected["indices"][0])
        assert np.array_equal(as_array(files[f"{i:04d}.png"]), expected["reconstruction"][0])
        assert files[f"{i:04d}.image.png"] == encoded(picture(i))
        height, width = x.shape[1:]
        assert np.array_equal(q.decode(indices[None])[0, :, :height, :width], expected["reconstruction"][0])


def test_a_rerun_makes_only_the_missing_shards(tmp_path: Path) -> None:
    source, dst = write_shards(tmp_path / "src"), tmp_path / "dst"
    run(source, dst)
    before = contents(dst)
    again = run(source, dst)
    assert (again.shards_kept, again.images, again.samples) == (3, 0, 15)
    (dst / "train-000001.tar").unlink()
    (dst / "manifest" / "train-000002.tar.json").unlink()
    some = run(source, dst)
    assert (some.shards_kept, some.images) == (1, 10)
    assert contents(dst) == before
    (dst / "train-000000.tar").write_bytes(b"x" * (dst / "train-000000.tar").stat().st_size)
    assert run(source, dst).shards_kept == 3
    assert run(source, dst, check_hashes=True).shards_kept == 2
    assert contents(dst) == before


@pytest.mark.parametrize("threads", [0, 1])
def test_the_bytes_do_not_depend_on_the_number_of_workers(tmp_path: Path, threads: int) -> None:
    source = write_shards(tmp_path / "src", 4, 3)
    run(source, tmp_path / "one", "tiny-f8", threads)
    run(source, tmp_path / "three", "tiny-f8", threads, workers=3)
    assert contents(tmp_path / "three") == contents(tmp_path / "one")


def test_another_number_of_threads_is_another_recipe(tmp_path: Path) -> None:
    source, dst = write_shards(tmp_path / "src", 1, 1), tmp_path / "dst"
    run(source, dst, "tiny-f8", 1)
    with pytest.raises(OtherRecipe, match="threads: 1, now 2"):
        run(source, dst, "tiny-f8", 2)
    run(source, tmp_path / "copies", threads=1)
    assert run(source, tmp_path / "copies", threads=2).shards_kept == 1  # there is no engine


def test_an_outdated_contact_sheet_is_made_again(tmp_path: Path) -> None:
    source, dst = write_shards(tmp_path / "src", 2), tmp_path / "dst"
    run(source, dst)
    before = contents(dst)
    (dst / "contact-sheet.html").write_text("old")
    (dst / "train-000001.tar").unlink()
    run(source, dst)
    assert contents(dst) == before


def test_another_recipe_is_refused_and_overwritten_on_request(tmp_path: Path) -> None:
    source, dst = write_shards(tmp_path / "src"), tmp_path / "dst"
    run(source, dst)
    before = contents(dst)
    with pytest.raises(OtherRecipe, match="quality: 95, now 80"):
        run(source, dst, quality=80)
    with pytest.raises(OtherRecipe, match="codec: 'identity', now 'tiny-f8'"):
        run(source, dst, "tiny-f8")
    assert contents(dst) == before
    run(f"{source}/train-000000.tar", dst, quality=80, overwrite=True)
    assert {name for name in contents(dst) if name.endswith(".tar")} == {"train-000000.tar"}


def test_crops_are_those_that_are_written_down(tmp_path: Path) -> None:
    source, dst = write_shards(tmp_path / "src", 1, 2, side=80), tmp_path / "dst"
    run(source, dst, crop=32, augment=3, picture="png", outputs=["reconstruction", "image"])
    files = read_tar(dst / "train-000000.tar")
    recipe = Recipe("identity", crop=32, augment=3)
    for number in range(2):
        key, x = f"{number:04d}", picture(number, 80)
        views = json.loads(files[f"{key}.views.json"])
        for i in range(3):
            crop = random_crop(recipe, key, i, *x.size)
            assert crop["size"] == [32, 32]
            assert crop.items() <= views[i].items()
            assert np.array_equal(as_array(files[f"{key}.{i}.png"]), pixels(view_of(x, crop)))
            assert files[f"{key}.{i}.image.png"] == files[f"{key}.{i}.png"]


def test_variants_swap_tokens_by_the_samples_key(tmp_path: Path) -> None:
    source, dst = write_shards(tmp_path / "src", 1, 2), tmp_path / "dst"
    options = {"replace_fraction": 0.2, "variants": 2, "picture": "png", "outputs": ["reconstruction", "indices"]}
    run(source, dst, "tiny-f8", **options)
    files = read_tar(dst / "train-000000.tar")
    q = Discretizer.from_store("tiny-f8")
    recipe = Recipe("tiny-f8", replace_fraction=0.2, variants=2)
    for number in range(2):
        key, x = f"{number:04d}", pixels(picture(number))
        plain = q.discretize(x[None], outputs=["indices"])["indices"][0]
        for variant in range(2):
            indices = np.load(io.BytesIO(files[f"{key}.{variant}.indices.npy"]))
            assert np.array_equal(indices, replace_sample_tokens(plain, recipe, key, 0, variant, 16384))
            picture_of = q.decode(indices[None])[0, :, : x.shape[1], : x.shape[2]]
            assert np.array_equal(as_array(files[f"{key}.{variant}.png"]), picture_of)
        assert [view["variant"] for view in json.loads(files[f"{key}.views.json"])] == [0, 1]


def test_tokens_alone_have_a_contact_sheet_too(tmp_path: Path) -> None:
    source = write_shards(tmp_path / "src", 2, 3)
    run(source, tmp_path / "tokens", "tiny-f8", outputs=["indices"])
    run(source, tmp_path / "pictures", "tiny-f8", picture="png")
    sheets = [(tmp_path / name / "contact-sheet.html").read_text() for name in ("tokens", "pictures")]
    assert sheets[0] == sheets[1]
    assert sheets[0].count("<figure>") == 6
    ratios = [float(ratio) for ratio in re.findall(r"<figcaption>\d+: ([\d.]+) dB", sheets[0])]
    assert len(ratios) == 6
    assert all(15 < ratio < 40 for ratio in ratios)


def bad_shard(path: Path) -> Path:
    """Writes ten samples, five of which are not usable, for five reasons."""
    files = [file for i in range(5) for file in sample_files(i)]
    files += [("text.png", b"not a picture"), ("text.cls", b"1"), ("none.cls", b"1"), *sample_files(0)]
    files += [("cut.png", encoded(picture(9))[:300]), ("two.v1.png", encoded(picture(8))), ("two.v2.png", b"")]
    return write_tar(path, files)


def test_bad_samples_are_skipped_and_named(tmp_path: Path) -> None:
    path, dst = bad_shard(tmp_path / "src" / "bad.tar"), tmp_path / "dst"
    summary = run(path, dst, skip=True)
    assert (summary.samples, summary.skipped) == (5, 5)
    skipped = {sample["key"]: sample["reason"] for sample in manifest(dst, "bad.tar")["skipped"]}
    for key, reason in {
        "text": "a whole JPEG, PNG, PPM, BMP, TIFF or WebP",
        "none": "no picture",
        "0000": "the key was there before",
        "cut": "a whole JPEG, PNG, PPM, BMP, TIFF or WebP",
        "two": "several pictures",
    }.items():
        assert reason in skipped[key]
    assert sorted(read_tar(dst / "bad.tar")) == sorted(
        f"{i:04d}.{field}" for i in range(5) for field in ("jpg", "cls")
    )


def test_the_first_bad_sample_ends_the_job_and_leaves_whole_shards(tmp_path: Path) -> None:
    source, dst = write_shards(tmp_path / "src", 2), tmp_path / "dst"
    bad_shard(source / "z-bad.tar")
    with pytest.raises(SampleFailed, match=r"z-bad\.tar, sample text: png: 13 bytes"):
        run(source, dst)
    left = contents(dst)
    assert not [name for name in left if "bad" in name or ".precompute-" in name]
    assert run(source, dst, skip=True).samples == 15


@pytest.mark.parametrize("left", [0, 700, 5000])
def test_a_shard_that_was_cut_off_fails_or_is_counted(tmp_path: Path, left: int) -> None:
    source, dst = write_shards(tmp_path / "src", 1), tmp_path / "dst"
    path = source / "train-000000.tar"
    path.write_bytes(path.read_bytes()[:left])
    write_tar(source / "whole.tar", sample_files(9))
    place = "sample 000." if left == 5000 else "after the last sample"
    reason = "damaged shard" if left else "not a tar archive, but an empty file"
    with pytest.raises(SampleFailed, match=rf"train-000000\.tar, {place}: {reason}"):
        run(source, dst)
    assert not (dst / path.name).exists()
    summary = run(source, dst, skip=True)
    assert summary.skipped == 1
    assert summary.samples - 1 == len([name for name in read_tar(dst / path.name) if name.endswith(".jpg")]) < 5


def test_an_empty_shard_gives_an_empty_one_and_a_job_without_samples_fails(tmp_path: Path) -> None:
    write_tar(tmp_path / "src" / "a.tar", [])
    with pytest.raises(NoSamples, match="not one sample could be made, 0 were skipped"):
        run(tmp_path / "src", tmp_path / "dst")
    write_tar(tmp_path / "src" / "b.tar", sample_files(1))
    summary = run(tmp_path / "src", tmp_path / "dst")
    assert (summary.shards, summary.samples) == (2, 1)
    assert read_tar(tmp_path / "dst" / "a.tar") == {}


def test_folders_of_pictures_become_shards_with_classes(tmp_path: Path) -> None:
    for i, name in enumerate(("tabby/1.png", "tabby/1.jpg", "acorn/x.y.png", "acorn/z.webp")):
        path = tmp_path / "src" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(i).save(path)
    dst = tmp_path / "dst"
    with pytest.raises(SampleFailed, match=r"sample tabby/1: the key was there before"):
        run(tmp_path / "src", dst, pictures_a_shard=10)
    (tmp_path / "src" / "tabby" / "1.jpg").unlink()
    run(tmp_path / "src", dst, pictures_a_shard=2)
    files = read_tar(dst / "000000.tar") | read_tar(dst / "000001.tar")
    assert {name: data for name, data in files.items() if name.endswith("cls")} == {
        "acorn/x_y.cls": b"0",
        "acorn/z.cls": b"0",
        "tabby/1.cls": b"1",
    }
    assert json.loads((dst / "precompute.json").read_text())["classes"] == ["acorn", "tabby"]


def test_fields_are_kept_as_asked(tmp_path: Path) -> None:
    files = [("k.png", encoded(picture(0))), ("k.cls", b"1"), ("k.json", b"{}"), ("k.jpg.txt", b"t")]
    path = write_tar(tmp_path / "src" / "a.tar", files)
    run(path, tmp_path / "some", keep=["json"], picture="webp")
    assert list(read_tar(tmp_path / "some" / "a.tar")) == ["k.webp", "k.json"]
    run(path, tmp_path / "original", keep=["png"], picture="jpg")
    assert read_tar(tmp_path / "original" / "a.tar")["k.png"] == files[0][1]
    with pytest.raises(SampleFailed, match="the kept source field png has the name of an output field"):
        run(path, tmp_path / "twice", keep=["png"], picture="png")


def test_object_stores_on_both_sides(tmp_path: Path) -> None:
    source, fs = write_shards(tmp_path / "src", 2, 2), fsspec.filesystem("memory")
    for path in source.glob("*.tar"):
        fs.pipe_file(f"{tmp_path}/train/{path.name}", path.read_bytes())
    dst = f"memory://{tmp_path}/q"
    run(f"memory://{tmp_path}/train", dst)
    run(source, tmp_path / "dst")
    stored = {path.removeprefix(f"{tmp_path}/q/"): fs.cat_file(path) for path in fs.find(f"{tmp_path}/q")}
    assert set(stored) == set(contents(tmp_path / "dst"))
    for name in ("train-000000.tar", "train-000001.tar", "precompute.json", "contact-sheet.html"):
        assert stored[name] == (tmp_path / "dst" / name).read_bytes()
    assert run(f"memory://{tmp_path}/train", dst).shards_kept == 2


def test_two_jobs_on_one_folder_end_with_the_same_bytes(tmp_path: Path) -> None:
    source, dst = write_shards(tmp_path / "src", 6, 4), tmp_path / "dst"
    failed: list[BaseException] = []

    def job() -> None:
        try:
            run(source, dst)
        except BaseException as error:
            failed.append(error)

    jobs = [threading.Thread(target=job) for _ in range(2)]
    for thread in jobs:
        thread.start()
    for thread in jobs:
        thread.join()
    assert not failed
    run(source, tmp_path / "alone")
    assert contents(dst) == contents(tmp_path / "alone")


def test_a_full_disk_ends_the_job_and_nothing_half_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, dst = write_shards(tmp_path / "src"), tmp_path / "dst"
    write, room = ShardWriter.write, 30_000

    def write_while_there_is_room(self: ShardWriter, data: bytes) -> int:
        if self.nbytes + len(data) > room:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, data)

    with monkeypatch.context() as patched:
        patched.setattr(ShardWriter, "write", write_while_there_is_room)
        with pytest.raises(OSError, match="No space left"):
            run(source, dst, picture="png")
    assert not [name for name in contents(dst) if name != "precompute.json"]
    assert run(source, dst, picture="png").samples == 15


@pytest.mark.parametrize("dst", ["src", "src/within", "src/../src"])
def test_source_and_target_are_apart(tmp_path: Path, dst: str) -> None:
    source = write_shards(tmp_path / "src")
    before = contents(tmp_path)
    with pytest.raises(InvalidInput, match="the source"):
        run(source, tmp_path / dst)
    with pytest.raises(InvalidInput, match="the source"):
        run(f"{source}/*.tar", source)
    assert contents(tmp_path) == before
    assert run(f"{source}/*.tar", source / "within").samples == 15
    assert run(source / "train-000000.tar", tmp_path).samples == 5


def test_a_codec_without_tokens_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    source = write_shards(tmp_path / "src", 1)
    with pytest.raises(InvalidInput, match="a codec that has a codebook"):
        run(source, tmp_path / "dst", outputs=["indices"])
    assert not list((tmp_path / "dst").glob("*.*"))
    with pytest.raises(InvalidInput, match="1 to 1024"):
        run(source, tmp_path / "dst", workers=0)


def test_too_large_for_the_codec_names_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "MAX_VIEW_PIXELS", 1000)
    source = write_shards(tmp_path / "src", 1)
    with pytest.raises(SampleFailed, match=r"40x40 = 1600 pixels .* --resize or --crop"):
        run(source, tmp_path / "dst")


def test_a_folder_remembers_nothing_of_jobs_that_ended(tmp_path: Path) -> None:
    dst = tmp_path / "dst"
    run(write_shards(tmp_path / "src", 1), dst)
    assert {path.name for path in dst.iterdir()} == {
        "precompute.json", "manifest", "contact-sheet.html", "train-000000.tar",
    }  # fmt: skip
    assert [entry.samples for entry in OutputFolder(str(dst)).entries()] == [5]
