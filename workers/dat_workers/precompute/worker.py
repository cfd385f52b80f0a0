"""One codec and the shards that go through it: pictures are decoded, discretized and encoded side by side.

    reader, in order ─▶ decoders ─▶ the codec's queue (batching.py) ─▶ encoders ─▶ writer, in order

Several shards are on their way at once and share the queue, so that batches are full across the ends of shards.
"""

from __future__ import annotations

import io
import json
import os
import threading
import warnings
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from PIL import Image

from dat_workers.batching.batcher import Batcher
from dat_workers.batching.device_copies import Array
from dat_workers.batching.parts import Result
from dat_workers.discretizer import Discretizer
from dat_workers.engines.config import EngineConfig
from dat_workers.errors import EngineError, InvalidInput, OutOfMemory, Unhealthy
from dat_workers.images.encoded import MAX_PIXELS, open_picture, pixels
from dat_workers.precompute.folder import Entry, Folder
from dat_workers.precompute.recipe import Recipe
from dat_workers.precompute.samples import Damaged, Reader, Sample, picture_field
from dat_workers.precompute.sources import Shard
from dat_workers.precompute.views import encoded, encoded_tokens, views_of, with_others
from dat_workers.request import Work

SHARDS_AT_ONCE = 2
MAX_VIEW_PIXELS = 2048 * 2048  # of what goes through the codec; the source may be larger and cut
HELD_BYTES = 512 << 20  # of samples of one shard that are on their way, x and Q(x) among them
ON_CPU = "CPUExecutionProvider"  # ONNX Runtime's
WATCHDOG_S = 600.0
MAX_WAIT_S = 0.1  # for a batch to be filled: decoders may be behind, and nobody waits for one picture


class SampleFailed(RuntimeError):
    """A sample that cannot be used, where none may be skipped; names the shard and the sample."""


class Stopped(RuntimeError):
    """The job was stopped before the shard was done."""


@dataclass(frozen=True)
class Orders:
    """What a worker is told once: the recipe, where shards go, and whether a bad sample is skipped."""

    recipe: Recipe
    dst: str
    job: str
    skip: bool


@dataclass(frozen=True)
class Progress:
    """Counts of one worker since it started: images through the codec, bytes of sources read, samples skipped."""

    images: int = 0
    nbytes: int = 0
    skipped: int = 0

    def __add__(self, other: Progress) -> Progress:
        return Progress(self.images + other.images, self.nbytes + other.nbytes, self.skipped + other.skipped)


@dataclass
class View:
    """One picture on its way through the codec."""

    x: Array
    described: dict[str, Any]
    original: tuple[str, bytes] | None  # suffix and bytes of x as it came, where nothing was done to it
    made: Future[Result]
    indices: Array | None = None  # [h,w], where tokens were swapped


@dataclass(frozen=True)
class Pending:
    """A sample on its way: its fields, when they are ready."""

    key: str
    nbytes: int
    fields: Future[dict[str, bytes]]


def load(codec: str, config: EngineConfig) -> Discretizer:
    """Loads a codec and warms it up, in the thread that will run it."""
    import torch

    torch.set_num_threads(config.cpu_threads)
    discretizer = Discretizer.from_store(codec, config)
    discretizer.warm_up()
    return discretizer


