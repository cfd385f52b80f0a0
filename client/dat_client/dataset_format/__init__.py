"""The format of a precomputed dataset, on which its writer and its reader must agree.

    DST/precompute.json                    the recipe: codec, outputs, geometry, views    (manifest.py)
    DST/train-000000.tar                   a WebDataset shard of samples                  (tar_samples.py)
    DST/manifest/train-000000.tar.json     the manifest entry of that shard               (manifest.py)

`dat_workers.precompute` writes it and `dat_client.webdataset` reads it. The format lives in the client because
that is the only package both sides install. Its modules load the standard library, and Pillow in views.py; names of
shards, keys and fields are in naming.py.
"""
