"""Sends whole datasets through Q once (`dat precompute`): source shards in, shards of Q(x) or its tokens out.

    checks.py          what can be wrong with the arguments, found before the codec is loaded
    job.py             gives missing shards to workers, and the shards of a lost worker to the remaining workers
    progress.py        which share of a job is finished
    recipe.py          the settings that decide the bytes of a shard (DST/precompute.json)
    output_folder.py   DST: finished shards and their manifest, unfinished files and locks of jobs
    local_workers.py   workers in this process
    ray_workers.py     workers as Ray actors; detects actors that are killed
    worker.py          computes shards with one codec, and skips samples that are not usable
    pipeline.py        processes one sample: decodes its picture, applies Q, encodes its fields
    shard_writer.py    writes an output shard
    views.py           crops a picture and replaces tokens; the sample's key decides every random draw
    contact_sheet.py   shows 64 samples beside their Q(x), as an HTML page

`dat_client.dataset_format` defines the output format, which `dat_client.webdataset` reads.
"""

from dat_workers.precompute.job import NoSamples, Summary, precompute
from dat_workers.precompute.output_folder import OtherRecipe
from dat_workers.precompute.progress import JobProgress
from dat_workers.precompute.worker import SampleFailed

__all__ = ["JobProgress", "NoSamples", "OtherRecipe", "SampleFailed", "Summary", "precompute"]
