"""README's code runs as it stands, and what it names exists."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

from tests.conftest import DAT, ROOT, dat_serve

README = (ROOT / "README.md").read_text()


def test_code_blocks_run(ray_url: str) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) >= 2
    exec(compile("\n".join(blocks).replace("127.0.0.1:8000", urlsplit(ray_url).netloc), "README.md", "exec"), {})


def test_files_and_commands_exist() -> None:
    for link in re.findall(r"\]\((?!http)(.+?)\)", README):
        assert (ROOT / link).is_file(), link
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"make (\w+)", README):
        assert re.search(rf"^{target}:", makefile, re.M), target
    for command in set(re.findall(r"`dat ([a-z-]+)`", README)):
        assert subprocess.run([*DAT, command, "--help"], capture_output=True, timeout=60).returncode == 0, command


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
