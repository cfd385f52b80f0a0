"""Everything that dat_client raises about a request, a server or the way between them, and about stored Q(x).

    DatError
    ├── InvalidRequest (ValueError)   the request is wrong: repeating it is pointless   400, 422, 4xx
    │   ├── UnknownCodec              no such codec on that server                      404
    │   ├── TooLarge                  more bytes or images than the server takes        413
    │   └── WireError                 bytes that are not the protocol                   400, 422
    ├── Unauthorized                  the key is missing or wrong, not the request      401, 403
    ├── Unavailable                   no good answer arrived: may be repeated           408, 5xx, network
    │   └── Overloaded                the server is full: may be repeated, later        429, 503
    ├── ProtocolError                 what answered does not speak the protocol
    └── InvalidDataset (ValueError)   not what `dat precompute` wrote, or it lacks what is asked of it

    CodecChanged (UserWarning)        answers come from other weights than before

All of them survive pickling (a DataLoader worker sends its exception to the trainer's process).
"""

from __future__ import annotations

import json
import reprlib
from typing import Any

__all__ = [
    "CodecChanged",
    "DatError",
    "InvalidDataset",
    "InvalidRequest",
    "Overloaded",
    "ProtocolError",
    "TooLarge",
    "Unauthorized",
    "Unavailable",
    "UnknownCodec",
    "WireError",
]

MAX_SHOWN = 80

_repr = reprlib.Repr()
_repr.maxlevel = 3
_repr.maxstring = _repr.maxother = _repr.maxlong = MAX_SHOWN


def shown(value: object) -> str:
    """The repr of `value`, cut to about 80 characters, for messages about what a stranger sent.

    >>> shown([1, 2, 3])
    '[1, 2, 3]'
    >>> len(shown("x" * 10_000)) <= 80
    True
    """
    try:
        text = _repr.repr(value)
    except (ValueError, RecursionError):  # an int of more than 4300 digits has no repr
        text = f"<{type(value).__name__}>"
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 3] + "..."


def plain(value: Any) -> Any:
    """The value itself where it is short JSON, else its repr cut to 80 characters."""
    is_plain = isinstance(value, (bool, int, float, str)) or (
        isinstance(value, (list, tuple)) and all(isinstance(item, (bool, int, float, str)) for item in value)
    )
    try:
        if is_plain and len(json.dumps(value, allow_nan=False)) <= 80:
            return value
    except ValueError:
        pass
    return shown(value)


class DatError(Exception):
    """Root of the tree: `except DatError` catches all that the service or the way to it can do wrong."""


class InvalidRequest(DatError, ValueError):
    """The request is wrong and will be wrong again.

    >>> error = InvalidRequest("images: 5 axes", field="images", value=[1, 1, 3, 8, 8], limit="[N,3,H,W]")
    >>> error.field, error.limit
    ('images', '[N,3,H,W]')

    `field` names the tensor or parameter, `value` is what it was and `limit` what is allowed (each None if
    unknown). `status` is the HTTP status of the server's answer, None when found before sending.
    """

    def __init__(
        self,
        message: str,
        *,
        field: str | None = None,
        value: Any = None,
        limit: Any = None,
        status: int | None = None,
    ) -> None:
        super().__init__(message)
        self.field = field
        self.value = value
        self.limit = limit
        self.status = status


class UnknownCodec(InvalidRequest):
    """The server has no codec of that name (404)."""


class TooLarge(InvalidRequest):
    """The request is larger than the server takes (413): send fewer images at once."""


class WireError(InvalidRequest):
    """Bytes or arrays that cannot be carried by the Open Inference Protocol v2; see `dat_client.wire`.

    `malformed` is True when the message is not the protocol at all (HTTP 400: not JSON, sizes that do not add
    up to the body, missing keys) and False when it is, but says something impossible (HTTP 422: unknown
    datatype, a shape that does not match its data). `status` follows from it.
    """

    def __init__(
        self,
        message: str,
        field: str | None = None,
        value: Any = None,
        limit: Any = None,
        *,
        malformed: bool = False,
    ) -> None:
        status = 400 if malformed else 422
        # not what was parsed, which may be large: an error outlives the request
        super().__init__(message, field=field, value=plain(value), limit=limit, status=status)
        self.malformed = malformed


class Unauthorized(DatError):
    """The server wants an API key, or another one (401, 403): `Client(..., api_key=...)`."""

    def __init__(self, message: str, *, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class Unavailable(DatError):
    """No good answer arrived in time. The call may be repeated: Q is a pure function.

    `attempts` counts the requests sent, `cause` is the last failure in words, `__cause__` the failure itself
    (`__cause__` does not survive pickling; connection errors hold sockets). `status` is that of the service's own
    last answer, None where the network failed or a proxy answered.
    """

    def __init__(
        self, message: str, *, attempts: int = 1, cause: str | None = None, status: int | None = None
    ) -> None:
        super().__init__(message)
        self.attempts = attempts
        self.cause = cause
        self.status = status


class Overloaded(Unavailable):
    """The server is full. `retry_after_s` is when it wants to be asked again, None if it did not say."""

    def __init__(
        self,
        message: str,
        *,
        attempts: int = 1,
        cause: str | None = None,
        status: int | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message, attempts=attempts, cause=cause, status=status)
        self.retry_after_s = retry_after_s


class ProtocolError(DatError):
    """Something answered that does not speak the protocol: a wrong URL, a proxy's page, a mixed-up answer."""


class InvalidDataset(DatError, ValueError):
    """A folder is not what `dat precompute` wrote, or lacks what is asked of it."""


class CodecChanged(UserWarning):
    """The service answers with another codec's weights than before: Q is not the Q that the run began with.

    `warnings.filterwarnings("error", category=CodecChanged)` makes an exception of it.
    """
