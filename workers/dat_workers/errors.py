"""What can be wrong with a request, apart from how it arrived.

ValueError
└── InvalidInput        the caller's: field, value, limit
    └── TooLarge        a limit on size or number is passed
RuntimeError
├── EngineError         the codec's own: non-finite pictures, a device that fails
│   ├── OutOfMemory     of the device, also with half the batch
│   └── Unhealthy       nothing can be computed here any more
├── Full                no more work is taken now: retry_after_s
└── DeadlinePassed      nobody waits for the answer any longer
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
        """It travels between processes; an exception by itself only with what it gave to `Exception`."""
        return type(self), (self.field, self.value, self.limit, str(self))


class TooLarge(InvalidInput):
    """More or larger than the service takes."""


class EngineError(RuntimeError):
    """The engine could not give a right answer, so it gives none."""


class OutOfMemory(EngineError):
    """The device has no room for this, not even for half of it at a time."""


class Unhealthy(EngineError):
    """The engine is lost or hangs: this process must be replaced, and another one may well give the answer."""


class Full(RuntimeError):
    """As much is held or waits as may; come again in `retry_after_s`.

    >>> str(Full("64 requests are held", "at most 64", 1))
    '64 requests are held, at most 64; try again in 1 s'
    """

    def __init__(self, what: str, limit: str, retry_after_s: int) -> None:
        self.value, self.limit, self.retry_after_s = what, limit, retry_after_s
        super().__init__(f"{what}, {limit}; try again in {retry_after_s} s")


class DeadlinePassed(RuntimeError):
    """The time that the caller gave is over; what was not computed yet is not computed."""
