"""Trains a VQGAN codec by Appendix A of the paper (`dat train-codec`)."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable
from contextlib import ExitStack
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
from dat_workers.training.evaluation import Scores, comparison_jpeg, evaluate
from dat_workers.training.loss_log import LossLog
from dat_workers.training.losses import PatchDiscriminator, adaptive_weight, discriminator_loss, perceptual_term
from dat_workers.training.progress import TRAINING, Report, TrainProgress, no_report, throttled
from dat_workers.training.quantizer import KMEANS_ITERATIONS, EmaQuantizer

LATENTS_PER_ENTRY = 8  # latent vectors collected per codebook entry before k-means
LOG_EVERY_S = 10.0
LOG_ENTRIES = 200  # at least, in a whole run, so that a short run has a curve too
SAVE_EVERY_S = 300.0
SAMPLES = 20  # sample pictures of a run, apart from the one of its first step
SAVED_PARTS = ("model", "average", "quantizer", "discriminator", "optimizer", "optimizer_d")


class Trainer:
    """One training run. `Trainer(config).run()` trains to the end or to SIGINT/SIGTERM, and can be run again.

    It writes OUT/checkpoint.pt (everything that is needed to continue), OUT/log.jsonl, OUT/loss.svg and
    OUT/samples/step-*.jpg. `report` receives the progress about twice a second, also while the pictures are read,
    which the constructor does.
    """

    def __init__(self, config: TrainConfig, report: Report = no_report) -> None:
        self.config = config
        self.report = throttled(report)
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
        self.log = LossLog(config.out, self.step, config.steps)
        self.pool = self._read_pictures()
        self.left_out = self.pool.reader.left_out  # of the validation too
        self.validation = self._read_validation()
        self.sample_crops = self.pool.batch(-1, 4) if self.validation is None else to_float(self.validation[:4])
        self.validation_psnr_db: float | None = None  # as measured last

    def _read_pictures(self) -> CropPool:
        config = self.config
        on_picture = self._counting("reading pictures")
        pool = CropPool(
            config.sources, config.crop, config.pool, config.seed, skip=config.skip, upright=config.upright,
            on_picture=on_picture,
        )  # fmt: skip
        on_picture(len(pool.pool), len(pool.pool))
        return pool

    def _read_validation(self) -> Tensor | None:
        config = self.config
        if not config.validation:
            return None
        on_picture = self._counting("reading validation pictures")
        crops = centre_crops(
            config.validation, config.validation_crop, skip=config.skip, upright=config.upright,
            left_out=self.left_out, on_picture=on_picture,
        )  # fmt: skip
        on_picture(len(crops), len(crops))
        return torch.from_numpy(crops)

    def _counting(self, activity: str) -> Callable[..., None]:
        """Reports the beginning of an activity; returns a function that reports how many pictures it has read."""

        def on_picture(count: int, total: int | None = None) -> None:
            self.report(TrainProgress(activity, count, total, "pictures"))

        on_picture(0)
        return on_picture

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
        if self._codebook_due():
            self._start_codebook()
        for group in self.optimizer.param_groups:
            group["lr"] = self._learning_rate(progress)
        images = self.pool.batch(self.step, config.batch).to(self.device)
        reconstructions, commitment = self._forward(images, progress)
        mse = F.mse_loss(reconstructions, images)
        perceptual = self.perceptual(images, reconstructions)
        distortion = mse + config.perceptual_weight * perceptual
        loss = distortion + config.commitment_weight * commitment
        terms = {"mse": mse.item(), "perceptual": perceptual.item(), "commitment": commitment.item()}
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

    def _codebook_due(self) -> bool:
        return not self.codebook_ready and self.step / self.config.steps >= self.config.codebook_start

    @torch.no_grad()
    def _start_codebook(self) -> None:
        """Starts the codebook by k-means. If a signal comes, it ends early and leaves `codebook_ready` False."""
        collected: list[Tensor] = []
        wanted = LATENTS_PER_ENTRY * self.config.spec.codebook_size
        count = 0
        while count < wanted:
            if self.received_signals:
                return
            self.report(TrainProgress("collecting latent vectors for the codebook", count, wanted, "vectors"))
            images = self.pool.batch(-1 - len(collected), self.config.batch).to(self.device)
            collected.append(self._latents(images).permute(0, 2, 3, 1).reshape(-1, self.config.spec.latent_dim))
            count += len(collected[-1])
        before = _random_states()
        for passes in self.quantizer.initialise(torch.cat(collected)):
            self.report(TrainProgress("starting the codebook by k-means", passes, KMEANS_ITERATIONS, "passes"))
            if self.received_signals and passes < KMEANS_ITERATIONS:
                _set_random_states(*before)  # so that the run which continues starts the same codebook
                return
        self.codebook_ready = True

    # -- scores and samples -------------------------------------------------------------------------------------

    def evaluate(self, limit: int | None = None, model: VQGAN | None = None) -> Scores:
        """Scores `model`, or by default the averaged weights, on the first `limit` validation crops (None: all)."""
        assert self.validation is not None
        return evaluate(model or self.average, self.validation[:limit], self.device, quantize=self.codebook_ready)

    def save_samples(self) -> Path:
        """Writes OUT/samples/step-STEP.jpg: the same crops in every sample, and their reconstructions below."""
        path = self.config.out / "samples" / f"step-{self.step:07d}.jpg"
        path.parent.mkdir(exist_ok=True)
        x = self.sample_crops.to(self.device)
        write_atomically(path, comparison_jpeg(self.average, x, quantize=self.codebook_ready))
        return path

    # -- the checkpoint -----------------------------------------------------------------------------------------

    def save(self) -> None:
        """Writes the checkpoint; an older one stays until the new one is complete."""
        state: dict[str, Any] = {name: getattr(self, name).state_dict() for name in SAVED_PARTS}
        rng, cuda_rng = _random_states()
        state |= {
            "config": json.dumps(self.config.frozen_part()),
            "step": self.step,
            "seconds": self.seconds,
            "codebook_ready": self.codebook_ready,
            "rng": rng,
            "cuda_rng": cuda_rng,
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
        _set_random_states(state["rng"], state["cuda_rng"])

    # -- the loop -----------------------------------------------------------------------------------------------

    def run(self) -> bool:
        """Trains until the last step. If a signal ends it earlier, it writes the checkpoint and returns False."""
        config = self.config
        last_save = last_entry = started = time.monotonic()
        seconds_before = self.seconds
        self.received_signals.clear()
        noting = ExitStack()

        def note_signal(number: int, frame: FrameType | None) -> None:
            """Ends the loop after the current step; a second signal calls the handler from before the run."""
            self.received_signals.append(number)
            noting.close()

        noting.enter_context(handle_signals(note_signal, signal.SIGINT, signal.SIGTERM))
        with noting:
            while self.step < config.steps and not self.received_signals:
                if self._codebook_due():
                    self._start_codebook()
                    continue
                self.log.add(self.train_step())
                now = time.monotonic()
                self.seconds = seconds_before + now - started
                self._report_step()
                if now - last_entry >= LOG_EVERY_S or _is_milestone(self.step, config.steps, LOG_ENTRIES):
                    self._write_entry()
                    last_entry = now
                if self.step == 1 or _is_milestone(self.step, config.steps, SAMPLES):
                    self.save_samples()
                if now - last_save >= SAVE_EVERY_S:
                    self.save()
                    if self.validation is not None:
                        self.validation_psnr_db = self.evaluate(limit=16).psnr_db
                    last_save = time.monotonic()
            if self.log.pending:
                self._write_entry()
            self.save()
        return not self.received_signals

    def _report_step(self) -> None:
        facts = self.log.means() | self._facts()
        self.report(TrainProgress(TRAINING, self.step, self.config.steps, "steps", facts))

    def _write_entry(self) -> None:
        self.log.write(self.step, self.seconds, self._facts())

    def _facts(self) -> dict[str, float]:
        """Returns the share of the codebook that is used, and the PSNR of the validation as measured last."""
        facts = {"codebook": self.quantizer.usage()} if self.codebook_ready else {}
        return facts if self.validation_psnr_db is None else facts | {"validation_psnr_db": self.validation_psnr_db}


def _is_milestone(step: int, steps: int, parts: int) -> bool:
    """Returns whether another of `parts` equal parts of the run ends with this step."""
    return step * parts // steps > (step - 1) * parts // steps


def _random_states() -> tuple[Tensor, list[Tensor]]:
    return torch.get_rng_state(), torch.cuda.get_rng_state_all()


def _set_random_states(cpu: Tensor, cuda: list[Tensor]) -> None:
    torch.set_rng_state(cpu.cpu())
    if cuda:
        torch.cuda.set_rng_state_all([state.cpu() for state in cuda])
