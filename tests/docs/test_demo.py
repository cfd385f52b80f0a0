"""`make demo` draws the picture of README.md and prints its figures."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT, dat_serve


def test_demo_draws_its_picture(tmp_path: Path) -> None:
    picture = tmp_path / "demo.png"
    with dat_serve("--codec", "tiny-f8", "--local", env={"OMP_WAIT_POLICY": "PASSIVE"}) as (url, _):
        short = ["--rounds", "1", "--steps", "20"]
        demo = [sys.executable, "examples/demo.py", "--url", url, "--out", str(picture), *short]
        finished = subprocess.run(demo, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    assert re.search(r"PSNR \d\d\.\d\d dB", finished.stdout)
    trained = re.search(r"loss ([\d.]+) -> ([\d.]+) in 20 steps.* held-out crops (\d+)% -> (\d+)%", finished.stdout)
    assert trained, finished.stdout
    assert float(trained[2]) < float(trained[1])
    assert int(trained[4]) > int(trained[3])
    assert re.search(r"(?!0\.0%)\d+\.\d% of the tokens .* changed", finished.stdout)
    assert finished.stdout.strip().splitlines()[-1] == f"picture: {picture}"
    assert picture.stat().st_size > 100_000
