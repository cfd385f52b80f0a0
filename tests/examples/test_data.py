"""The examples read folders and samples by the rules of `dat precompute`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT
from tests.workers.precompute.shards import as_array, encoded, picture


@pytest.fixture
def data() -> ModuleType:
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        import training.data
    finally:
        sys.path.pop(0)
    return training.data


def test_a_folder_has_the_pictures_and_classes_of_precompute(
    data: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a/1.png", "c/1.tif", "c/._1.png", "c/2.gif", ".cache/1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(encoded(picture(0), "TIFF" if name.endswith("tif") else "PNG"))
    values = np.arange(600, dtype=np.uint16).reshape(20, 30) * 109
    Image.fromarray(values).save(tmp_path / "a" / "2.png")
    os.mkfifo(tmp_path / "c" / "3.png")
    (tmp_path / "b").symlink_to("a")
    folder = data.Folder([str(tmp_path)], lambda x, label: (x.numpy(), label))
    names = [(str(Path(path).relative_to(tmp_path)), label) for path, label in folder.samples]
    assert names == [("a/1.png", 0), ("a/2.png", 0), ("b/1.png", 1), ("b/2.png", 1), ("c/1.tif", 2)]
    assert np.array_equal(folder[1][0], np.stack([(values >> 8).astype(np.uint8)] * 3))
    assert np.array_equal(folder[4][0], as_array(encoded(picture(0))))
    left_out = capsys.readouterr().err
    assert all(name in left_out for name in ("c/._1.png", "c/2.gif", ".cache", "c/3.png"))
    (tmp_path / "bb").mkdir()
    with pytest.raises(data.DataError, match=r"1 names of .* read: bb/ \(a class folder without pictures\)"):
        data.Folder([str(tmp_path)], None)
    (tmp_path / "bb" / "loop").symlink_to("..")
    with pytest.raises(data.DataError, match="a folder that contains this link"):
        data.Folder([str(tmp_path)], None)


def test_the_picture_of_a_sample_is_that_of_precompute(data: ModuleType) -> None:
    sample = {"__key__": "k", "seg.png": b"", "cls": b"1", "tif": encoded(picture(3), "TIFF")}
    assert np.array_equal(data.picture_of(sample).numpy(), as_array(encoded(picture(3))))
    with pytest.raises(data.DataError, match=r"no picture .* among its fields: cls"):
        data.picture_of({"__key__": "k", "cls": b"1"})
    assert data.is_shards(["a.tar", "b.TGZ"])
    assert not data.is_shards(["photos"])
