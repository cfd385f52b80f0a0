"""What can be wrong with a request, apart from how it arrived.

ValueError
└── InvalidInput        the caller's: field, value, limit
    └── TooLarge        a limit on size or number is passed
RuntimeError
└── EngineError         the codec's own: non-finite pictures, a device that fails
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


class TooLarge(InvalidInput):
    """More or larger than the service takes."""


class EngineError(RuntimeError):
    """The engine could not give a right answer, so it gives none."""
