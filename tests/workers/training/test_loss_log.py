"""The record of a run's losses, over its interruptions, and the curve that is drawn from it."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from dat_workers.training.loss_curve import MAX_POINTS, loss_curve
from dat_workers.training.loss_log import LossLog


def points(svg: str) -> list[list[list[float]]]:
    root = ElementTree.fromstring(svg)
    lines = root.findall("{http://www.w3.org/2000/svg}polyline")
    return [[[float(n) for n in p.split(",")] for p in line.get("points", "").split()] for line in lines]


def test_an_entry_has_the_means_since_the_entry_before(tmp_path: Path) -> None:
    log = LossLog(tmp_path, 0, 100)
    log.add({"mse": 0.5, "perceptual": 2.0})
    log.add({"mse": 0.3, "perceptual": 1.0, "discriminator": 1.5})
    log.write(2, 12.4, {"codebook": 0.5})
    log.add({"mse": 0.04, "perceptual": 1.0})
    log.write(3, 13.0, {})
    first, second = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert first == {
        "step": 2, "seconds": 12, "mse": 0.4, "perceptual": 1.5, "discriminator": 1.5,
        "crop_psnr_db": pytest.approx(10), "codebook": 0.5,
    }  # fmt: skip
    assert second == {"step": 3, "seconds": 13, "mse": 0.04, "perceptual": 1.0, "crop_psnr_db": pytest.approx(20)}


def test_crops_that_are_reconstructed_exactly_have_a_psnr(tmp_path: Path) -> None:
    log = LossLog(tmp_path, 0, 100)
    log.add({"mse": 0.0})
    assert log.means()["crop_psnr_db"] == pytest.approx(106.02, abs=0.01)


@pytest.mark.parametrize("end", ["", '{"step": 4, "mse"', '{"step": 4, "mse": 1.0}\n{"step": 5, "mse": 1.0}'])
def test_a_resumed_run_keeps_the_entries_up_to_its_checkpoint(tmp_path: Path, end: str) -> None:
    kept = '{"step": 1, "mse": 1.0}\n{"step": 2, "mse": 0.5}\n'
    (tmp_path / "log.jsonl").write_text(kept + end)
    log = LossLog(tmp_path, 2, 10)
    assert log.dropped == len(end.splitlines())
    assert (tmp_path / "log.jsonl").read_text() == kept + end  # as long as there is no new entry
    for step in (3, 4):
        log.add({"mse": 0.25})
        log.write(step, 1.0, {})
    lines = (tmp_path / "log.jsonl").read_text().splitlines(keepends=True)
    assert "".join(lines[:2]) == kept
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]
    assert len(points((tmp_path / "loss.svg").read_text())[0]) == 4


def test_the_curve_puts_values_where_they_belong() -> None:
    svg = loss_curve({"mse": [(0, 1.0), (50, 0.1), (100, 0.01)], "commitment": [(0, 0.0), (100, 0.1)]}, 100)
    mse, commitment = points(svg)
    assert mse == [[70, 30], [370, 200], [670, 370]]  # the scale is logarithmic, from 1 at the top to 0.01
    assert commitment == [[670, 200]]  # 0 has no place on it
    assert "mse 0.01<" in svg
    assert "not used yet" in loss_curve({"discriminator": []}, 100)


def test_a_long_curve_is_drawn_from_means() -> None:
    steps = 4 * MAX_POINTS
    (line,) = points(loss_curve({"mse": [(s, 0.1 if s % 2 else 0.3) for s in range(steps)]}, steps))
    assert len(line) == MAX_POINTS
    assert {y for _, y in line} == {points(loss_curve({"mse": [(0, 0.2), (1, 0.99), (2, 0.1)]}, 9))[0][0][1]}
