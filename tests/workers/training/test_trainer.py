"""Training, stopping and continuing."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from dat_workers.codecs.file import Origin, write
from dat_workers.codecs.spec import CodecError, CodecSpec
from dat_workers.images.encoded import decode_picture
from dat_workers.system.signals import handle_signals
from dat_workers.training.config import TrainConfig
from dat_workers.training.export import exported_weights
from dat_workers.training.progress import TrainProgress, throttled
from dat_workers.training.trainer import Trainer

SPEC = CodecSpec("toy-f2", ch=32, ch_mult=(1, 1), num_res_blocks=1, codebook_size=64, latent_dim=4)


def config(pictures: Path, out: Path, **changes: object) -> TrainConfig:
    settings = {"steps": 8, "batch": 4, "crop": 32, "validation": (pictures,), "validation_crop": 64}
    return TrainConfig(SPEC, (pictures,), out, **(settings | changes))  # type: ignore[arg-type]


def test_the_loss_falls_and_the_codebook_is_used(pictures: Path, tmp_path: Path) -> None:
    trainer = Trainer(config(pictures, tmp_path, steps=60, codebook_start=0.2, learning_rate=2e-3))
    losses = [trainer.train_step()["mse"] for _ in range(60)]
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    scores = trainer.evaluate()
    assert scores.pictures == 3
    assert scores.codebook_share > 0.25
    assert trainer.save_samples().stat().st_size > 1000


def test_a_resumed_run_is_the_undisturbed_run(pictures: Path, tmp_path: Path) -> None:
    """Over the start of the codebook and of the discriminator, to the last bit."""
    stages = {"codebook_start": 0.25, "discriminator_start": 0.6}
    whole = Trainer(config(pictures, tmp_path / "whole", **stages))
    for _ in range(8):
        terms = whole.train_step()
    assert "discriminator" in terms
    for _ in range(4):
        part = Trainer(config(pictures, tmp_path / "parts", **stages))
        part.train_step()
        part.train_step()
        part.save()
    assert part.step == whole.step == 8
    for name, tensor in whole.average.state_dict().items():
        assert torch.equal(tensor, part.average.state_dict()[name]), name


def test_other_settings_do_not_go_on(pictures: Path, tmp_path: Path) -> None:
    Trainer(config(pictures, tmp_path)).save()
    with pytest.raises(ValueError, match=r"batch.*\(4, 5\)"):
        Trainer(config(pictures, tmp_path, batch=5))


def test_file_that_is_no_checkpoint(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoint.pt").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"checkpoint\.pt is not a checkpoint"):
        Trainer(config(pictures, tmp_path))


def test_a_run_can_start_from_a_codec(pictures: Path, tmp_path: Path) -> None:
    trained = Trainer(config(pictures, tmp_path / "a", codebook_start=0.0))
    for _ in range(8):
        trained.train_step()
    file = tmp_path / "toy.safetensors"
    write(file, SPEC, exported_weights(trained.average, half=False), Origin.now("test", ""))
    going_on = Trainer(config(pictures, tmp_path / "b", init=file))
    assert going_on.evaluate() == trained.evaluate()
    going_on.train_step()
    other = CodecSpec("toy-f2", ch=64, ch_mult=(1, 1), num_res_blocks=1, codebook_size=64, latent_dim=4)
    with pytest.raises(CodecError, match="another shape"):
        Trainer(TrainConfig(other, (pictures,), tmp_path / "c", crop=32, init=file))


def test_a_second_signal_acts_as_it_did_before_the_run(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(config(pictures, tmp_path))
    noted: list[int] = []
    earlier: list[int] = []

    def interrupted_step() -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGTERM)
        noted.extend(trainer.received_signals)
        os.kill(os.getpid(), signal.SIGTERM)
        return {"mse": 1.0, "commitment": 1.0}

    monkeypatch.setattr(trainer, "train_step", interrupted_step)
    with handle_signals(lambda number, _: earlier.append(number), signal.SIGTERM):
        assert not trainer.run()
    assert noted == trainer.received_signals == earlier == [signal.SIGTERM]


def test_a_signal_ends_the_start_of_the_codebook_and_the_next_run_starts_the_same_one(
    pictures: Path, tmp_path: Path
) -> None:
    whole = Trainer(config(pictures, tmp_path / "whole", codebook_start=0.25))
    assert whole.run()

    def interrupt(progress: TrainProgress) -> None:
        if progress.activity == "starting the codebook by k-means":
            activities.append(progress.done)
            os.kill(os.getpid(), signal.SIGTERM)

    activities: list[int] = []
    part = Trainer(config(pictures, tmp_path / "part", codebook_start=0.25), interrupt)
    assert not part.run()
    assert activities == [0]
    assert part.step == 2
    again = Trainer(config(pictures, tmp_path / "part", codebook_start=0.25))
    assert again.run()
    for name, tensor in whole.average.state_dict().items():
        assert torch.equal(tensor, again.average.state_dict()[name]), name


def test_all_sample_pictures_of_a_run_show_the_same_crops(pictures: Path, tmp_path: Path) -> None:
    """Also where the pool's pictures are replaced all the time."""
    trainer = Trainer(config(pictures, tmp_path, validation=(), pool=2, codebook_start=0.0))
    for _ in range(8):
        trainer.train_step()
        trainer.save_samples()
    files = sorted((tmp_path / "samples").iterdir())
    assert [file.name for file in files] == [f"step-{step:07d}.jpg" for step in range(1, 9)]
    decoded = [decode_picture(file.read_bytes(), field=file.name).astype(int) for file in files]
    originals = [picture[:, :32] for picture in decoded]
    assert originals[0].shape == (3, 32, 4 * 32)
    assert all(np.abs(later - originals[0]).mean() < 2 for later in originals)
    assert np.abs(decoded[0][:, 32:] - decoded[-1][:, 32:]).mean() > 2


def test_progress_is_passed_on_at_the_ends_of_an_activity_and_now_and_then() -> None:
    passed_on: list[tuple[str, int]] = []
    report = throttled(lambda progress: passed_on.append((progress.activity, progress.done)), every_s=3600)
    for activity in ("reading", "training"):
        for done in range(6):
            report(TrainProgress(activity, done, 5, "steps"))
    assert passed_on == [("reading", 0), ("reading", 5), ("training", 0), ("training", 5)]
