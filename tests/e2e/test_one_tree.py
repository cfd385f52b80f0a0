"""One folder with everything that is odd about folders of pictures, read by each command alike."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from torchvision.datasets import ImageFolder
from typer.testing import CliRunner

from dat_client.dataset_format.left_out import LeftOut
from dat_service.cli.main import app
from dat_service.cli.output import print_left_out
from dat_workers.errors import InvalidInput
from dat_workers.images.crops import PictureReader, centre_crop, sample_crops
from dat_workers.training.data import CropPool
from tests.workers.precompute.shards import as_array, picture, read_tar

SIDE = 24  # smaller than every picture, so that no crop is enlarged

Pictures = dict[str, np.ndarray]


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree; the pixels that its pictures must have are in `expected_pictures`."""
    root = tmp_path_factory.mktemp("tree")
    for folder in ("acorn", "birch", "cedar", "dates", ".hidden", "__MACOSX/acorn", "../elsewhere/deeper"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / "elm").symlink_to(root.parent / "elsewhere")
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "x" * 2_000_000, zip=True)
    files = {
        "acorn/plain.png": encoded(picture(0), "PNG"),
        "acorn/sixteen.png": encoded(Image.fromarray(sixteen_bits()), "PNG"),
        "acorn/palette.png": encoded(picture(2).quantize(16), "PNG"),
        "acorn/text.png": encoded(picture(3), "PNG", pnginfo=text),
        "acorn/._plain.png": b"of a Mac",
        "acorn/.DS_Store": b"of a Mac",
        "acorn/anim.gif": encoded(picture(5), "GIF"),
        "acorn/phone.heic": b"of a telephone",
        "acorn/notes.txt": b"text",
        "cedar/only.tif": encoded(picture(6), "TIFF"),
        "dates/only.gif": encoded(picture(7), "GIF"),
        ".hidden/x.png": encoded(picture(8), "PNG"),
        "__MACOSX/acorn/plain.png": b"of a Mac",
        "elm/e.bmp": encoded(picture(9), "BMP"),
        "elm/deeper/f.webp": encoded(picture(10), "WEBP", lossless=True),
    }
    for name, content in files.items():
        (root / name).write_bytes(content)
    os.mkfifo(root / "acorn" / "fifo.png")
    (root / "acorn" / "dangling.png").symlink_to("nowhere.png")
    # The first byte of a process's memory cannot be read, not even by root: a regular file that gives EIO.
    (root / "acorn" / "unreadable.png").symlink_to("/proc/self/mem")
    return root


def sixteen_bits() -> np.ndarray:
    return (np.arange(30 * 40, dtype=np.uint32) * 54).astype(np.uint16).reshape(30, 40)


def expected_pictures() -> Pictures:
    """The pixels uint8 [3,H,W] of each picture that is read, by key."""
    plain = {"acorn/plain": 0, "acorn/text": 3, "cedar/only": 6, "elm/e": 9, "elm/deeper/f": 10}
    found = {key: np.asarray(picture(number)).transpose(2, 0, 1) for key, number in plain.items()}
    found["acorn/palette"] = np.asarray(picture(2).quantize(16).convert("RGB")).transpose(2, 0, 1)
    found["acorn/sixteen"] = np.stack([(sixteen_bits() >> 8).astype(np.uint8)] * 3)
    return dict(sorted(found.items()))


LEFT_OUT = (
    "acorn/._plain.png", "acorn/.DS_Store", "acorn/anim.gif", "acorn/phone.heic", "acorn/notes.txt",
    "dates/only.gif", "acorn/fifo.png", "acorn/dangling.png", "acorn/unreadable", ".hidden", "__MACOSX",
)  # fmt: skip


def precomputed(tree: Path, tmp_path: Path) -> tuple[Pictures, str]:
    options = ("--codec", "identity", "--format", "png", "--threads", "1", "--on-error", "skip")
    done = CliRunner().invoke(app, ["precompute", str(tree), str(tmp_path / "dst"), *options])
    assert done.exit_code == 0, done.output
    entry = json.loads((tmp_path / "dst" / "manifest" / "000000.tar.json").read_text())
    skipped = {sample["key"]: sample["reason"] for sample in entry["skipped"]}
    assert sorted(skipped) == ["acorn/dangling", "acorn/unreadable", "birch/", "dates/"]
    assert skipped["birch/"] == "a class folder without pictures"
    assert skipped["dates/"] == "a class folder without pictures: it has 1 .gif"
    files = read_tar(tmp_path / "dst" / "000000.tar")
    recipe = json.loads((tmp_path / "dst" / "precompute.json").read_text())
    theirs = ImageFolder(tree, allow_empty=True)
    left = [name for name in theirs.classes if name not in (".hidden", "__MACOSX")]
    assert left == recipe["classes"] == ["acorn", "birch", "cedar", "dates", "elm"]
    keys = [name.removesuffix(".png") for name in files if name.endswith(".png")]
    assert {key: int(files[f"{key}.cls"]) for key in keys} == {key: left.index(key.split("/")[0]) for key in keys}
    return {key: as_array(files[f"{key}.png"]) for key in keys}, done.output


