"""`dat discretize`: files in, files out."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
from PIL import Image

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
