"""Exceptions of the codec side cross processes: from Ray's actors, and from a DataLoader's workers."""

from __future__ import annotations

import json
import pickle

import pytest

from dat_client.wire import encode_error
from dat_workers.codecs.download import DownloadError
from dat_workers.codecs.registry import CodecNotFound
from dat_workers.errors import (
    DeadlinePassed,
    EngineError,
    Full,
    InvalidInput,
    OutOfMemory,
    TooLarge,
    Unhealthy,
    one_line,
)
from dat_workers.precompute import OtherRecipe, SampleFailed
from dat_workers.system.text import duration

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


def test_reasons_are_not_cut() -> None:
    reason = "12 bytes (OSError: " + "the picture ends before its last row, " * 10 + "fetch it again)"
    error = InvalidInput("images[0]", reason, "a whole JPEG, PNG or WebP picture")
    body = json.loads(encode_error(str(error), error.field, error.value, error.limit))
    assert body["value"] == reason
    assert body["error"] == f"images[0]: {reason} is not usable; expected a whole JPEG, PNG or WebP picture"
    assert one_line(RuntimeError(reason)) == f"RuntimeError: {reason}"
    assert len(one_line(RuntimeError("x" * 10_000))) < 1100  # another program's text has an end, and it is marked
    assert one_line(RuntimeError("x" * 10_000)).endswith(" ...")


def test_long_times_are_written_for_people() -> None:
    assert [duration(s) for s in (0.04, 59.96, 100_000)] == ["0.0 s", "0:01:00", "27:46:40"]
