"""Sends whole datasets through Q once (`dat precompute`): source shards in, shards of Q(x) or its tokens out.

    job.py             gives the missing shards to workers, and those of a lost worker to another one
    sources.py         finds the source shards that SRC stands for
    recipe.py          the settings that decide the bytes of a shard (DST/precompute.json)
    output_folder.py   DST: finished shards and their manifest, unfinished files and locks of jobs
    local_workers.py   workers in this process
    ray_workers.py     workers as Ray actors; notices the ones that are killed
    worker.py          one codec and the shards that go through it; skips samples that are not usable
    pipeline.py        the way of one sample: decode its picture, Q, encode its fields
    shards.py          reads a source shard and writes an output shard
    views.py           crops a picture and replaces tokens, by the sample's key alone
    contact_sheet.py   64 samples beside their Q(x), as a page to look at

What `dat_client.webdataset` must know to read the result is in `dat_client.dataset_format`.
"""

from dat_workers.precompute.job import JobProgress, Summary, precompute
from dat_workers.precompute.output_folder import OtherRecipe
from dat_workers.precompute.worker import SampleFailed

__all__ = ["JobProgress", "OtherRecipe", "SampleFailed", "Summary", "precompute"]