class Worker:
    """Holds a codec and makes shards with it, from several threads at once.

    >>> worker = Worker("tiny-f8", EngineConfig())                # doctest: +SKIP
    >>> worker.shard(shard, orders).sha256                          # doctest: +SKIP
    """

    def __init__(self, codec: str, config: EngineConfig) -> None:
        self.batcher = Batcher(max_wait_s=MAX_WAIT_S, max_queue_s=float("inf"), watchdog_s=WATCHDOG_S)
        self.discretizer = self.batcher.start(lambda: load(codec, config))
        self.config = config
        said = self.discretizer.describe()
        self.on_gpu = said["device"] != "cpu" or said.get("provider", ON_CPU) != ON_CPU
        self.progress = Progress()
        self._counting = threading.Lock()
        self._stopping = threading.Event()
        threads = max(2, len(os.sched_getaffinity(0)))
        begin = None if self.on_gpu else let_others_first
        self._decoders = ThreadPoolExecutor(threads, "decode", begin)
        self._variants = ThreadPoolExecutor(1, "variants")
        self._encoders = ThreadPoolExecutor(threads, "encode", begin)

    def complete(self, recipe: Recipe) -> Recipe:
        """The recipe with what this codec says of itself. Raises InvalidInput for what it cannot do."""
        spec = self.discretizer.spec
        if not spec.has_tokens and ("indices" in recipe.outputs or recipe.replace_fraction):
            raise InvalidInput("outputs", f"tokens of codec {spec.name}", "a codec that has a codebook")
        return recipe.made_by(
            self.discretizer.fingerprint, self.discretizer.describe(), threads=self.config.cpu_threads
        )

    def shard(self, shard: Shard, orders: Orders) -> Entry:
        """Makes one output shard and enters it in the manifest.

        Raises SampleFailed, OSError, Unhealthy and OutOfMemory; then nothing of the shard is there.
        """
        folder, recipe = Folder(orders.dst, orders.job), orders.recipe
        reader = Reader(shard, recipe.classes)
        skipped: list[tuple[str, str]] = []
        pending: deque[Pending] = deque()
        batch = self.discretizer.engine.batch
        window = max(4, (4 * batch + 16) // recipe.views)
        # On a GPU another number of rows is another kernel, which may move a near-tie: there all batches are full.
        # Not where each picture has a size of its own, and would be computed over and over to fill one.
        self.batcher.padded = self.on_gpu and recipe.crop is not None

        def skip(key: str, reason: str) -> None:
            if not orders.skip:
                raise SampleFailed(f"{shard.address}, sample {key}: {reason}")
            skipped.append((key, reason))
            self._count(skipped=1)

        def finish(one: Pending) -> None:
            try:
                fields = one.fields.result()
            except (OutOfMemory, Unhealthy):
                raise
            except (ValueError, EngineError) as error:  # InvalidInput is a ValueError
                skip(one.key, str(error))
            else:
                out.add(one.key, fields)

        with folder.writing(shard.name) as out:
            try:
                held = 0
                for sample in self._read(reader):
                    pending.append(self._begin(sample, recipe))
                    held += pending[-1].nbytes
                    while len(pending) > window or held > HELD_BYTES:
                        held -= pending[0].nbytes
                        finish(pending.popleft())
                while pending:
                    finish(pending.popleft())
            except Damaged as error:
                while pending:
                    finish(pending.popleft())
                skip(error.key, str(error))
            finally:
                for one in pending:
                    one.fields.cancel()
        source = (shard.origin, shard.nbytes, reader.sha256)
        entry = Entry(shard.name, out.samples, out.nbytes, out.sha256, recipe.id, tuple(skipped), source)
        folder.enter(entry)
        return entry

    def counts(self) -> Progress:
        """What was done so far."""
        return self.progress

    def decode(self, indices: Array) -> Array:
        """Pictures uint8 [N,3,H,W] of tokens [N,h,w]."""
        work = self.discretizer.decode_work(indices)
        return self.batcher.submit(work).result().outputs["reconstruction"]

    def stop(self) -> None:
        """Ends what is on its way; `shard` raises Stopped."""
        self._stopping.set()
        self.batcher.stop()
        for pool in (self._decoders, self._variants, self._encoders):
            pool.shutdown(wait=False, cancel_futures=True)

    def _read(self, reader: Reader) -> Iterator[Sample]:
        """Samples of a shard, what is read being counted. Raises Damaged, OSError and Stopped."""
        counted = 0
        for sample in reader:
            if self._stopping.is_set():
                raise Stopped(reader.shard.name)
            self._count(nbytes=reader.nbytes - counted)
            counted = reader.nbytes
            yield sample

    def _count(self, images: int = 0, nbytes: int = 0, skipped: int = 0) -> None:
        with self._counting:
            self.progress = self.progress + Progress(images, nbytes, skipped)

    def _begin(self, sample: Sample, recipe: Recipe) -> Pending:
        """Sends a sample on its way through decoders, codec and encoders."""
        begun: Future[list[View]] = self._decoders.submit(self._views, sample, recipe)
        if recipe.replace_fraction:
            begun = self._variants.submit(self._with_variants, sample, begun, recipe)
        fields = self._encoders.submit(self._fields, sample, begun, recipe)
        return Pending(sample.key, sample.nbytes + decoded_bytes(sample, recipe), fields)

    def _views(self, sample: Sample, recipe: Recipe) -> list[View]:
        """Decodes a sample's picture, and asks the codec for each view of it."""
        if sample.problem:
            raise ValueError(sample.problem)
        name = picture_field(sample)
        picture = open_picture(sample.fields[name], field=name, max_pixels=MAX_PIXELS)
        original = name.rpartition(".")[2], sample.fields[name]
        return [
            self._view(pixels(x), described, original if x is picture else None, recipe)
            for x, described in views_of(recipe, sample.key, picture)
        ]

    def _view(
        self, x: Array, described: dict[str, Any], original: tuple[str, bytes] | None, recipe: Recipe
    ) -> View:
        height, width = x.shape[1:]
        if height * width > MAX_VIEW_PIXELS:
            limit = f"at most {MAX_VIEW_PIXELS} pixels through the codec: --resize or --crop"
            raise InvalidInput("picture", f"{width}x{height} = {height * width} pixels", limit)
        outputs = ["indices"] if recipe.replace_fraction or "indices" in recipe.outputs else []
        if "reconstruction" in recipe.outputs and not recipe.replace_fraction:
            outputs.append("reconstruction")
        return View(x, described, original, self._submit(self.discretizer.work(x[None], outputs=outputs)))

    def _submit(self, work: Work) -> Future[Result]:
        if work.result is not None:
            done: Future[Result] = Future()
            done.set_result(Result(work.result))
            return done
        return self.batcher.submit(work)

    def _with_variants(self, sample: Sample, begun: Future[list[View]], recipe: Recipe) -> list[View]:
        """Swaps tokens of each view, as often as there are variants, and has them decoded."""
        views = []
        for i, view in enumerate(begun.result()):
            indices = view.made.result().outputs["indices"][0]
            for variant in range(recipe.variants):
                others = with_others(indices, recipe, sample.key, i, variant, self.discretizer.spec.codebook_size)
                made: Future[Result] = Future()
                if "reconstruction" in recipe.outputs:
                    made = self._submit(self.discretizer.decode_work(others[None]))
                else:
                    made.set_result(Result({}))
                described = view.described | {"variant": variant}
                views.append(View(view.x, described, view.original, made, others))
        return views

    def _fields(self, sample: Sample, begun: Future[list[View]], recipe: Recipe) -> dict[str, bytes]:
        """The fields of the output sample, when the codec has made them."""
        fields: dict[str, bytes] = {}
        views = begun.result()
        for i, view in enumerate(views):
            made = dict(view.made.result().outputs)
            if view.indices is not None:
                made["indices"] = view.indices[None]
            prefix = recipe.prefix(i)
            if "reconstruction" in recipe.outputs:
                height, width = view.x.shape[1:]
                fields[f"{prefix}{recipe.picture}"] = encoded(made["reconstruction"][0, :, :height, :width], recipe)
            if "indices" in recipe.outputs:
                fields[f"{prefix}indices.npy"] = encoded_tokens(made["indices"][0])
            if "image" in recipe.outputs:
                suffix, data = view.original or (recipe.picture, b"")
                fields[f"{prefix}image.{suffix}"] = data or encoded(view.x, recipe)
        if recipe.augment or recipe.variants > 1:
            fields["views.json"] = json.dumps([view.described for view in views]).encode()
        picture = picture_field(sample)
        for name, content in sample.fields.items():
            if (name in recipe.keep) if recipe.keep is not None else name != picture:
                if name in fields:
                    raise ValueError(f"the field {name}, which is kept, has the name of one that is made")
                fields[name] = content
        self._count(images=len(views))
        return fields


def let_others_first() -> None:
    """Gives this thread what the codec's leave of the cores: those wait for each other after every layer."""
    with suppress(OSError):  # a system whose threads have no priority of their own
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


def decoded_bytes(sample: Sample, recipe: Recipe) -> int:
    """About what x and Q(x) of a sample's views take, from the picture's header alone."""
    if recipe.crop is not None:
        return 6 * recipe.views * recipe.crop**2
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(sample.fields[picture_field(sample)])) as image:
            warnings.simplefilter("ignore")
            return 6 * recipe.views * image.width * image.height
    except Exception:  # whatever it is: who decodes it says so
        return 0
