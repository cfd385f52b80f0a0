"""The exceptions of dat_client: about requests, the service, the network, and precomputed datasets.

    DatError
    ├── InvalidRequest (ValueError)   the request is wrong: do not repeat it            400, 422, 4xx
    │   ├── UnknownCodec              the server has no codec of that name              404
    │   ├── TooLarge                  it has more bytes or images than the server takes 413
    │   └── WireError                 the message violates the protocol                 400, 422
    ├── Unauthorized                  the API key is missing or wrong                   401, 403
    ├── Unavailable                   no valid answer arrived: repeating may help       408, 5xx, network, and e.g.
    │   │                             404 in other words than the service's
    │   └── Overloaded                the server is full: repeat it later               429, 503
    ├── ProtocolError                 the answer does not follow the protocol
    └── InvalidDataset (ValueError)   a folder was not written by `dat precompute`, is damaged or lacks data

    CodecChanged (UserWarning)        an answer came from other weights than the previous one

All of them can be pickled, because a DataLoader worker sends its exception to the trainer's process.
"""

from __future__ import annotations

import json
import reprlib
from typing import Any

MAX_SHOWN = 80  # characters of a value
MAX_SENTENCE = 1000  # characters of a sentence: an error message from another program may be longer

_repr = reprlib.Repr()
_repr.maxlevel = 3
_repr.maxstring = _repr.maxother = _repr.maxlong = MAX_SHOWN


def shown(value: object) -> str:
    """Returns the repr of `value`, cut to 80 characters, so that error messages stay short.

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


def sentence(text: str) -> str:
    """Returns a text of another program on one line, and cut only if it has more than 1000 characters.

    >>> sentence("out of memory\\n  try a smaller batch")
    'out of memory try a smaller batch'
    """
    line = " ".join(text.split())
    return line if len(line) <= MAX_SENTENCE else line[: MAX_SENTENCE - 4] + " ..."


def plain(value: Any) -> Any:
    """Returns `value` itself if it is JSON of at most 80 characters, else its repr cut to 80 characters.

    Only None, a number, a string, True, False, or a list of these counts as JSON.
    """
    items = value if isinstance(value, list | tuple) else [value]
    try:
        is_plain = all(item is None or isinstance(item, bool | int | float | str) for item in items)
        if is_plain and len(json.dumps(value, allow_nan=False)) <= MAX_SHOWN:
            return value
    except ValueError:
        pass
    return shown(value)


class DatError(Exception):
    """The base class: `except DatError` catches every failure of a request, the service or the network.

    `status` is the HTTP status of the service's answer; None if the failure was not an answer of the service.
    """

    def __init__(self, message: str, *, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class InvalidRequest(DatError, ValueError):
    """The request is wrong, so repeating it unchanged fails again.

    >>> error = InvalidRequest("images: 5 axes", field="images", value=[1, 1, 3, 8, 8], limit="[N,3,H,W]")
    >>> error.field, error.limit
    ('images', '[N,3,H,W]')

    `field` names the tensor or parameter, `value` is its value (or a description of it) and `limit` says which
    values are allowed; each is None if unknown. `status` is the HTTP status of the server's answer; None if the
    client itself refused the request without sending it.
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
    """Returns the InvalidRequest for an argument `field` that the client itself refuses.

    The message shows `value`, or the description `found` of a value that is too large to show. `hint` says what to
    do about it.

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
    """A message violates the Open Inference Protocol v2, or the protocol cannot express an array or a parameter.

    `malformed` is True if the message cannot be read (it is not JSON, its sizes do not add up to the body, keys are
    missing); `status` is then 400. It is False if the message can be read but describes something impossible (an
    unknown datatype, a shape that does not match its data); `status` is then 422.
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
        # Only a short form of the value is stored: it may be large, and an error may outlive its request.
        super().__init__(message, field=field, value=plain(value), limit=limit, status=status)
        self.malformed = malformed


class Unauthorized(DatError):
    """The API key is missing or wrong (HTTP 401, 403). Pass the right key as `Client(..., api_key=...)`."""


class Unavailable(DatError):
    """No valid answer arrived in time. The call may be repeated, because Q is a pure function.

    `attempts` is the number of attempts. `cause` describes the last failure as text, and `__cause__` is its
    exception (lost in pickling, because connection errors hold sockets). `status` is the HTTP status of the
    service's last answer, or 408 if a proxy found the request too slow; None if the network failed or another
    server answered. `retry_after_s` is the pause in seconds that the service asked for (Retry-After); None if it
    asked for none.
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
    """The server is full. Repeat the call after `retry_after_s` seconds; if that is None, choose a pause."""


class ProtocolError(DatError):
    """The answer does not follow the protocol, or TLS failed. Usually the URL is wrong or a proxy answered."""


class InvalidDataset(DatError, ValueError):
    """A folder was not written by `dat precompute`, is damaged, or lacks the data that the caller asked for."""


class CodecChanged(UserWarning):
    """The codec's weights changed between two answers, so Q is no longer the function the run began with.

    `warnings.filterwarnings("error", category=CodecChanged)` turns this warning into an exception.
    """
