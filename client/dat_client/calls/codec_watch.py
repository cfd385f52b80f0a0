"""Warns the user if the weights of the codec change during a training run."""

from __future__ import annotations

import warnings

from dat_client.errors import CodecChanged


class FingerprintWatch:
    """Remembers the fingerprint of the last answer and warns once for each pair (previous, new) of fingerprints.

    While the service replaces its replicas one by one, answers alternate between the old and the new codec. That
    gives two warnings: one from old to new, and one from new to old.
    """

    def __init__(self, last: str | None = None) -> None:
        self.last = last
        self._warned: set[tuple[str, str]] = set()

    def observe(self, fingerprint: str | None, codec: str) -> None:
        """Warns with CodecChanged if `fingerprint` differs from that of the previous answer; None is ignored."""
        last, self.last = self.last, fingerprint or self.last
        if last is None or fingerprint is None or fingerprint == last or (last, fingerprint) in self._warned:
            return
        self._warned.add((last, fingerprint))
        message = f"codec {codec!r} changed: it answered with fingerprint {last} before, with {fingerprint} now"
        warnings.warn(message, CodecChanged, stacklevel=5)  # points at the caller of discretize or decode
