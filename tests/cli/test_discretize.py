"""`dat discretize`: files in, files out."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from PIL import Image, ImageOps
from typer.testing import CliRunner

from dat_client.dataset_format.pictures import orientation_exif
from dat_service.cli.main import app
from dat_workers.discretizer import Discretizer
from dat_workers.engines.config import EngineConfig
from tests.conftest import DAT, crop
from tests.raw_requests import encoded


def dat_discretize(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [*DAT, "discretize", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_good_pictures_are_written_and_bad_ones_named(tmp_path: Path) -> None:
    photograph = crop("coffee", 100, 150)
    (tmp_path / "good.png").write_bytes(encoded(photograph, "PNG"))
    (tmp_path / "bad.png").write_bytes(b"no picture")
    out = tmp_path / "out"
    done = dat_discretize(tmp_path / "bad.png", tmp_path / "good.png", "--out", out, "--indices")
    assert done.returncode == 1
    assert "bad.png" in done.stderr
    assert "Traceback" not in done.stderr
    expected = Discretizer.from_store("tiny-f8", EngineConfig(device="cpu")).discretize(
        photograph[None], outputs=("reconstruction", "indices")
    )
    written = np.asarray(Image.open(out / "good.png")).transpose(2, 0, 1)
    assert np.abs(written.astype(int) - expected["reconstruction"][0]).mean() < 0.1
    assert (np.load(out / "good.npy") == expected["indices"][0]).mean() > 0.99
    assert sorted(p.name for p in out.iterdir()) == ["good.npy", "good.png"]


def test_two_pictures_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for path in (first := tmp_path / "a.png", second := tmp_path / "b" / "a.jpg"):
        path.write_bytes(b"")
    done = dat_discretize(first, second, "--out", tmp_path / "out")
    assert done.returncode == 1
    assert f"the same file {tmp_path / 'out' / 'a.png'}: {first}, {second}" in done.stderr
    assert not (tmp_path / "out").exists()


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["discretize", *map(str, arguments), "--codec", "identity"])


def test_folders_keep_their_sub_folders_and_paths_may_be_links(tmp_path: Path) -> None:
    photograph = crop("coffee", 40, 50)
    for name in ("a/1.png", "b/1.png", "b/deep/x.y.png", "loose.png"):
        path = tmp_path / "src" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(photograph, "PNG"))
    (tmp_path / "link").symlink_to("src")
    done = invoke(tmp_path / "link", "--out", tmp_path / "q")
    assert done.exit_code == 0, done.output
    written = {str(p.relative_to(tmp_path / "q")): p for p in (tmp_path / "q").rglob("*") if p.is_file()}
    assert sorted(written) == ["a/1.png", "b/1.png", "b/deep/x.y.png", "loose.png"]
    for path in written.values():
        assert np.array_equal(np.asarray(Image.open(path)).transpose(2, 0, 1), photograph)
    again = invoke(tmp_path / "src", "--out", tmp_path / "src" / "q")
    assert again.exit_code == 1
    assert f"a folder outside of the pictures in {tmp_path}/src" in again.output
    twice = invoke(tmp_path / "src" / "a", tmp_path / "src" / "b", "--out", tmp_path / "other")
    assert f"the same file {tmp_path}/other/1.png: {tmp_path}/src/a/1.png, {tmp_path}/src/b/1.png" in twice.output
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(("on_error", "status"), [("fail", 1), ("skip", 0)])
def test_the_exit_status_of_bad_files_depends_on_on_error(tmp_path: Path, on_error: str, status: int) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "good.png").write_bytes(encoded(crop("coffee", 40, 50), "PNG"))
    (tmp_path / "src" / "bad.png").write_bytes(b"no picture")
    (tmp_path / "src" / "other.gif").write_bytes(b"GIF8")
    done = invoke(tmp_path / "src", "--out", tmp_path / "q", "--on-error", on_error)
    assert done.exit_code == status
    assert f"skipped: {tmp_path}/src/bad.png: 10 bytes" in done.output
    assert f"left out: 1, since .gif files are not read:\n  {tmp_path}/src/other.gif" in done.output
    assert [path.name for path in (tmp_path / "q").iterdir()] == ["good.png"]
    (tmp_path / "src" / "good.png").unlink()
    assert (
        invoke(tmp_path / "src", "--out", tmp_path / "q", "--on-error", on_error).exit_code == 1
    )  # not one picture


def test_a_telephones_picture_needs_resize(tmp_path: Path) -> None:
    photograph = Image.fromarray(crop("coffee", 300, 400).transpose(1, 2, 0)).resize((4000, 3000))
    photograph.save(tmp_path / "phone.jpg", quality=80)
    done = invoke(tmp_path / "phone.jpg", "--out", tmp_path / "q")
    assert done.exit_code == 1
    assert "phone.jpg: 4000x3000 = 12000000 pixels is not usable; expected at most" in done.output
    assert "or --resize 512 to scale it down first" in done.output
    done = invoke(tmp_path / "phone.jpg", "--out", tmp_path / "q", "--resize", "256")
    assert done.exit_code == 0, done.output
    with Image.open(tmp_path / "phone.jpg") as stored:
        expected = stored.resize((341, 256), Image.Resampling.BILINEAR)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "q" / "phone.png")), np.asarray(expected))


@pytest.mark.parametrize("upright", [False, True])
def test_x_and_q_are_turned_alike_by_a_viewer(tmp_path: Path, upright: bool) -> None:
    photograph = Image.fromarray(crop("coffee", 40, 50).transpose(1, 2, 0))
    photograph.save(tmp_path / "x.png", exif=orientation_exif(6))
    options = ["--upright"] if upright else []
    assert invoke(tmp_path / "x.png", "--out", tmp_path / "q", *options).exit_code == 0
    with Image.open(tmp_path / "x.png") as x, Image.open(tmp_path / "q" / "x.png") as q:
        assert q.size == ((40, 50) if upright else (50, 40))
        assert q.getexif().get(0x0112) == (None if upright else 6)
        seen_by_viewer = [np.asarray(ImageOps.exif_transpose(picture)) for picture in (x, q)]
    assert np.array_equal(*seen_by_viewer)


def test_names_that_are_not_utf8_are_written_and_printed(tmp_path: Path) -> None:
    pictures = Path(os.fsdecode(os.fsencode(tmp_path) + b"/cafe\xe9"))
    pictures.mkdir()
    for name in ("a.png", os.fsdecode(b"\xff.png")):
        (pictures / name).write_bytes(encoded(crop("coffee", 40, 50), "PNG"))
    done = dat_discretize(pictures, "--out", tmp_path / "out", "--codec", "identity")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [f"{tmp_path}/out/a.png", f"{tmp_path}/out/\\udcff.png"]
    assert sorted(os.listdir(os.fsencode(tmp_path / "out"))) == [b"a.png", b"\xff.png"]


def test_a_picture_in_a_folder_that_is_also_named_alone_is_refused(tmp_path: Path) -> None:
    (tmp_path / "src" / "a").mkdir(parents=True)
    path = tmp_path / "src" / "a" / "1.png"
    path.write_bytes(encoded(crop("coffee", 40, 50), "PNG"))
    done = invoke(tmp_path / "src", path, "--out", tmp_path / "out")
    assert done.exit_code == 1
    assert f"{path} is named twice" in done.output
    assert not (tmp_path / "out").exists()
