"""The exceptions of the codec side; none of them knows how the request arrived.

ValueError
└── InvalidInput        the caller's mistake: field, value, limit
    └── TooLarge        a limit on size or number is exceeded
RuntimeError
├── EngineError         the codec's own failure: images that are not finite, a device that fails
│   ├── OutOfMemory     the device has no memory for the request, not even for half the batch
│   └── Unhealthy       nothing can be computed here any more
├── Full                no more requests are taken now: retry_after_s
└── DeadlinePassed      the caller no longer waits for the answer
"""

from __future__ import annotations


class InvalidInput(ValueError):
    """A field of the request is not usable; nothing was computed.

    >>> str(InvalidInput("images", "float64", "uint8, float16 or float32"))
    'images: float64 is not usable; expected uint8, float16 or float32'
    """

    def __init__(self, field: str, value: object, limit: str, message: str | None = None) -> None:
        self.field, self.value, self.limit = field, str(value)[:80], limit
        super().__init__(message or f"{field}: {self.value} is not usable; expected {limit}")

    def __reduce__(self) -> tuple[type[InvalidInput], tuple[str, str, str, str]]:
        """Makes it picklable: by default an exception is rebuilt from the arguments of `Exception` alone."""
        return type(self), (self.field, self.value, self.limit, str(self))


class TooLarge(InvalidInput):
    """The request has more or larger parts than the service takes."""


class EngineError(RuntimeError):
    """The engine could not compute a correct answer, so there is none."""


class OutOfMemory(EngineError):
    """The device has no memory for this request, not even for half of it at a time."""


class Unhealthy(EngineError):
    """The engine is lost or hangs. This process must be replaced; another one may well give the answer."""


class Full(RuntimeError):
    """No more requests can be held or queued now; try again in `retry_after_s` seconds.

    >>> str(Full("64 requests are held", "at most 64", 1))
    '64 requests are held, at most 64; try again in 1 s'
    """

    def __init__(self, value: str, limit: str, retry_after_s: int) -> None:
        self.value, self.limit, self.retry_after_s = value, limit, retry_after_s
        super().__init__(f"{value}, {limit}; try again in {retry_after_s} s")


class DeadlinePassed(RuntimeError):
    """The caller's deadline has passed; the rest of the request is not computed."""


def one_line(error: BaseException) -> str:
    """Returns an error as text; kept as an exception it would keep its frames' tensors alive."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}".removesuffix(": ")
