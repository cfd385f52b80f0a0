"""The format of a precomputed dataset, on which its writer and its reader must agree.

    DST/precompute.json                    the recipe: codec, outputs, geometry, views    (manifest.py)
    DST/train-000000.tar                   a WebDataset shard of samples                  (tar_samples.py)
    DST/manifest/train-000000.tar.json     the manifest entry of that shard               (manifest.py)

`dat_workers.precompute` writes this format and `dat_client.webdataset` reads it. The code is in the client because
dat_client is the only package that both sides install. naming.py has the names of shards, keys and fields;
folders.py lists a folder, and left_out.py counts what is passed over. pictures.py and views.py, which decode and
crop, import Pillow; the other modules need the standard library only.
"""
