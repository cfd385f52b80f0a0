"""The client of the discrete augmentation data service: sends images over HTTP and returns Q(x).

    from dat_client import Client

    client = Client("http://codec:8000", codec="tiny-f8")
    q = client.discretize(images)        # uint8 [N,3,H,W], numpy or torch
    q.reconstruction                     # Q(x), in the dtype and shape of `images`

Importing this package loads numpy, but neither torch nor ray.
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
