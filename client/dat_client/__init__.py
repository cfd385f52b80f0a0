"""Trainer side of the discrete augmentation data service: images in, Q(x) out, over HTTP.

    from dat_client import Client

    client = Client("http://codec:8000", codec="tiny-f8")
    q = client.discretize(images)        # uint8 [N,3,H,W], numpy or torch
    q.reconstruction                     # Q(x), as `images`

Importing this loads numpy, neither torch nor ray.
"""

from dat_client._version import __version__
from dat_client.aio import AsyncClient
from dat_client.calls.core import Discretized
from dat_client.client import Client
from dat_client.errors import (
    CodecChanged,
    DatError,
    InvalidDataset,
    InvalidRequest,
    Overloaded,
    ProtocolError,
    TooLarge,
    Unauthorized,
    Unavailable,
    UnknownCodec,
    WireError,
)

__all__ = [
    "AsyncClient",
    "Client",
    "CodecChanged",
    "DatError",
    "Discretized",
    "InvalidDataset",
    "InvalidRequest",
    "Overloaded",
    "ProtocolError",
    "TooLarge",
    "Unauthorized",
    "Unavailable",
    "UnknownCodec",
    "WireError",
    "__version__",
]
