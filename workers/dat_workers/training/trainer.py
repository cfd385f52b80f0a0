"""Training of a VQGAN codec by Appendix A of the paper: `dat train-codec`."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from dat_workers.codecs.file import check_shapes, read
from dat_workers.codecs.networks.vqgan import VQGAN
from dat_workers.images.crops import centre_crops
from dat_workers.system.files import replacing
from dat_workers.training.config import TrainConfig
from dat_workers.training.data import CropPool
from dat_workers.training.losses import PatchDiscriminator, adaptive_weight, discriminator_loss, perceptual_term
from dat_workers.training.quantizer import EmaQuantizer

LATENTS_FOR_KMEANS = 8  # latent vectors collected per codebook entry


@dataclass(frozen=True)
class Scores:
    """Of a model on the validation crops: mean PSNR in dB and the share of the codebook that they use."""

    psnr_db: float
    used: float
    pictures: int


def psnr_db(x: Tensor, y: Tensor) -> Tensor:
    """PSNR in dB of each of N images in -1..1 (peak 2); `y` is clipped first."""
    mse = (x - y.clamp(-1, 1)).square().flatten(1).mean(1).clamp_min(1e-10)
    return 10 * torch.log10(4 / mse)


class Trainer:
    """One run: `Trainer(config).run(print)` trains to the end or to SIGINT/SIGTERM, and can be run again.

    Writes OUT/checkpoint.pt (everything needed to go on), OUT/log.jsonl and OUT/samples-*.png.
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
        self.pool = CropPool(config.sources, config.crop, config.pool, config.seed)
        self.validation = (
            torch.from_numpy(centre_crops(config.validation, config.validation_crop)) if config.validation else None
        )
        self.step = 0
        self.seconds = 0.0  # of training, over all runs
        self.codebook_ready = config.init is not None
        if self.codebook_ready:
            self.quantizer.adopt()
        self.stopped: list[int] = []  # the signals that have come
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

    # -- one step ---------------------------------------------------------------------------------------

    def _learning_rate(self, progress: float) -> float:
        warm = min(1.0, (self.step + 1) / max(1, min(200, self.config.steps // 10)))
        return self.config.learning_rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))

    def _forward(self, images: Tensor, progress: float) -> tuple[Tensor, Tensor]:
        """(reconstructions, commitment term), in half precision but for the codebook."""
        with torch.autocast(self.device.type, torch.bfloat16):
            z = self.model.latents(images)
        z = z.float()
        quantized, commitment = z, z.new_zeros(())
        if self.codebook_ready:
            quantized, commitment, _ = self.quantizer(z, learn=True, revive=progress < 0.9)
        with torch.autocast(self.device.type, torch.bfloat16):
            pictures = self.model.pictures(quantized)
        return pictures.float(), commitment

    def train_step(self) -> dict[str, float]:
        """One batch through Eq. 8-10; returns the terms for the log."""
        config = self.config
        progress = self.step / config.steps
        if not self.codebook_ready and progress >= config.codebook_start:
            self._start_codebook()
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate(progress)
        images = self.pool.batch(self.step, config.batch).to(self.device)
        pictures, commitment = self._forward(images, progress)
        distortion = F.mse_loss(pictures, images)
        reconstruction = distortion + config.perceptual_weight * self.perceptual(images, pictures)
        loss = reconstruction + config.commitment_weight * commitment
        terms = {"mse": distortion.item(), "commitment": commitment.item()}
        adversarial = progress >= config.discriminator_start and config.discriminator_weight > 0
        if adversarial:
            self.discriminator.requires_grad_(False)
            fooling = -self.discriminator(pictures).mean()
            weight = adaptive_weight(reconstruction, fooling, self.model.decoder.conv_out.weight)
            loss = loss + config.discriminator_weight * weight * fooling
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        if not torch.isfinite(norm):
            raise FloatingPointError(f"step {self.step}: the gradient is not finite; lower --learning-rate")
        self.optimizer.step()
        if adversarial:
            self.discriminator.requires_grad_(True)
            loss_d = discriminator_loss(self.discriminator(images), self.discriminator(pictures.detach()))
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
        for kept, new in zip(self.average.parameters(), self.model.parameters(), strict=True):
            kept.lerp_(new, 1 - decay) if new.requires_grad else kept.copy_(new)

    @torch.no_grad()
    def _start_codebook(self) -> None:
        wanted = LATENTS_FOR_KMEANS * self.config.spec.codebook_size
        collected: list[Tensor] = []
        count, number = 0, 0
        while count < wanted:
            if self.stopped:
                return
            images = self.pool.batch(-1 - number, self.config.batch).to(self.device)
            with torch.autocast(self.device.type, torch.bfloat16):
                z = self.model.latents(images).float()
            collected.append(z.permute(0, 2, 3, 1).reshape(-1, z.shape[1]))
            count += len(collected[-1])
            number += 1
        self.quantizer.initialise(torch.cat(collected))
        self.codebook_ready = True

    # -- scores and pictures ------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, limit: int | None = None, model: VQGAN | None = None) -> Scores:
        """The averaged weights (or another model of the same spec) in fp32 on the validation crops."""
        assert self.validation is not None
        model = model or self.average
        values: list[Tensor] = []
        used: set[int] = set()
        for batch in torch.split(self.validation[:limit], 4):
            x = batch.to(self.device).float().div(127.5).sub(1)
            if self.codebook_ready:
                indices = model.encode(x)
                used.update(torch.unique(indices).tolist())
                y = model.decode(indices)
            else:
                y = model.pictures(model.latents(x))
            values.append(psnr_db(x, y))
        scores = torch.cat(values)
        return Scores(scores.mean().item(), len(used) / self.config.spec.codebook_size, len(scores))

    @torch.no_grad()
    def save_samples(self) -> Path:
        """OUT/samples-STEP.png: originals above, reconstructions below."""
        if self.validation is not None:
            x = self.validation[:4].float().div(127.5).sub(1).to(self.device)
        else:
            x = self.pool.batch(-1, 4).to(self.device)
        model = self.average
        y = model.decode(model.encode(x)) if self.codebook_ready else model.pictures(model.latents(x))
        rows = torch.cat([torch.cat(list(t), 2) for t in (x, y.clamp(-1, 1))], 1)
        array = rows.add(1).mul(127.5).round().byte().permute(1, 2, 0).cpu().numpy()
        path = self.config.out / f"samples-{self.step:07d}.png"
        Image.fromarray(array).save(path)
        return path

    # -- keeping ----------------------------------------------------------------------------------------

    def _parts(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "average": self.average,
            "quantizer": self.quantizer,
            "discriminator": self.discriminator,
            "optimizer": self.optimizer,
            "optimizer_d": self.optimizer_d,
        }

    def save(self) -> None:
        """Writes the checkpoint; an older one stays until the new one is whole."""
        state = {name: part.state_dict() for name, part in self._parts().items()}
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
        """Goes on from OUT/checkpoint.pt; raises ValueError where its settings differ from this run's."""
        try:
            state = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
            theirs = json.loads(state["config"])
        except Exception as error:  # torch raises nearly anything for a file that is not its own
            raise ValueError(f"{self.checkpoint} is no checkpoint of this command ({error!r:.80})") from error
        ours = json.loads(json.dumps(self.config.frozen_part()))
        if theirs != ours:
            differing = {k: (theirs.get(k), ours[k]) for k in ours if theirs.get(k) != ours[k]}
            raise ValueError(
                f"{self.checkpoint} was made with other settings, (its, yours): {differing}; "
                "give the same ones or another --out"
            )
        for name, part in self._parts().items():
            part.load_state_dict(state[name])
        self.step, self.seconds = state["step"], state["seconds"]
        self.codebook_ready = state["codebook_ready"]
        torch.set_rng_state(state["rng"].cpu())
        if state["cuda_rng"]:
            torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda_rng"]])

    # -- the loop -----------------------------------------------------------------------------------------

    def run(self, report: Callable[[str], None]) -> bool:
        """Trains until the last step; False when a signal ended it first (the checkpoint is written)."""
        config = self.config
        last_save = last_line = started = time.monotonic()
        step_at_start = self.step
        before = self.seconds
        if self.step:
            report(f"going on from step {self.step} of {config.steps}")
        with _stop_signals() as self.stopped, (config.out / "log.jsonl").open("a") as log:
            while self.step < config.steps and not self.stopped:
                terms = self.train_step()
                now = time.monotonic()
                self.seconds = before + now - started
                if now - last_line >= 10 or self.step == config.steps:
                    rate = (self.step - step_at_start) / (now - started)
                    psnr = 10 * math.log10(4 / terms["mse"])
                    entry = {"step": self.step, "seconds": round(self.seconds), "crop_psnr_db": psnr}
                    log.write(json.dumps(entry | terms | {"codebook": self.quantizer.usage()}) + "\n")
                    log.flush()
                    left = (config.steps - self.step) / rate
                    report(
                        f"step {self.step}/{config.steps}  {rate:.2f} steps/s  {_clock(left)} left  "
                        f"crops {psnr:.2f} dB  commitment {terms['commitment']:.4f}  "
                        f"codebook {self.quantizer.usage():.0%}"
                    )
                    last_line = now
                if now - last_save >= config.save_every_s:
                    self.save()
                    self.save_samples()
                    if self.validation is not None:
                        scores = self.evaluate(limit=16)
                        report(f"validation, 16 pictures: {scores.psnr_db:.2f} dB")
                    last_save = time.monotonic()
            self.save()
        if self.stopped:
            report(f"stopped at step {self.step}; run the same command to go on")
            return False
        report(f"samples: {self.save_samples()}")
        return True


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """A list that is empty until SIGINT or SIGTERM arrives; a second signal acts at once."""
    received: list[int] = []
    old = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def note(number: int, _: object) -> None:
        received.append(number)
        for s, handler in old.items():
            signal.signal(s, handler)

    for s in old:
        signal.signal(s, note)
    try:
        yield received
    finally:
        for s, handler in old.items():
            signal.signal(s, handler)


def _clock(seconds: float) -> str:
    minutes = int(seconds // 60)
    return f"{minutes // 60}:{minutes % 60:02d} h" if minutes >= 60 else f"{minutes}:{int(seconds % 60):02d} min"
