"""Whole datasets through Q once: `dat precompute`."""

from dat_workers.precompute.folder import OtherRecipe
from dat_workers.precompute.job import State, Summary, precompute
from dat_workers.precompute.worker import SampleFailed

__all__ = ["OtherRecipe", "SampleFailed", "State", "Summary", "precompute"]
