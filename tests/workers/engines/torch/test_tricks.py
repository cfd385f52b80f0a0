"""One setting, seven tricks."""

from __future__ import annotations

from dataclasses import fields

import pytest

from dat_workers.engines.torch.tricks import Tricks

ALL = [field.name for field in fields(Tricks)]


def on(text: str, cuda: bool = True) -> list[str]:
    tricks = Tricks.parse(text, cuda=cuda)
    return [name for name in ALL if getattr(tricks, name)]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("all", ALL),
        ("auto", ALL),
        ("none", []),
        ("all,-graphs", [n for n in ALL if n != "graphs"]),
        ("-graphs", [n for n in ALL if n != "graphs"]),
        ("auto, -graphs, -overlap", [n for n in ALL if n not in ("graphs", "overlap")]),
        ("channels_last,sdpa", ["channels_last", "sdpa"]),
        ("none,fused_norm", ["fused_norm"]),
        ("sdpa,-sdpa", []),
    ],
)
def test_words(text: str, names: list[str]) -> None:
    assert on(text) == names


def test_a_cpu_keeps_the_published_order_and_has_no_graphs() -> None:
    assert on("auto", cuda=False) == []
    assert on("all", cuda=False) == [n for n in ALL if n not in ("graphs", "overlap")]
    assert on("graphs,overlap", cuda=False) == []


@pytest.mark.parametrize("text", ["all", "none", "all,-graphs", "sdpa,graphs"])
def test_text_and_back(text: str) -> None:
    tricks = Tricks.parse(text, cuda=True)
    assert Tricks.parse(str(tricks), cuda=True) == tricks


@pytest.mark.parametrize(
    ("text", "word"), [("grafs", "grafs"), ("all,-warp", "-warp"), ("sdpa,all", "all"), ("", "''")]
)
def test_unknown_words_are_named(text: str, word: str) -> None:
    with pytest.raises(ValueError, match=word) as caught:
        Tricks.parse(text, cuda=True)
    assert all(name in str(caught.value) for name in ALL)
