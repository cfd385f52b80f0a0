"""The exceptions of dat_client: about a request, the service, the network between them, and stored Q(x).

    DatError
    ├── InvalidRequest (ValueError)   the request is wrong: repeating it is pointless   400, 422, 4xx
    │   ├── UnknownCodec              the server has no codec of that name              404
    │   ├── TooLarge                  more bytes or images than the server accepts      413
    │   └── WireError                 the message violates the protocol                 400, 422
    ├── Unauthorized                  the API key is missing or wrong                   401, 403
    ├── Unavailable                   no good answer arrived: may be repeated           408, 5xx, network
    │   └── Overloaded                the server is full: may be repeated later         429, 503
    ├── ProtocolError                 the answer does not follow the protocol
    └── InvalidDataset (ValueError)   the folder was not written by `dat precompute`, or lacks what was asked for

    CodecChanged (UserWarning)        answers come from other weights than before

All of them can be pickled, because a DataLoader worker sends its exception to the trainer's process.
"""

from __future__ import annotations

import json
import reprlib
from typing import Any

MAX_SHOWN = 80  # characters

_repr = reprlib.Repr()
_repr.maxlevel = 3
_repr.maxstring = _repr.maxother = _repr.maxlong = MAX_SHOWN


def shown(value: object) -> str:
    """Returns the repr of `value`, cut to 80 characters, so that a message is short whatever was sent.

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
    """Returns the value itself where it is short JSON, else its repr cut to 80 characters."""
    items = value if isinstance(value, list | tuple) else [value]
    try:
        is_plain = all(isinstance(item, bool | int | float | str) for item in items)
        if is_plain and len(json.dumps(value, allow_nan=False)) <= MAX_SHOWN:
            return value
    except ValueError:
        pass
    return shown(value)


class DatError(Exception):
    """The root of the tree: `except DatError` catches every failure of a request, the service or the network.

    `status` is the HTTP status of the service's answer, None if the failure has another origin.
    """

    def __init__(self, message: str, *, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class InvalidRequest(DatError, ValueError):
    """The request is wrong, and would be refused again.

    >>> error = InvalidRequest("images: 5 axes", field="images", value=[1, 1, 3, 8, 8], limit="[N,3,H,W]")
    >>> error.field, error.limit
    ('images', '[N,3,H,W]')

    `field` names the tensor or parameter, `value` is its value (or a description of it) and `limit` says which
    values are allowed; each is None if unknown. `status` is the HTTP status of the server's answer, None when the
    client refused the request before sending it.
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
        super().__init__(message, status=status)
        self.field = field
        self.value = value
        self.limit = limit


def invalid(
    field: str, limit: str, *, value: Any = None, found: str | None = None, hint: str | None = None
) -> InvalidRequest:
    """Returns the InvalidRequest of an argument that the client itself refuses.

    The message shows `value`; where that is large, `found` describes it instead. `hint` says what to do.

    >>> str(invalid("retries", "an integer of at least 0", value=-1))
    'retries: got -1, must be an integer of at least 0'
    """
    message = f"{field}: got {shown(value) if found is None else found}, must be {limit}"
    if hint is not None:
        message += f"; {hint}"
    return InvalidRequest(message, field=field, value=value if found is None else found, limit=limit)


class UnknownCodec(InvalidRequest):
    """The server has no codec of that name (404)."""


class TooLarge(InvalidRequest):
    """The request is larger than the server accepts (413): send fewer images at once."""


class WireError(InvalidRequest):
    """A message or an array does not fit the Open Inference Protocol v2; see `dat_client.wire`.

    `malformed` is True when the message cannot be read at all (HTTP 400: it is not JSON, its sizes do not add up to
    the body, keys are missing) and False when it can be read but describes something impossible (HTTP 422: an
    unknown datatype, a shape that does not match its data). `status` follows from it.
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
        # The parsed value may be large, and the error may outlive the request, so only a short form is stored.
        super().__init__(message, field=field, value=plain(value), limit=limit, status=status)
        self.malformed = malformed


class Unauthorized(DatError):
    """The server requires an API key, or refused the one that was sent (401, 403): `Client(..., api_key=...)`."""


class Unavailable(DatError):
    """No good answer arrived in time. The call may be repeated, because Q is a pure function.

    `attempts` counts the requests that were sent, `cause` is the last failure in words and `__cause__` that failure
    itself (which pickling drops, because connection errors hold sockets). `status` is the HTTP status of the
    service's last answer, None where the network failed or a proxy answered. `retry_after_s` is the pause in
    seconds that an Overloaded service asks for, None if it named none.
    """

    def __init__(
        self,
        message: str,
        *,
        attempts: int = 1,
        cause: str | None = None,
        status: int | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message, status=status)
        self.attempts = attempts
        self.cause = cause
        self.retry_after_s = retry_after_s


class Overloaded(Unavailable):
    """The server is full: repeat the call after `retry_after_s`, or later if that is None."""


class ProtocolError(DatError):
    """The answer does not follow the protocol: the URL is wrong, a proxy answered, or answers were mixed up."""


class InvalidDataset(DatError, ValueError):
    """A folder was not written by `dat precompute`, or lacks what was asked for."""


class CodecChanged(UserWarning):
    """The service answers from other weights than before, so Q is no longer the function the run began with.

    `warnings.filterwarnings("error", category=CodecChanged)` turns it into an exception.
    """
