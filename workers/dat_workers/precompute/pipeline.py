"""Passes samples through picture decoders, the codec's queue and encoders, which all run in separate threads."""

from __future__ import annotations

import io
import json
import os
import threading
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from PIL import Image

from dat_client.dataset_format.naming import INDICES_FIELD, VIEWS_FIELD, key_and_field, picture_field, view_prefix
from dat_client.dataset_format.pictures import orientation, turned_upright
from dat_client.dataset_format.tar_samples import Sample
from dat_client.wire.tensors import Array
from dat_workers.batching.batcher import Batcher
from dat_workers.batching.parts import Result
from dat_workers.discretizer import Discretizer
from dat_workers.errors import InvalidInput
from dat_workers.images.encoded import DATA_FORMATS, MAX_PIXELS, open_picture, pixels
from dat_workers.precompute.recipe import Recipe
from dat_workers.precompute.views import encode_indices, encode_picture, replace_sample_tokens, views_of

VIEW_BYTES = 6  # of memory for a pixel of a view: x and Q(x), uint8 RGB
MAX_VIEW_PIXELS = 2048 * 2048  # limit of a view that the codec computes; the picture itself may be larger


@dataclass
class PendingView:
    """One view on its way through the codec; `result` holds the codec's outputs."""

    x: Array
    description: dict[str, Any]  # its entry in views.json
    original: tuple[str, bytes] | None  # suffix and bytes of the encoded picture, if x is the whole picture
    orientation: int  # EXIF orientation of the source, for viewers of x and Q(x)
    result: Future[Result]
    indices: Array | None = None  # [h,w], where tokens were replaced


@dataclass(frozen=True)
class PendingSample:
    """A sample being processed: the future of its output `fields`, and about how many bytes of memory it takes.

    source_bytes: how many bytes of the source were read for it. lacking: the fields to be kept that it lacks.
    """

    key: str
    nbytes: int
    fields: Future[dict[str, bytes]]
    source_bytes: int
    lacking: tuple[str, ...]


