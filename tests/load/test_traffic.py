"""The clients of the tests under load, tried for a moment: the long tests are rarely run."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

from tests.load.answers import CODEC, KINDS, compute_answers
from tests.load.traffic import Traffic


def test_right_and_wrong_answers_are_told_apart(serve_app: Callable[..., str]) -> None:
    url = serve_app(codec=CODEC, threads=1)
    answers = compute_answers(12, 16)
    with Traffic([url] * 2, answers, kinds=KINDS, most=4) as traffic:
        deadline = time.monotonic() + 60
        while traffic.answered < 2 * len(KINDS) and time.monotonic() < deadline:
            time.sleep(0.05)
    figures = traffic.figures()
    assert figures["errors"] == []
    assert figures["calls"] >= 2 * len(KINDS)
    assert figures["repeated by the client"] == 0
    wrong = dataclasses.replace(answers, reconstruction=answers.reconstruction ^ 1)
    with Traffic([url], wrong, kinds=["plain"]) as traffic:
        while not traffic.records[0].errors and time.monotonic() < deadline:
            time.sleep(0.05)
    assert "WrongAnswer: reconstruction: images [0, 1" in traffic.figures()["errors"][0]
