"""`dat train-codec`: the terms, the codebook, stopping and going on."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dat_workers.codecs.file import Origin, read, write
from dat_workers.codecs.networks.vqgan import VQGAN, Codebook
from dat_workers.codecs.spec import CodecError, CodecSpec
from dat_workers.training.config import TrainConfig
from dat_workers.training.data import CropPool
from dat_workers.training.export import exported_weights
from dat_workers.training.losses import adaptive_weight, discriminator_loss, ssim, structure_term
from dat_workers.training.quantizer import EmaQuantizer
from dat_workers.training.trainer import Trainer
from tests.conftest import DAT, photograph

SPEC = CodecSpec("toy-f2", ch=32, ch_mult=(1, 1), num_res_blocks=1, codebook_size=64, latent_dim=4)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    for name in ("astronaut", "chelsea", "coffee"):
        Image.fromarray(photograph(name)[:, ::2, ::2].transpose(1, 2, 0)).save(folder / f"{name}.jpg")
    return folder


def config(pictures: Path, out: Path, **changes: object) -> TrainConfig:
    settings = {"steps": 8, "batch": 4, "crop": 32, "validation": (pictures,), "validation_crop": 64}
    return TrainConfig(SPEC, (pictures,), out, **(settings | changes))  # type: ignore[arg-type]


def test_the_loss_falls_and_the_codebook_is_used(pictures: Path, tmp_path: Path) -> None:
    trainer = Trainer(config(pictures, tmp_path, steps=60, codebook_start=0.2, learning_rate=2e-3))
    losses = [trainer.train_step()["mse"] for _ in range(60)]
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    scores = trainer.evaluate()
    assert scores.pictures == 3
    assert scores.used > 0.25
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
    with pytest.raises(ValueError, match=r"checkpoint\.pt is no checkpoint"):
        Trainer(config(pictures, tmp_path))


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


def test_codebook_follows_its_tokens_and_revives_the_dead() -> None:
    torch.manual_seed(0)
    codebook = Codebook(16, 4)
    quantizer = EmaQuantizer(codebook, decay=0.8)
    latents = torch.randn(4096, 4)
    quantizer.initialise(latents)
    shifted = torch.randn(4, 4, 16, 16) + 5
    for _ in range(60):
        quantized, commitment, indices = quantizer(shifted, learn=True, revive=True)
    assert commitment < 1.0  # the codebook came after the latents: before, it was about 100
    assert len(indices.unique()) == 16
    assert quantizer.usage() > 0.5
    quantized, _, indices = quantizer(shifted, learn=False, revive=False)
    assert torch.allclose(quantized, codebook.lookup(indices))


@pytest.mark.parametrize("half", [False, True])
def test_export_is_the_same_codec(half: bool) -> None:
    torch.manual_seed(0)
    model = VQGAN(SPEC).eval()
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        model.quant_conv.bias.add_(3)  # type: ignore[union-attr]
        z = model.latents(x)
        model.quantize.embedding.weight.copy_(z.permute(0, 2, 3, 1).reshape(-1, 4)[:64])
        kept = VQGAN(SPEC).eval()
        kept.load_state_dict(exported_weights(model, half=half))
        assert kept.quantize.embedding.weight.mean(0).abs().max() < 1e-3
        assert (kept.encode(x) == model.encode(x)).float().mean() > (0.9 if half else 0.99)
        tokens = model.encode(x)
        assert (kept.decode(tokens) - model.decode(tokens)).abs().max() < (0.02 if half else 1e-3)


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


def test_straight_through_passes_the_gradient_on() -> None:
    quantizer = EmaQuantizer(Codebook(8, 4))
    z = torch.randn(1, 4, 2, 2, requires_grad=True)
    quantized, _, _ = quantizer(z, learn=False, revive=False)
    upstream = torch.randn_like(quantized)
    quantized.backward(upstream)
    assert z.grad is not None
    assert torch.equal(z.grad, upstream)


def test_kmeans_needs_enough_latents() -> None:
    with pytest.raises(ValueError, match=r"7 latent vectors.*8"):
        EmaQuantizer(Codebook(8, 4)).initialise(torch.randn(7, 4))


def test_terms_know_right_from_wrong() -> None:
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    noisy = (x + 0.3 * torch.randn_like(x)).clamp(-1, 1)
    assert ssim(x, x) == pytest.approx(1, abs=1e-5)
    assert ssim(x, noisy) < 0.95
    assert structure_term(x, x) < 1e-4 < structure_term(x, noisy)
    assert discriminator_loss(torch.full((4,), 2.0), torch.full((4,), -2.0)) == 0
    assert discriminator_loss(torch.zeros(4), torch.zeros(4)) == 1


def test_adaptive_weight_is_the_ratio_of_gradients() -> None:
    weight = torch.ones(3, requires_grad=True)
    assert adaptive_weight((weight * 6).sum(), (weight * 2).sum(), weight) == pytest.approx(3, rel=1e-4)


def test_crops_depend_on_seed_and_number_alone(pictures: Path) -> None:
    one, other = (CropPool((pictures,), 32, capacity=10, seed=1) for _ in range(2))
    one.batch(0, 4)
    assert torch.equal(one.batch(5, 4), other.batch(5, 4))
    assert not torch.equal(one.batch(5, 4), one.batch(6, 4))
    assert one.batch(0, 4).abs().max() <= 1


def test_pool_smaller_than_the_set_streams_it(pictures: Path) -> None:
    pool = CropPool((pictures,), 32, capacity=1, seed=1, turnover=1)
    seen = set()
    for number in range(6):
        pool.batch(number, 1)
        seen.add(pool.pool[0].shape)
    assert len(seen) > 1
