"""Does `dat precompute` cost more than its codec, and does it stay as fast with many shards?

    OMP_WAIT_POLICY=PASSIVE python benchmarks/precompute.py SHARD.tar... --markdown benchmarks/results/precompute.md

codec     images/s of a job with `tiny-f8`, pictures at 224², beside the engine alone on the same pictures, decoded
identity  a job whose codec copies, beside webdataset alone that reads, decodes, encodes in the same way and writes
          the same shards; and beside webdataset that copies them without decoding the pictures
shards    1,000 shards of 10 pictures of 32²: time per shard of the first and of the last hundred; resident memory

Contestants take turns in one run. The time of a job excludes the loading of its codec, as that of the engine does.
"""

from __future__ import annotations

import argparse
import io
import shutil
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import webdataset
from PIL import Image

from benchmarks import machine
from benchmarks.tables import aligned, machine_line
from dat_client.wire.tensors import Array
from dat_service.bench.timing import Timing, ratio, time_in_turns
from dat_workers.discretizer import Discretizer
from dat_workers.images.crops import centre_crops
from dat_workers.precompute import JobProgress, Summary, precompute

SIDE = 224
SHARDS, SAMPLES = 1000, 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", nargs="+", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--parts", default="codec,identity,shards")
    parser.add_argument("--markdown", type=Path, help="write the result to this file too")
    arguments = parser.parse_args()
    lines = ["# dat precompute", "", f"Machine: {machine_line(machine.describe(torch.device('cpu')))}", ""]
    with tempfile.TemporaryDirectory() as folder:
        for part in arguments.parts.split(","):
            text = PARTS[part](arguments.shards, Path(folder), arguments.rounds)
            print(text, flush=True)
            lines += [f"## {part}", "", "```", text, "```", ""]
    if arguments.markdown:
        lines.insert(3, f"Command: python benchmarks/precompute.py SHARDS --rounds {arguments.rounds}")
        arguments.markdown.write_text("\n".join(lines))


def job(
    sources: list[Path], dst: Path, codec: str, report: Callable[[JobProgress], None] = lambda _: None
) -> Summary:
    """Runs one job into an empty folder."""
    shutil.rmtree(dst, ignore_errors=True)
    side = SIDE if codec == "tiny-f8" else None
    return precompute([str(path) for path in sources], str(dst), codec=codec, report=report, resize=side, crop=side)


def compare(contestants: dict[str, Callable[[], float]], rounds: int, images: int) -> str:
    """Returns the images/s of each, and how many times as fast the first is; contestants return their seconds."""

    def sum_of_seconds(call: Callable[[], Any], calls: int) -> float:
        return float(sum(call() for _ in range(calls)))

    timings = time_in_turns(contestants, rounds=rounds, warmup=1, clock=sum_of_seconds, least_s=0)
    first = next(iter(timings.values()))
    rows = [["", "images/s", "lowest", "highest", "the job is times as fast"]]
    for name, timing in timings.items():
        rows.append([name, *spread(timing, images), against(first, timing)])
    return aligned(rows)


def spread(timing: Timing, images: int) -> list[str]:
    """Returns the median, lowest and highest images/s."""
    if timing.error:
        return [timing.error, "", ""]
    return [f"{images / s:.1f}" for s in (timing.median, max(timing.seconds), min(timing.seconds))]


def against(first: Timing, timing: Timing) -> str:
    """Returns how many times as fast the first contestant is."""
    times = ratio(first, timing)
    return f"{times.median:.2f} ({times.low:.2f} to {times.high:.2f})" if times else ""


def codec(sources: list[Path], folder: Path, rounds: int) -> str:
    """Compares a job with the engine alone, on the pictures of the first shard."""
    sources = sources[:1]
    pictures = centre_crops(sources, SIDE)
    engine = Discretizer.from_store("tiny-f8")
    engine.warm_up()

    def alone() -> float:
        began = time.perf_counter()
        engine.discretize(pictures)
        return time.perf_counter() - began

    contestants = {"dat precompute": lambda: job(sources, folder / "q", "tiny-f8").seconds, "engine alone": alone}
    return compare(contestants, rounds, len(pictures))


