"""A codec that changes while a run goes on is told to its user."""

from __future__ import annotations

import warnings

from dat_client.errors import CodecChanged


class Watch:
    """The fingerprint that answered last; a change is told once for each pair of old and new.

    While a codec is being replaced, replica by replica, answers alternate between the two: that is two warnings.
    """

    def __init__(self, last: str | None = None) -> None:
        self.last = last
        self._told: set[tuple[str, str]] = set()

    def saw(self, fingerprint: str | None, codec: str) -> None:
        """Warns with CodecChanged where `fingerprint` is not the one before it."""
        last, self.last = self.last, fingerprint or self.last
        if last is None or fingerprint is None or fingerprint == last or (last, fingerprint) in self._told:
            return
        self._told.add((last, fingerprint))
        message = f"codec {codec!r} changed: it answered with fingerprint {last} before, with {fingerprint} now"
        warnings.warn(message, CodecChanged, stacklevel=5)  # the caller of discretize or decode
