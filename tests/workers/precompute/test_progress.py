"""The progress that a job reports: phases, and the share of what is finished."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dat_client.dataset_format.manifest import ManifestEntry
from dat_workers.engines.config import EngineConfig
from dat_workers.precompute import JobProgress, precompute
from dat_workers.precompute.job import Job
from dat_workers.precompute.progress import (
    COMPUTING,
    CONTACT_SHEET,
    LOADING,
    LOOKING,
    ShardCounts,
    Tally,
    WorkerCounts,
)  # fmt: skip
from dat_workers.precompute.shard_writer import ShardWriter
from dat_workers.sources.folders import Shard
from tests.workers.precompute.shards import encoded, picture, sample_files, write_shards, write_tar


def reports_of(source: Path, dst: Path, **options: Any) -> list[JobProgress]:
    reports: list[JobProgress] = []
    precompute(
        str(source),
        str(dst),
        codec="identity",
        engine_config=EngineConfig(threads=1),
        report=reports.append,
        **options,
    )
    return reports


def test_progress_goes_from_nothing_to_all(tmp_path: Path) -> None:
    reports = reports_of(write_shards(tmp_path / "src", 4), tmp_path / "dst")
    last = reports[-1]
    assert (last.share, last.images, last.samples_done, last.shards_done, last.shards) == (1.0, 20, 20, 4, 4)
    phases = [progress.phase for progress in reports]
    assert phases == sorted(phases, key=[LOADING, LOOKING, COMPUTING, CONTACT_SHEET].index)
    assert {LOADING, LOOKING, COMPUTING, CONTACT_SHEET} == set(phases)
    computing = [progress.share for progress in reports if progress.phase == COMPUTING]
    assert computing == sorted(computing)
    again = reports_of(tmp_path / "src", tmp_path / "dst")
    assert (again[-1].share, again[-1].images, again[-1].samples_done) == (1.0, 0, 20)
    assert [(p.shards_looked, p.share) for p in again if p.phase == LOOKING][-1] == (4, 1.0)


@pytest.mark.parametrize("folder", [True, False])
def test_the_share_counts_what_is_written_and_not_what_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: bool
) -> None:
    """All 40 samples of a shard are read before the first is written: that alone is no progress."""
    if folder:
        for i in range(40):
            (tmp_path / "src" / "a").mkdir(parents=True, exist_ok=True)
            (tmp_path / "src" / "a" / f"{i:02}.png").write_bytes(encoded(picture(i)))
    else:
        write_tar(tmp_path / "src" / "a.tar", [file for i in range(40) for file in sample_files(i)])
    shares: list[float | None] = []
    written: list[int] = []
    add = ShardWriter.add
    progress: list[JobProgress] = []

    def add_and_look(self: ShardWriter, key: str, fields: dict[str, bytes]) -> None:
        written.append(self.samples)
        shares.append(job[0].progress().share)
        progress.append(job[0].progress())
        add(self, key, fields)

    job: list[Job] = []
    run = Job.run
    monkeypatch.setattr(Job, "run", lambda self: (job.append(self), run(self))[1])
    monkeypatch.setattr(ShardWriter, "add", add_and_look)
    reports_of(tmp_path / "src", tmp_path / "dst")
    assert written == list(range(40))
    assert [state.samples_done for state in progress] == written
    assert {state.samples for state in progress} == {40 if folder else None}
    assert {state.unit for state in progress} == {"samples" if folder else "bytes"}
    for share, number in zip(shares, written, strict=True):
        assert share is not None
        if folder:
            assert share == number / 40
        else:  # a tar is read in blocks, so a sample's bytes are counted with the first sample of a block
            assert share <= (number + 16) / 40
    assert shares[0] == 0.0


def test_the_shares_of_workers_add_up() -> None:
    a, b = Shard("a.tar", "/src/a.tar", 100), Shard("b.tar", "/src/b.tar", 300)
    tally = Tally([a, b])
    counts = WorkerCounts.together(
        [
            WorkerCounts("1", 7, {"a.tar": ShardCounts(50, 5, 1)}),
            WorkerCounts("2", 3, {"b.tar": ShardCounts(400, 9, 0)}),  # more than its 300 bytes
        ]
    )
    state = tally.progress(COMPUTING, counts)
    assert (state.nbytes_done, state.samples_done, state.skipped, state.images) == (350, 14, 1, 10)
    assert state.share == 350 / 400
    tally.finish(a, ManifestEntry("a.tar", 10, 1, "", "", (("k", "bad"), ("l", "bad")), ("/src/a.tar", 100, "")))
    state = tally.progress(COMPUTING, counts)  # what a worker says of a finished shard does not count twice
    assert (state.shards_done, state.nbytes_done, state.samples_done, state.skipped) == (1, 400, 21, 2)
    assert state.share == 1.0
    lost = tally.progress(COMPUTING, WorkerCounts("1", 7, {"a.tar": ShardCounts(50, 5, 1)}))
    assert lost.share == 100 / 400


def test_without_sizes_shards_are_counted() -> None:
    tally = Tally([Shard("a.tar", "/src/a.tar", 0), Shard("b.tar", "/src/b.tar", 0)])
    tally.finish(Shard("a.tar", "/src/a.tar", 0), ManifestEntry("a.tar", 10, 1, "", "", (), ("/src/a.tar", 0, "")))
    state = tally.progress(COMPUTING, WorkerCounts())
    assert (state.unit, state.share) == ("shards", 0.5)
    assert tally.progress(LOADING, WorkerCounts()).share is None