def identity(sources: list[Path], folder: Path, rounds: int) -> str:
    """Compares a job whose codec copies with webdataset alone."""
    images = sum(1 for path in sources for name in names(path) if name.endswith(".jpg"))
    contestants: dict[str, Callable[[], float]] = {
        "dat precompute, identity": lambda: job(sources, folder / "i", "identity").seconds,
        "webdataset: read, decode, encode, write": lambda: rewritten(sources, folder / "w", decode=True),
        "webdataset: read, write": lambda: rewritten(sources, folder / "w", decode=False),
    }
    return compare(contestants, rounds, images)


def names(path: Path) -> list[str]:
    """Returns the names of the members of a shard."""
    with tarfile.open(path) as tar:
        return tar.getnames()


def rewritten(sources: list[Path], folder: Path, *, decode: bool) -> float:
    """Returns the seconds that webdataset takes to read the shards and write them again, shard by shard."""
    folder.mkdir(exist_ok=True)
    began = time.perf_counter()
    for source in sources:
        dataset = webdataset.WebDataset(str(source), shardshuffle=False)
        with webdataset.TarWriter(str(folder / source.name), encoder=False) as writer:
            for sample in dataset.decode("pil", only="jpg") if decode else dataset:
                fields = {name: value for name, value in sample.items() if name == "__key__" or name[0] != "_"}
                if decode:
                    fields["jpg"] = as_jpeg(fields["jpg"])
                writer.write(fields)
    return time.perf_counter() - began


def as_jpeg(image: Image.Image) -> bytes:
    """Encodes as `dat precompute` does by default."""
    out = io.BytesIO()
    image.convert("RGB").save(out, "JPEG", quality=95, subsampling=0)
    return out.getvalue()


def shards(sources: list[Path], folder: Path, rounds: int) -> str:
    """Measures the time per shard and the memory of a job with many small shards."""
    small = folder / "small"
    small.mkdir()
    pictures = centre_crops(sources[:1], 32, limit=SAMPLES)
    for i in range(SHARDS):
        write_small(small / f"{i:06d}.tar", pictures)
    process = psutil.Process()
    samples: list[tuple[int, float, float]] = []

    def watch(state: JobProgress) -> None:
        samples.append((state.shards_done, state.seconds, process.memory_info().rss / 1e6))

    job([small], folder / "many", "identity", watch)
    marks = [at(samples, number) for number in (0, 100, SHARDS - 100, SHARDS)]
    ms = [1000 * (marks[i + 1][1] - marks[i][1]) / (marks[i + 1][0] - marks[i][0]) for i in (0, 2)]
    memory = [
        statistics.median(mb for done, _, mb in samples if a <= done <= b) for a, b in ((50, 150), (850, 1000))
    ]
    return (
        f"{SHARDS} shards of {SAMPLES} pictures: {ms[0]:.1f} ms a shard among the first hundred, {ms[1]:.1f} among "
        f"the last ({ms[1] / ms[0]:.2f} times); {memory[0]:.1f} MB resident at the first hundred, {memory[1]:.1f} "
        f"at the last ({memory[1] / memory[0] - 1:+.2%})"
    )


def at(samples: list[tuple[int, float, float]], number: int) -> tuple[int, float, float]:
    """Returns the first sample at which so many shards were done."""
    return next(sample for sample in samples if sample[0] >= number)


def write_small(path: Path, pictures: Array) -> None:
    """Writes a shard of these pictures."""
    with tarfile.open(path, "w") as tar:
        for i, picture in enumerate(pictures):
            content = as_jpeg(Image.fromarray(np.ascontiguousarray(picture.transpose(1, 2, 0))))
            member = tarfile.TarInfo(f"{path.stem}-{i}.jpg")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


PARTS = {"codec": codec, "identity": identity, "shards": shards}

if __name__ == "__main__":
    main()
