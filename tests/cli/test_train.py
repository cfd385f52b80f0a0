"""`dat train-codec`: tells what it does, stops on Ctrl-C, continues, and names bad settings."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image

from dat_workers.codecs.file import read
from tests.conftest import DAT


def test_a_run_tells_what_it_does_and_a_resumed_one_keeps_the_record(pictures: Path, tmp_path: Path) -> None:
    command = [
        *DAT, "train-codec", str(pictures), "--out", str(tmp_path), "--name", "toy", "--steps", "40",
        "--batch", "2", "--crop", "32", "--ch-mult", "1,1", "--codebook-size", "64", "--half",
        "--validate", str(pictures), "--codebook-start", "0.1", "--device", "cpu",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines = [process.stderr.readline()]
    while not lines[-1].startswith("starting the codebook"):
        lines.append(process.stderr.readline())
        assert lines[-1], lines
    while len((tmp_path / "log.jsonl").read_text().splitlines()) < 10:
        assert process.poll() is None
    os.kill(process.pid, signal.SIGINT)
    printed, rest = process.communicate(timeout=60)
    assert process.returncode == 130, rest
    assert printed == ""  # nothing was made yet
    lines += rest.splitlines(keepends=True)
    in_order(
        lines, "preparing the training of toy", "reading pictures: 0 so far", "reading pictures: 3 pictures",
        "reading validation pictures: 0 so far", "reading validation pictures: 3 pictures", "step 1/40, ",
        "collecting latent vectors for the codebook: 0 of 512 vectors",
        "starting the codebook by k-means: 0 of 10 passes", "starting the codebook by k-means: 10 passes",
        "step 5/40, ", "stopped at step ",
    )  # fmt: skip
    assert re.fullmatch(
        r"step 5/40, \d+\.\d images/s, .* left, mse \d\.\d{4}, perceptual \d\.\d{4}, commitment \d\.\d{4}, "
        r"crops \d+\.\d\d dB, codebook \d+%\n",
        next(line for line in lines if line.startswith("step 5/40")),
    )
    record, curve = (tmp_path / "log.jsonl").read_text(), (tmp_path / "loss.svg").read_text()
    stopped_at = int(lines[-1].split()[3].rstrip(";"))
    assert [json.loads(line)["step"] for line in record.splitlines()] == list(range(1, stopped_at + 1))
    assert 1 <= len(list((tmp_path / "samples").iterdir())) <= 1 + stopped_at // 2
    assert "mse" in curve

    # As after a kill: entries of steps that the checkpoint does not have, and half a line.
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write(f'{{"step": {stopped_at + 1}, "mse": 99.0}}\n{{"step": 9')
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    in_order(
        finished.stderr.splitlines(), "reading pictures: 3 pictures", "reading validation pictures: 3 pictures",
        f"{tmp_path / 'log.jsonl'}: removing 2 lines after step {stopped_at}",
        f"continuing from step {stopped_at} of 40", f"step {stopped_at + 1}/40, ", "step 40/40, ",
    )  # fmt: skip
    whole = (tmp_path / "log.jsonl").read_text()
    assert whole.startswith(record)
    assert [json.loads(line)["step"] for line in whole.splitlines()] == list(range(1, 41))
    assert "dB on 3 pictures" in finished.stdout
    codec = read(tmp_path / "toy.safetensors")
    assert codec.spec.factor == 2
    assert codec.tensors["encoder.conv_in.weight"].dtype == torch.float16
    samples = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert samples == ["step-0000001.jpg", *(f"step-{step:07d}.jpg" for step in range(2, 41, 2))]
    with Image.open(tmp_path / "samples" / samples[-1]) as picture:
        assert picture.format == "JPEG"
        assert picture.size == (3 * 224, 2 * 224)  # three validation crops above their reconstructions
    svg = ElementTree.parse(tmp_path / "loss.svg").getroot()
    lines_drawn = svg.findall("{http://www.w3.org/2000/svg}polyline")
    points = [line.get("points", "").split() for line in lines_drawn]
    assert [len(p) for p in points] == [40, 40, 36, 6]  # mse, perceptual, commitment, discriminator
    assert points[0][0].split(",")[0] == "85.0"  # step 1 of 40, on the axis from 70 to 670
    assert points[0][-1].split(",")[0] == "670.0"


def in_order(lines: list[str], *starts: str) -> None:
    """Checks that for each of these starts there is a line, in this order; other lines may stand between them."""
    remaining = iter(lines)
    for start in starts:
        assert any(line.startswith(start) for line in remaining), (start, lines)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere"], "nowhere"),
        (["{pictures}", "--crop", "30"], "30"),
        (["{pictures}", "--steps", "0"], "steps is 0"),
        (["{pictures}", "--ch", "20"], "ch=20"),
        (["{pictures}", "--ch-mult", "1,b"], "--ch-mult: '1,b' is not usable; expected whole numbers with commas"),
        (["{pictures}", "--perceptual", "vgg"], "vgg"),
        (["{pictures}", "--name", "../evil"], "../evil"),
        (["{pictures}", "--codebook-start", "1", "--discriminator-start", "1"], "codebook_start is 1"),
    ],
)
def test_bad_settings_are_named(pictures: Path, tmp_path: Path, arguments: list[str], says: str) -> None:
    filled = [a.format(pictures=pictures) for a in arguments]
    command = [*DAT, "train-codec", *filled, "--out", str(tmp_path / "out")]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert finished.returncode == 1
    assert says in finished.stderr
    assert "Traceback" not in finished.stderr
