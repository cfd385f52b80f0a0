"""Trains a VQGAN codec by Appendix A of the paper (`dat train-codec`)."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dat_workers.codecs.file import check_shapes, read
from dat_workers.codecs.networks.vqgan import VQGAN
from dat_workers.images.crops import centre_crops
from dat_workers.system.files import replacing, write_atomically
from dat_workers.system.signals import handle_signals
from dat_workers.training.config import TrainConfig
from dat_workers.training.data import CropPool, to_float
from dat_workers.training.evaluation import Scores, comparison_png, evaluate
from dat_workers.training.losses import PatchDiscriminator, adaptive_weight, discriminator_loss, perceptual_term
from dat_workers.training.quantizer import EmaQuantizer

LATENTS_PER_ENTRY = 8  # latent vectors collected per codebook entry before k-means
REPORT_EVERY_S = 10.0
SAVE_EVERY_S = 300.0
SAVED_PARTS = ("model", "average", "quantizer", "discriminator", "optimizer", "optimizer_d")


class Trainer:
    """One training run. `Trainer(config).run(print)` trains to the end or to SIGINT/SIGTERM, and can be run again.

    It writes OUT/checkpoint.pt (everything that is needed to continue), OUT/log.jsonl and OUT/samples-*.png.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.device = torch.device(config.device)
        torch.manual_seed(config.seed)
        self.model = self._initial_model().to(self.device)
        self.average = VQGAN(config.spec).to(self.device).requires_grad_(False)
        self.average.load_state_dict(self.model.state_dict())
        self.quantizer = EmaQuantizer(self.model.quantize).to(self.device)
        self.model.quantize.requires_grad_(False)
        self.discriminator = PatchDiscriminator().to(self.device)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
        self.optimizer_d = torch.optim.AdamW(
            self.discriminator.parameters(), lr=config.learning_rate / 2, betas=(0.5, 0.9), weight_decay=1e-4
        )
        self.perceptual = perceptual_term(config.perceptual, self.device)
        reading = {"skip": config.skip, "upright": config.upright}
        self.pool = CropPool(config.sources, config.crop, config.pool, config.seed, **reading)
        self.left_out = self.pool.reader.left_out  # of the validation too
        self.validation: Tensor | None = None
        if config.validation:
            crops = centre_crops(config.validation, config.validation_crop, left_out=self.left_out, **reading)
            self.validation = torch.from_numpy(crops)
        self.step = 0
        self.seconds = 0.0  # of training, over all runs
        self.codebook_ready = config.init is not None
        if self.codebook_ready:
            self.quantizer.adopt()
        self.received_signals: list[int] = []
        config.out.mkdir(parents=True, exist_ok=True)
        self.checkpoint = config.out / "checkpoint.pt"
        if self.checkpoint.exists():
            self.load()

    def _initial_model(self) -> VQGAN:
        model = VQGAN(self.config.spec)
        if self.config.init:
            tensors = read(self.config.init).tensors
            check_shapes(self.config.spec, {k: v.shape for k, v in tensors.items()}, str(self.config.init))
            model.load_state_dict({k: v.float() for k, v in tensors.items()})
        return model

    # -- one step -----------------------------------------------------------------------------------------------

    def _learning_rate(self, progress: float) -> float:
        warm = min(1.0, (self.step + 1) / max(1, min(200, self.config.steps // 10)))
        return self.config.learning_rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))

    def _latents(self, images: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16):
            return self.model.latents(images).float()

    def _forward(self, images: Tensor, progress: float) -> tuple[Tensor, Tensor]:
        """Returns (reconstructions, commitment term); everything but the codebook runs in half precision."""
        z = self._latents(images)
        quantized, commitment = z, z.new_zeros(())
        if self.codebook_ready:
            quantized, commitment, _ = self.quantizer(z, learn=True, revive=progress < 0.9)
        with torch.autocast(self.device.type, torch.bfloat16):
            return self.model.pictures(quantized).float(), commitment

    def train_step(self) -> dict[str, float]:
        """Trains on one batch by Eq. 8-10; returns the terms for the log."""
        config = self.config
        progress = self.step / config.steps
        if not self.codebook_ready and progress >= config.codebook_start:
            self._start_codebook()
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate(progress)
        images = self.pool.batch(self.step, config.batch).to(self.device)
        reconstructions, commitment = self._forward(images, progress)
        mse = F.mse_loss(reconstructions, images)
        distortion = mse + config.perceptual_weight * self.perceptual(images, reconstructions)
        loss = distortion + config.commitment_weight * commitment
        terms = {"mse": mse.item(), "commitment": commitment.item()}
        adversarial = progress >= config.discriminator_start and config.discriminator_weight > 0
        if adversarial:
            self.discriminator.requires_grad_(False)
            fooling = -self.discriminator(reconstructions).mean()
            weight = adaptive_weight(distortion, fooling, self.model.decoder.conv_out.weight)
            loss = loss + config.discriminator_weight * weight * fooling
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        if not torch.isfinite(norm):
            raise FloatingPointError(f"step {self.step}: the gradient is not finite; use a lower --learning-rate")
        self.optimizer.step()
        if adversarial:
            self.discriminator.requires_grad_(True)
            loss_d = discriminator_loss(self.discriminator(images), self.discriminator(reconstructions.detach()))
            self.optimizer_d.zero_grad(set_to_none=True)
            loss_d.backward()  # type: ignore[no-untyped-call]
            self.optimizer_d.step()
            terms["discriminator"] = loss_d.item()
        self._average_weights()
        self.step += 1
        return terms

    @torch.no_grad()
    def _average_weights(self) -> None:
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
        for average, new in zip(self.average.parameters(), self.model.parameters(), strict=True):
            average.lerp_(new, 1 - decay) if new.requires_grad else average.copy_(new)

    @torch.no_grad()
    def _start_codebook(self) -> None:
        collected: list[Tensor] = []
        missing = LATENTS_PER_ENTRY * self.config.spec.codebook_size
        while missing > 0:
            if self.received_signals:
                return
            images = self.pool.batch(-1 - len(collected), self.config.batch).to(self.device)
            collected.append(self._latents(images).permute(0, 2, 3, 1).reshape(-1, self.config.spec.latent_dim))
            missing -= len(collected[-1])
        self.quantizer.initialise(torch.cat(collected))
        self.codebook_ready = True

    # -- scores and samples -------------------------------------------------------------------------------------

    def evaluate(self, limit: int | None = None, model: VQGAN | None = None) -> Scores:
        """Scores `model`, or by default the averaged weights, on the first `limit` validation crops (None: all)."""
        assert self.validation is not None
        return evaluate(model or self.average, self.validation[:limit], self.device, quantize=self.codebook_ready)

    def save_samples(self) -> Path:
        """Writes OUT/samples-STEP.png: originals above, reconstructions below."""
        x = self.pool.batch(-1, 4) if self.validation is None else to_float(self.validation[:4])
        path = self.config.out / f"samples-{self.step:07d}.png"
        write_atomically(path, comparison_png(self.average, x.to(self.device), quantize=self.codebook_ready))
        return path

    # -- the checkpoint -----------------------------------------------------------------------------------------

    def save(self) -> None:
        """Writes the checkpoint; an older one stays until the new one is complete."""
        state: dict[str, Any] = {name: getattr(self, name).state_dict() for name in SAVED_PARTS}
        state |= {
            "config": json.dumps(self.config.frozen_part()),
            "step": self.step,
            "seconds": self.seconds,
            "codebook_ready": self.codebook_ready,
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all(),
        }
        with replacing(self.checkpoint) as file:
            torch.save(state, file)

    def load(self) -> None:
        """Loads the state from OUT/checkpoint.pt. Raises ValueError if it was written with different settings."""
        try:
            state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
            saved = json.loads(state["config"])
        except Exception as error:  # torch raises many types of exception for a foreign file
            raise ValueError(f"{self.checkpoint} is not a checkpoint of this command ({error!r:.80})") from error
        current = json.loads(json.dumps(self.config.frozen_part()))
        if saved != current:
            differing = {
                k: (saved.get(k), current.get(k)) for k in saved | current if saved.get(k) != current.get(k)
            }
            raise ValueError(
                f"{self.checkpoint} was written with other settings, (its, yours): {differing}; "
                "use the same settings, or choose a different --out"
            )
        for name in SAVED_PARTS:
            getattr(self, name).load_state_dict(state[name])
        self.step, self.seconds = state["step"], state["seconds"]
        self.codebook_ready = state["codebook_ready"]
        torch.set_rng_state(state["rng"].cpu())
        if state["cuda_rng"]:
            torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda_rng"]])

    # -- the loop -----------------------------------------------------------------------------------------------

    def run(self, report: Callable[[str], None]) -> bool:
        """Trains until the last step. If a signal ends it earlier, it writes the checkpoint and returns False."""
        config = self.config
        last_save = last_report = started = time.monotonic()
        first_step, seconds_before = self.step, self.seconds
        if self.step:
            report(f"continuing from step {self.step} of {config.steps}")
        self.received_signals.clear()
        noting = ExitStack()

        def note_signal(number: int, frame: FrameType | None) -> None:
            """Ends the loop after the current step; a second signal calls the handler from before the run."""
            self.received_signals.append(number)
            noting.close()

        noting.enter_context(handle_signals(note_signal, signal.SIGINT, signal.SIGTERM))
        with noting, (config.out / "log.jsonl").open("a") as log:
            while self.step < config.steps and not self.received_signals:
                terms = self.train_step()
                now = time.monotonic()
                self.seconds = seconds_before + now - started
                if now - last_report >= REPORT_EVERY_S or self.step == config.steps:
                    steps_per_s = (self.step - first_step) / (now - started)
                    psnr = 10 * math.log10(4 / terms["mse"])
                    entry = {"step": self.step, "seconds": round(self.seconds), "crop_psnr_db": psnr}
                    log.write(json.dumps(entry | terms | {"codebook": self.quantizer.usage()}) + "\n")
                    log.flush()
                    left = timedelta(seconds=round((config.steps - self.step) / steps_per_s))
                    report(
                        f"step {self.step}/{config.steps}  {steps_per_s:.2f} steps/s  {left} left  "
                        f"crops {psnr:.2f} dB  commitment {terms['commitment']:.4f}  "
                        f"codebook {self.quantizer.usage():.0%}"
                    )
                    last_report = now
                if now - last_save >= SAVE_EVERY_S:
                    self.save()
                    self.save_samples()
                    if self.validation is not None:
                        scores = self.evaluate(limit=16)
                        report(f"validation, {scores.pictures} pictures: {scores.psnr_db:.2f} dB")
                    last_save = time.monotonic()
            self.save()
        if self.received_signals:
            report(f"stopped at step {self.step}; run the same command to continue")
            return False
        report(f"samples: {self.save_samples()}")
        return True
