"""The exceptions of the codec side. They do not depend on how a request arrived (HTTP, Ray or Python).

ValueError
└── InvalidInput        the caller's mistake; has field, value and limit
    └── TooLarge        a limit on size or number is exceeded
RuntimeError
├── EngineError         a failure of the codec: results that are not finite, or a device that fails
│   ├── OutOfMemory     the device's memory is too small for the request, even for half of the batch
│   └── Unhealthy       this process cannot compute anything any more
├── Full                no more requests are accepted at the moment; has retry_after_s
└── DeadlinePassed      the deadline of the request has passed
"""

from __future__ import annotations

import json

from dat_client.errors import sentence


class InvalidInput(ValueError):
    """A field of the request is not usable, and nothing was computed.

    >>> str(InvalidInput("images", "float64", "uint8, float16 or float32"))
    'images: float64 is not usable; expected uint8, float16 or float32'

    `value` is the value of the field, if it is None, a number or a bool, or a text that describes it. The text may
    be a sentence, so it is not cut here: cut a value that a stranger has sent with `dat_client.errors.shown`.
    """

    def __init__(self, field: str, value: object, limit: str, message: str | None = None) -> None:
        self.field, self.limit = field, limit
        self.value = value if value is None or isinstance(value, bool | int | float) else str(value)
        as_text = json.dumps(self.value) if value is None or isinstance(value, bool) else str(value)
        super().__init__(message or f"{field}: {as_text} is not usable; expected {limit}")

    def __reduce__(self) -> tuple[type[InvalidInput], tuple[str, object, str, str]]:
        """Makes it picklable; by default pickle passes only the message to the constructor."""
        return type(self), (self.field, self.value, self.limit, str(self))


class TooLarge(InvalidInput):
    """The request has more parts, or larger parts, than the service accepts."""


class EngineError(RuntimeError):
    """The engine could not compute a correct result, so the request has no result."""


class OutOfMemory(EngineError):
    """The device's memory is too small for this request, even for half of the batch at a time."""


class Unhealthy(EngineError):
    """The engine has failed or hangs. This process must be replaced; a new process may compute the request."""


class Full(RuntimeError):
    """No more requests can be held or queued now; the caller should try again in `retry_after_s` seconds.

    >>> str(Full("64 requests are held", "at most 64", 1))
    '64 requests are held, at most 64; try again in 1 s'
    """

    def __init__(self, value: str, limit: str, retry_after_s: int) -> None:
        self.value, self.limit, self.retry_after_s = value, limit, retry_after_s
        super().__init__(f"{value}, {limit}; try again in {retry_after_s} s")

    def __reduce__(self) -> tuple[type[Full], tuple[str, str, int]]:
        """Makes it picklable; by default pickle passes only the message to the constructor."""
        return type(self), (self.value, self.limit, self.retry_after_s)


class DeadlinePassed(RuntimeError):
    """The caller's deadline has passed; the rest of the request is not computed."""


def one_line(error: BaseException) -> str:
    """Returns an error as one line of text; storing the exception itself would keep its frames' tensors alive."""
    return f"{type(error).__name__}: {sentence(str(error))}".removesuffix(": ")
