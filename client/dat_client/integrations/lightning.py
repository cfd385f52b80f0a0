"""Discrete adversarial training in a Lightning trainer, by one callback.

    attack = DiscreteAdversarialTraining(client, lambda module, x, y: F.cross_entropy(module(x), y))
    trainer = Trainer(callbacks=[attack])

The callback waits for the codec at every batch (depth 0). To hide the codec's time, return a
`dat_client.torch.AdversarialLoader` from `train_dataloader` instead; Lightning accepts it as it is. Two things
differ from a DataLoader there. With several devices the inner loader needs a DistributedSampler of its own,
because Lightning adds one to DataLoaders only. And Lightning fetches one batch ahead from a loader without a
length, so that depth 0 becomes depth 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

try:
    from pytorch_lightning import Callback, LightningModule, Trainer
except ImportError as error:
    raise ImportError(f"{__name__} needs Lightning: pip install pytorch-lightning") from error

from dat_client.client import Client
from dat_client.errors import invalid
from dat_client.torch import adversarial


class DiscreteAdversarialTraining(Callback):
    """Replaces x by Q(x + δ) before `training_step` receives the batch (Algorithm 1, lines 2-5).

    Batches must be lists with the images first, as DataLoader's own collation makes them. `loss_fn(module, images,
    *rest)` is the loss that is attacked. `options` are those of `dat_client.torch.adversarial`. The share of tokens
    changed is logged as `tokens_changed`. Raises InvalidRequest for other batches, and what `adversarial` raises.
    """

    def __init__(self, client: Client, loss_fn: Callable[..., Any], **options: Any) -> None:
        self.client = client
        self.loss_fn = loss_fn
        self.options = options

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Called by Lightning after a batch was moved to the device and before the training step."""
        if not isinstance(batch, list) or not batch:
            raise invalid("batch", "a list with the images first", found=type(batch).__name__)
        rest = batch[1:]
        with trainer.precision_plugin.forward_context():  # the autocast of the training step
            q = adversarial(
                self.client,
                batch[0],
                lambda x_hat: self.loss_fn(pl_module, x_hat, *rest),
                model=pl_module,
                **self.options,
            )
        batch[0] = q.adversarial
        if q.tokens_changed is not None:
            pl_module.log("tokens_changed", q.tokens_changed)
