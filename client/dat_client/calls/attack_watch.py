"""Warns the user if the adversarial step changes nothing for many batches in a row."""

from __future__ import annotations

import warnings

from dat_client.calls.core import Call
from dat_client.errors import shown
from dat_client.wire.vocabulary import with_defaults

BATCHES = 20


class AttackWatch:
    """Counts the answers in a row whose Q(x + δ) has the tokens of Q(x), and warns once, at the twentieth.

    Such a training runs, but it is not adversarial: δ is too short to reach another entry of the codebook.
    """

    def __init__(self) -> None:
        self._unchanged = 0
        self._warned = False

    def observe(self, call: Call, tokens_changed: float | None) -> None:
        """Counts the answer to a call, if it sent gradients, and if its codec has tokens."""
        if tokens_changed is None or "gradients" not in call.inputs:
            return
        step = with_defaults(call.parameters)
        if step.get("alpha") == 0:
            return
        self._unchanged = 0 if tokens_changed else self._unchanged + 1
        if self._unchanged < BATCHES or self._warned:
            return
        self._warned = True
        names = [name for name in ("preset", "normalize", "alpha", "epsilon") if step.get(name) is not None]
        values = ", ".join(f"{name}={shown(step[name])}" for name in names)
        hint = "pass a larger alpha, and check that the gradient of the loss is not 0"
        if step.get("normalize") == "none" and step["preset"] != "easyrobust":
            hint = "pass preset='easyrobust', whose δ has the L2 length α however short the gradient is"
        message = f"the attack changed no token in {BATCHES} batches in a row ({values}): {hint}"
        warnings.warn(message, RuntimeWarning, stacklevel=5)  # points at the caller of discretize
