"""An HTML page of 64 samples beside their Q(x), for a person to look at before a model is trained on them."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable
from itertools import islice

import numpy as np
from PIL import Image

from dat_client.dataset_format.naming import INDICES_FIELD, picture_field, view_prefix
from dat_client.dataset_format.tar_samples import DamagedShard, Sample
from dat_client.wire.tensors import Array
from dat_workers.images.encoded import DATA_FORMATS, as_image, decode_picture, encode_jpeg, open_picture, pixels
from dat_workers.precompute.output_folder import OutputFolder
from dat_workers.precompute.recipe import Recipe
from dat_workers.precompute.views import views_of
from dat_workers.sources.find import Source
from dat_workers.sources.folders import Shard
from dat_workers.sources.reader import ShardReader

SAMPLES = 64
SIDE = 224  # pixels of each picture on the page
AMPLIFICATION = 4  # factor by which the difference is multiplied

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 14px system-ui, sans-serif; margin: 2em; background: #fff; color: #222 }}
main {{ display: flex; flex-wrap: wrap; gap: 1.2em }}
figure {{ margin: 0 }} img {{ display: block }} figcaption {{ max-width: {width}px; overflow-wrap: anywhere }}
</style>
<h1>{title}</h1>
<p>For {number} samples: x, Q(x) and {amplified} times their difference, shown around grey. The pictures are the
first views of the first samples of {shards} shards. Mean PSNR {psnr:.2f} dB.</p>
<main>
{figures}
</main></html>
"""


def contact_sheet(source: Source, folder: OutputFolder, recipe: Recipe, decode: Callable[[Array], Array]) -> bytes:
    """Returns a self-contained HTML page with x, Q(x) and their difference of up to 64 samples of all shards.

    The same shards always give the same page. `decode` turns tokens [N,h,w] into pictures uint8 [N,3,H,W]; it is
    called for shards that hold only tokens.
    """
    number = min(len(source.shards), SAMPLES)
    chosen = [source.shards[i * len(source.shards) // number] for i in range(number)]
    per_shard = -(-SAMPLES // number)
    figures: list[str] = []
    ratios: list[float] = []
    for shard in chosen:
        for key, x, q in pairs(shard, folder, recipe, decode, min(per_shard, SAMPLES - len(figures))):
            ratio = psnr(x, q)
            ratios.append(ratio)
            caption = html.escape(f"{key}: {ratio:.1f} dB".encode("utf-8", "replace").decode())
            triple = np.concatenate([fit(x), fit(q), fit(difference(x, q))], axis=2)
            data = base64.b64encode(encode_jpeg(triple, quality=90)).decode()
            image = f'<img alt="" src="data:image/jpeg;base64,{data}">'
            figures.append(f"<figure>{image}<figcaption>{caption}</figcaption></figure>")
    page = PAGE.format(
        title=html.escape(f"{recipe.codec} {recipe.fingerprint[:12]}"), width=3 * SIDE, amplified=AMPLIFICATION,
        number=len(figures), shards=number, psnr=float(np.mean(ratios)) if ratios else 0.0,
        figures="\n".join(figures),
    )  # fmt: skip
    return page.encode()


def pairs(
    shard: Shard, folder: OutputFolder, recipe: Recipe, decode: Callable[[Array], Array], number: int
) -> list[tuple[str, Array, Array]]:
    """Returns (key, x, Q(x)) of view 0 of the first samples of a shard, uint8 [3,H,W]."""
    found: list[tuple[str, Array, Array]] = []
    output = Shard(shard.name, folder.fs.unstrip_protocol(folder.at(shard.name)), 0)
    try:
        outputs = {sample.key: sample for sample in islice(ShardReader(output), number)}
        for sample in ShardReader(shard, recipe.classes):
            if not outputs:
                break
            if not sample.problem and sample.key in outputs:
                picture = open_picture(
                    sample.fields[picture_field(sample.fields)], field=sample.key, upright=recipe.upright,
                    formats=DATA_FORMATS,
                )  # fmt: skip
                x = pixels(next(views_of(recipe, sample.key, picture))[0])
                found.append((sample.key, x, reconstruction(outputs.pop(sample.key), recipe, x, decode)))
    except DamagedShard:  # show the pairs before the damage
        pass
    return found


def reconstruction(output: Sample, recipe: Recipe, x: Array, decode: Callable[[Array], Array]) -> Array:
    """Returns Q(x) of view 0 of an output sample, uint8 [3,H,W]."""
    prefix = view_prefix(0, recipe.views)
    if "reconstruction" in recipe.outputs:
        name = f"{prefix}{recipe.picture}"
        return decode_picture(output.fields[name], field=name)
    indices = np.load(io.BytesIO(output.fields[prefix + INDICES_FIELD]))
    height, width = x.shape[1:]
    picture: Array = decode(indices[None])[0, :, :height, :width]
    return picture


def psnr(x: Array, q: Array) -> float:
    """Returns the peak signal-to-noise ratio in dB, or 99 if the pictures are equal."""
    error = float(np.mean((x.astype(np.float64) - q) ** 2))
    return 10 * float(np.log10(255**2 / error)) if error else 99.0


def difference(x: Array, q: Array) -> Array:
    """Returns q - x times AMPLIFICATION, as uint8 around grey."""
    amplified = 128 + AMPLIFICATION * (q.astype(np.int32) - x)
    return amplified.clip(0, 255).astype(np.uint8)


def fit(picture: Array) -> Array:
    """Returns a picture scaled to fit into uint8 [3,SIDE,SIDE], with white margins."""
    image = as_image(picture)
    scale = SIDE / max(image.size)
    if scale < 1 or max(image.size) < SIDE // 2:
        image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    page = Image.new("RGB", (SIDE, SIDE), "white")
    page.paste(image)
    return pixels(page)
