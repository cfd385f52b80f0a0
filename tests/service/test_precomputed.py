"""Stored tokens back to pictures by a service, as a trainer reads them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from dat_client import Client
from dat_client.webdataset import load
from tests.client.precomputed import encoded, npy, write_pair


def test_decoded_tokens_are_the_reconstruction(serve_app: Callable[..., str], tmp_path: Path) -> None:
    with Client(serve_app(codec="tiny-f8"), "tiny-f8") as client:

        def discretized(_: int, x: Image.Image) -> dict[str, bytes]:
            pixels = np.ascontiguousarray(np.asarray(x).transpose(2, 0, 1))[None]
            q = client.discretize(pixels, outputs=["reconstruction", "indices"])
            pictures = encoded(Image.fromarray(q.reconstruction[0].transpose(1, 2, 0)))
            return {"png": pictures, "indices.npy": npy(q.indices[0].astype(np.uint16))}

        _, dst = write_pair(tmp_path, ["a.tar"], 4, discretized, size=(48, 40))
        (x_hat, _), *_ = DataLoader(load(dst), batch_size=4)
        (tokens, _), *_ = DataLoader(load(dst, tokens=True), batch_size=4)
        assert tokens.shape == (4, 5, 6)
        assert torch.equal(client.decode(tokens, output_dtype="UINT8"), x_hat)
