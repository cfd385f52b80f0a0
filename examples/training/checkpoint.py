"""The state of a training in one file that is whole or not there."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


class CheckpointError(Exception):
    """The file is no checkpoint, or another training's."""


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Writes under a temporary name, then renames: a kill leaves the checkpoint before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        torch.save(dict(state), file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def load(path: Path, example: str) -> dict[str, Any]:
    """What `save` wrote, on the CPU. Raises CheckpointError where it is not a checkpoint of this example."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path}: not a checkpoint: {str(error).splitlines()[0]}") from error
    found = state.get("example") if isinstance(state, dict) else None
    if found != example:
        raise CheckpointError(f"{path}: a checkpoint of {found}, not of {example}")
    return dict(state)
