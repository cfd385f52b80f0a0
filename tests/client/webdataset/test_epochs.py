"""Which samples ranks and workers read in an epoch, and how many."""

from __future__ import annotations

import pickle
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch
import webdataset
from torch.utils.data import DataLoader

from dat_client import InvalidDataset
from dat_client.webdataset import load

from .precomputed import (
    KEPT,
    NAMES,
    numbers,
    one_view,
    pictures,
    write_pair,
)


def test_every_key_once_over_ranks_and_workers(dst: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for shuffle in (0, 8):
        data = load(dst, tokens=True, shuffle=shuffle)
        for _ in range(2):  # epochs
            read = []
            for rank in range(2):
                monkeypatch.setenv("RANK", str(rank))
                loader = DataLoader(data, batch_size=2, num_workers=2)
                for tokens, labels in loader:
                    batch = numbers(zip(tokens, labels, strict=True))
                    assert labels.tolist() == [number % 10 for number in batch]
                    read += batch
            assert sorted(read) == KEPT


def test_a_spawned_worker_knows_its_rank(dst: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With torch.multiprocessing.spawn a worker has neither the variables of torchrun nor the process group."""
    data = load(dst, tokens=True)
    read = []
    for rank in range(2):
        with monkeypatch.context() as trainer:
            trainer.setenv("RANK", str(rank))
            trainer.setenv("WORLD_SIZE", "2")
            sent = ForkingPickler.dumps(data)
        read.append(numbers(pickle.loads(sent)))
    assert sorted(read[0] + read[1]) == KEPT
    assert min(map(len, read)) > 0


@pytest.mark.parametrize("workers", [0, 2])
def test_epochs_differ_and_a_seed_repeats_them(dst: Path, workers: int) -> None:
    def epochs(seed: int, **how: Any) -> list[list[int]]:
        data = load(dst, tokens=True, shuffle=8, seed=seed)
        loader = DataLoader(data, batch_size=None, num_workers=workers, **how)
        return [numbers(loader) for _ in range(3)]

    first = epochs(1)
    assert first[0] != first[1] != first[2] != first[0]
    assert all(sorted(epoch) == KEPT for epoch in first)
    torch.manual_seed(5)  # not by torch's seed
    assert epochs(1) == first
    assert epochs(2) != first
    if workers:
        assert epochs(1, persistent_workers=True) == first
    assert numbers(load(dst, tokens=True)) == KEPT  # as stored


def read_by_all(
    dst: Path, ranks: int, workers: int, monkeypatch: pytest.MonkeyPatch, **options: Any
) -> list[list[int]]:
    """Returns the samples that each rank reads in an epoch."""
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    read = []
    for rank in range(ranks):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("NUM_WORKERS", str(workers))
        data = load(dst, tokens=True, **options)
        of_rank = []
        for worker in range(workers):
            monkeypatch.setenv("WORKER", str(worker))
            of_rank += numbers(data)
        assert len(of_rank) == len(data)  # known from the manifest, whatever the number of workers
        read.append(of_rank)
    return read


@pytest.mark.parametrize("shuffle", [0, 5])
@pytest.mark.parametrize("workers", [1, 2, 3, 4, 7, 20])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5, 6, 8, 17])
def test_every_sample_once_for_any_number_of_ranks_and_workers(
    dst: Path, ranks: int, workers: int, shuffle: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = read_by_all(dst, ranks, workers, monkeypatch, shuffle=shuffle)
    assert sorted(number for of_rank in read for number in of_rank) == KEPT
    assert min(map(len, read)) > 0
    if ranks > len(NAMES):  # samples are dealt instead of shards
        assert max(map(len, read)) - min(map(len, read)) <= 1


def test_whole_shards_are_dealt_where_there_are_enough(dst: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = read_by_all(dst, 2, 1, monkeypatch)
    assert read == [[n for n in KEPT if n // 4 in shards] for shards in ((0, 2, 4), (1, 3))]


def test_one_shard_for_several_workers_of_a_data_loader(tmp_path: Path) -> None:
    src, dst = write_pair(tmp_path, NAMES[:1], 7, one_view)
    data = load(dst, source=src, tokens=True, view="all")
    loader = DataLoader(data, batch_size=None, num_workers=2)
    assert len(loader) == 7
    for _ in range(2):
        pairs = [(65535 - int(tokens[0, 0]), x) for x, tokens, _ in loader]
        assert sorted(number for number, _ in pairs) == list(range(7))
        assert all(torch.equal(x, pictures(number)[0]) for number, x in pairs)


def test_more_ranks_than_samples_are_refused(dst: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "18")
    monkeypatch.setenv("RANK", "0")
    message = "has 17 samples in 5 shards for 18 ranks, so rank 17 would get none: use fewer ranks"
    with pytest.raises(InvalidDataset, match=message):
        list(load(dst))
    with pytest.raises(InvalidDataset, match=message):
        len(load(dst))


def test_the_length_of_a_data_loader(augmented: tuple[Path, Path], dst: Path) -> None:
    assert len(load(dst)) == 17
    assert len(load(augmented[1])) == len(load(augmented[1], view=2)) == 11
    assert len(load(augmented[1], view="all")) == 33
    for workers in (0, 1):
        for drop_last, batches in ((False, 5), (True, 4)):
            loader = DataLoader(load(dst), batch_size=4, num_workers=workers, drop_last=drop_last)
            assert len(loader) == len(list(loader)) == batches
    loader = DataLoader(load(dst), batch_size=3, num_workers=2)  # of 10 and 7 samples, so each has a batch of 1
    assert (len(loader), len(list(loader))) == (6, 7)


def test_the_length_of_a_pipeline_is_true_or_unknown(dst: Path) -> None:
    data = load(dst, tokens=True)
    assert len(data.map(lambda item: item).shuffle(10)) == 17
    assert len(load(dst).repeat(3)) == len(list(load(dst).repeat(3))) == 51
    unknown = (
        data.compose().repeat(), data.compose().with_epoch(5), data.compose().repeat(2, 20), data.batched(4),
        data.select(bool), data.map(lambda item: item, handler=webdataset.ignore_and_continue),
    )  # fmt: skip
    for pipeline in unknown:
        with pytest.raises(TypeError, match=r"length .*not known; set it by \.with_length"):
            len(pipeline)
        assert pipeline
    with pytest.warns(UserWarning, match="with_length"):
        assert len(data.compose().with_epoch(5).with_length(5)) == 5
