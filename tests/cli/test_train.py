"""`dat train-codec`: stops on Ctrl-C, continues, and names bad settings."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch

from dat_workers.codecs.file import read
from tests.conftest import DAT


def test_command_line_stops_on_ctrl_c_goes_on_and_gives_a_codec(pictures: Path, tmp_path: Path) -> None:
    command = [
        *DAT, "train-codec", str(pictures), "--out", str(tmp_path), "--name", "toy", "--steps", "40",
        "--batch", "2", "--crop", "32", "--ch-mult", "1,1", "--codebook-size", "64", "--half",
        "--validate", str(pictures), "--codebook-start", "0.1", "--device", "cpu",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert "reading" in process.stdout.readline()
    while not (tmp_path / "log.jsonl").exists():
        assert process.poll() is None
    os.kill(process.pid, signal.SIGINT)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 130, said
    assert "stopped at step" in said
    assert (tmp_path / "checkpoint.pt").exists()
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr
    assert "dB on 3 pictures" in finished.stdout
    codec = read(tmp_path / "toy.safetensors")
    assert codec.spec.factor == 2
    assert codec.tensors["encoder.conv_in.weight"].dtype == torch.float16


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
