"""Writes and reads checkpoints: one file that is complete or absent."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


class CheckpointError(Exception):
    """The file is not a checkpoint, or belongs to another training."""


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Writes under a temporary name and renames, so that a kill leaves the previous checkpoint."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        torch.save(dict(state), file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def load(path: Path, example: str) -> dict[str, Any]:
    """Reads what `save` wrote, to the CPU. Raises CheckpointError if it is not a checkpoint of this example."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path}: not a checkpoint: {str(error).splitlines()[0]}") from error
    found = state.get("example") if isinstance(state, dict) else None
    if found != example:
        raise CheckpointError(f"{path}: this is a checkpoint of {found}, not of {example}")
    return dict(state)
