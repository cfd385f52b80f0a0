"""Adds discrete adversarial training to a Lightning trainer with one callback.

    attack = DiscreteAdversarialTraining(client, lambda module, x, y: F.cross_entropy(module(x), y))
    trainer = Trainer(callbacks=[attack])

The callback waits for the codec at every batch (depth 0). To let the codec work while the model trains, return a
`dat_client.torch.AdversarialLoader` from `train_dataloader` instead of using the callback. Lightning treats it in
two ways differently from a DataLoader. With several devices you must give the inner loader a DistributedSampler,
because Lightning adds one only to a DataLoader. If the loader has no length, Lightning fetches each batch one step
early, so that depth 0 becomes depth 1.
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

    A batch must be a list whose first element is the images, as DataLoader's default collation returns it.
    `loss_fn(module, images, *rest)` returns the loss to be attacked. `options` are keyword arguments of
    `dat_client.torch.adversarial`. The share of the tokens in which Q(x + δ) differs from Q(x) is logged as
    `tokens_changed`. Raises InvalidRequest if a batch is not such a list, and the errors of `adversarial`.
    """

    def __init__(self, client: Client, loss_fn: Callable[..., Any], **options: Any) -> None:
        self.client = client
        self.loss_fn = loss_fn
        self.options = options

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Replaces the images of the batch. Lightning calls this between moving the batch and the training step."""
        if not isinstance(batch, list) or not batch:
            hint = "let the collate_fn of the DataLoader return [images, labels, ...]"
            raise invalid("batch", "a list with the images first", found=type(batch).__name__, hint=hint)
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