def trained_on(tree: Path, tmp_path: Path) -> tuple[Pictures, str]:
    pool = CropPool(tree, SIDE, capacity=100, seed=0, skip=True)
    keys = [place.rpartition("sample ")[2] for place, _ in PictureReader(tree, skip=True)]
    assert pool.complete
    return dict(zip(keys, pool.pool, strict=True)), printed(pool.reader.left_out)


def verified_on(tree: Path, tmp_path: Path) -> tuple[Pictures, str]:
    left_out = LeftOut()
    crops = sample_crops([str(tree)], SIDE, 100, skip=True, left_out=left_out)
    expected = expected_pictures()
    assert all((crop == centre_crop(expected[key], SIDE)).all() for key, crop in zip(expected, crops, strict=True))
    return expected, printed(left_out)


def discretized(tree: Path, tmp_path: Path) -> tuple[Pictures, str]:
    command = ["discretize", str(tree), "--out", str(tmp_path / "q"), "--codec", "identity"]
    done = CliRunner().invoke(app, [*command, "--on-error", "skip"])
    assert done.exit_code == 0, done.output
    paths = {
        str(path.relative_to(tmp_path / "q").with_suffix("")): path for path in (tmp_path / "q").rglob("*.png")
    }
    return {key: as_array(path.read_bytes()) for key, path in sorted(paths.items())}, done.output


def printed(left_out: LeftOut) -> str:
    text = io.StringIO()
    with contextlib.redirect_stderr(text):
        print_left_out(left_out.rows)
    return text.getvalue()


@pytest.mark.parametrize("read", [precomputed, trained_on, verified_on, discretized])
def test_all_commands_read_the_same_pictures_and_name_what_they_leave_out(
    tree: Path, tmp_path: Path, read: Callable[[Path, Path], tuple[Pictures, str]]
) -> None:
    found, output = read(tree, tmp_path)
    expected = expected_pictures()
    assert sorted(found) == sorted(expected)
    for key, pixels in expected.items():
        assert np.array_equal(found[key], pixels), key
    assert [name for name in LEFT_OUT if name not in output] == []


@pytest.fixture
def refusals(tree: Path, tmp_path: Path) -> list[str]:
    runner = CliRunner()
    precompute = runner.invoke(app, ["precompute", str(tree), str(tmp_path / "dst"), "--codec", "identity"])
    discretize = runner.invoke(app, ["discretize", str(tree), "--out", str(tmp_path / "q"), "--codec", "identity"])
    assert (precompute.exit_code, discretize.exit_code) == (1, 1)
    messages = [precompute.output, discretize.output]
    for read in (lambda: CropPool(tree, SIDE, 100, 0), lambda: sample_crops([tree], SIDE, 100)):
        with pytest.raises(InvalidInput) as caught:
            read()
        messages.append(str(caught.value))
    return messages


def test_all_commands_refuse_it_without_on_error_skip(tree: Path, refusals: list[str], tmp_path: Path) -> None:
    assert all("acorn/dangling.png" in message for message in refusals)
    for name in (
        "birch/ (a class folder without pictures)",
        "dates/ (a class folder without pictures: it has 1 .gif)",
    ):
        assert f"{tree}/{name}" in refusals[0]
    assert not (tmp_path / "dst").exists()
    # `dat discretize` names what it cannot do, and does the rest.
    assert len(list((tmp_path / "q").rglob("*.png"))) == len(expected_pictures())


def test_a_cycle_of_links_is_refused_by_all(tmp_path: Path) -> None:
    (tmp_path / "src" / "cat").mkdir(parents=True)
    picture(0).save(tmp_path / "src" / "cat" / "1.png")
    (tmp_path / "src" / "cat" / "loop").symlink_to("..")
    message = f"{tmp_path}/src/cat/loop is a link to .., a folder that contains this link"
    source = str(tmp_path / "src")
    for command in (
        ["precompute", source, str(tmp_path / "dst")],
        ["discretize", source, "--out", str(tmp_path / "q")],
    ):
        done = CliRunner().invoke(app, [*command, "--codec", "identity", "--on-error", "skip"])
        assert done.exit_code == 1
        assert message in done.output
    for read in (
        lambda: CropPool(source, SIDE, 100, 0, skip=True),
        lambda: sample_crops([source], SIDE, 9, skip=True),
    ):
        with pytest.raises(InvalidInput, match="a folder that contains this link"):
            read()