class SamplePipeline:
    """Turns source samples into output samples, many at the same time, so that the codec's batches are full.

    With `low_priority`, decoders and encoders run only when the codec does not need the CPU that they share with
    it.
    """

    def __init__(self, discretizer: Discretizer, batcher: Batcher, *, low_priority: bool) -> None:
        self.discretizer, self.batcher = discretizer, batcher
        threads = max(2, len(os.sched_getaffinity(0)))
        initializer = lower_priority if low_priority else None
        self._decoders = ThreadPoolExecutor(threads, "decode", initializer)
        self._variants = ThreadPoolExecutor(1, "variants")
        self._encoders = ThreadPoolExecutor(threads, "encode", initializer)

    def submit(self, sample: Sample, recipe: Recipe, source_bytes: int = 0) -> PendingSample:
        """Starts to process a sample; the future raises ValueError or EngineError if the sample is not usable."""
        views = self._decoders.submit(self._decode_views, sample, recipe)
        if recipe.replace_fraction:
            views = self._variants.submit(self._make_variants, sample, views, recipe)
        fields = self._encoders.submit(self._encode_fields, sample, views, recipe)
        lacking = tuple(name for name in recipe.keep or () if name not in sample.fields)
        nbytes = sample.nbytes + decoded_bytes(sample, recipe)
        return PendingSample(sample.key, nbytes, fields, source_bytes, lacking)

    def stop(self) -> None:
        for pool in (self._decoders, self._variants, self._encoders):
            pool.shutdown(wait=False, cancel_futures=True)

    def _decode_views(self, sample: Sample, recipe: Recipe) -> list[PendingView]:
        """Decodes a sample's picture and submits each view of it to the codec."""
        if sample.problem:
            raise ValueError(sample.problem)
        if key_and_field(f"{sample.key}.{INDICES_FIELD}") is None:
            folder = sample.key.split("/")[0]
            raise ValueError(f"readers of shards pass over names such as {folder}/...: give it another name")
        name = picture_field(sample.fields)
        picture = open_picture(sample.fields[name], field=name, max_pixels=MAX_PIXELS, formats=DATA_FORMATS)
        original: tuple[str, bytes] | None = name.rpartition(".")[2], sample.fields[name]
        tag = orientation(picture)
        if recipe.upright and tag > 1:
            picture, tag = turned_upright(picture), 1
            original = None  # its bytes still have the tag
        return [
            self._submit_view(pixels(x), description, original if x is picture else None, tag, recipe)
            for x, description in views_of(recipe, sample.key, picture)
        ]

    def _submit_view(
        self,
        x: Array,
        description: dict[str, Any],
        original: tuple[str, bytes] | None,
        tag: int,
        recipe: Recipe,
    ) -> PendingView:
        height, width = x.shape[1:]
        if height * width > MAX_VIEW_PIXELS:
            limit = f"at most {MAX_VIEW_PIXELS} pixels for the codec; use --resize or --crop"
            raise InvalidInput("picture", f"{width}x{height} = {height * width} pixels", limit)
        outputs = ["indices"] if recipe.replace_fraction or "indices" in recipe.outputs else []
        if "reconstruction" in recipe.outputs and not recipe.replace_fraction:
            outputs.append("reconstruction")
        request = self.discretizer.prepare(x[None], outputs=outputs)
        return PendingView(x, description, original, tag, self.batcher.submit(request))

    def _make_variants(self, sample: Sample, views: Future[list[PendingView]], recipe: Recipe) -> list[PendingView]:
        """Replaces tokens of each view once for every variant, and submits the new tokens for decoding."""
        variants = []
        for i, view in enumerate(views.result()):
            indices = view.result.result().outputs["indices"][0]
            codebook_size = self.discretizer.spec.codebook_size
            for variant in range(recipe.variants):
                replaced = replace_sample_tokens(indices, recipe, sample.key, i, variant, codebook_size)
                result = view.result
                if "reconstruction" in recipe.outputs:
                    result = self.batcher.submit(self.discretizer.prepare_decode(replaced[None]))
                description = view.description | {"variant": variant}
                variants.append(PendingView(view.x, description, view.original, view.orientation, result, replaced))
        return variants

    def _encode_fields(
        self, sample: Sample, pending: Future[list[PendingView]], recipe: Recipe
    ) -> dict[str, bytes]:
        """Waits for the codec's results and returns the fields of the output sample."""
        fields: dict[str, bytes] = {}
        views = pending.result()
        for i, view in enumerate(views):
            outputs = view.result.result().outputs
            prefix = view_prefix(i, recipe.views)
            if "reconstruction" in recipe.outputs:
                height, width = view.x.shape[1:]
                reconstruction = outputs["reconstruction"][0, :, :height, :width]
                fields[f"{prefix}{recipe.picture}"] = encode_picture(reconstruction, recipe, view.orientation)
            if "indices" in recipe.outputs:
                indices = view.indices if view.indices is not None else outputs["indices"][0]
                fields[prefix + INDICES_FIELD] = encode_indices(indices)
            if "image" in recipe.outputs:
                suffix, content = view.original or (recipe.picture, b"")
                fields[f"{prefix}image.{suffix}"] = content or encode_picture(view.x, recipe, view.orientation)
        if recipe.augment or recipe.variants > 1:
            fields[VIEWS_FIELD] = json.dumps([view.description for view in views]).encode()
        picture = picture_field(sample.fields)
        for name, content in sample.fields.items():
            if (name in recipe.keep) if recipe.keep is not None else name != picture:
                if name in fields:
                    raise ValueError(f"the kept source field {name} has the name of an output field; see --keep")
                fields[name] = content
        return fields


def lower_priority() -> None:
    """Lowers this thread's priority below the codec's threads, which wait for each other after every layer."""
    with suppress(OSError):  # some systems have no priority per thread
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


def decoded_bytes(sample: Sample, recipe: Recipe) -> int:
    """Estimates from the picture's header how many bytes x and Q(x) of a sample's views take."""
    if recipe.crop is not None:
        return VIEW_BYTES * recipe.views * recipe.crop**2
    try:
        with (
            warnings.catch_warnings(),
            Image.open(io.BytesIO(sample.fields[picture_field(sample.fields)])) as image,
        ):
            warnings.simplefilter("ignore")
            return VIEW_BYTES * recipe.views * image.width * image.height
    except Exception:  # an unusable picture is reported when it is decoded
        return 0
