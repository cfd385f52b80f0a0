"""The request of `Client.discretize`, with the defaults of its arguments."""

from __future__ import annotations

from dat_client.calls import core


def call(images, **kwargs):
    return core.discretize_call(
        images,
        kwargs.pop("gradients", None),
        kwargs.pop("gradient_dtype", "FP16"),
        kwargs.pop("outputs", None),
        kwargs.pop("output_dtype", None),
        kwargs,
    )
