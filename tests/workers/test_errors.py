"""Exceptions of the codec side cross processes: from Ray's actors, and from a DataLoader's workers."""

from __future__ import annotations

import pickle

import pytest

from dat_workers.codecs.download import DownloadError
from dat_workers.codecs.registry import CodecNotFound
from dat_workers.errors import DeadlinePassed, EngineError, Full, InvalidInput, OutOfMemory, TooLarge, Unhealthy
from dat_workers.precompute import OtherRecipe, SampleFailed

ERRORS = [
    InvalidInput("crop", 0, "1 to 8192 pixels"), TooLarge("images", 2000, "at most 1024"), EngineError("NaN"),
    OutOfMemory("batch of 1"), Unhealthy("lost"), Full("64 requests are held", "at most 64", 1),
    DeadlinePassed("5 s"), OtherRecipe("quality: 95, now 80"), SampleFailed("a.tar, sample k: no picture"),
    CodecNotFound("tiny", ["tiny-f8", "identity"]), DownloadError("https://host/a", "not found", 404),
]  # fmt: skip


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_every_error_survives_pickling(error: Exception) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy)) == (type(error), str(error))
    assert copy.__dict__ == error.__dict__
