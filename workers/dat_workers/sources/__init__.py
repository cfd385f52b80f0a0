"""Finds and reads what a user names as data: shards, folders of pictures, or single pictures.

    addresses.py       paths and fsspec addresses: their file systems, and errors that name them
    find.py            the shards that a brace pattern, a glob, a folder or an address stands for
    folders.py         lists a folder, and divides a folder of pictures into shards
    kinds.py           what to do with data that are not shards
    reader.py          the samples of one shard

`dat precompute`, `dat train-codec`, `dat codecs verify`, `dat bench codec` and `dat discretize` all read their data
here, so that they find the same pictures. The rules about names are those of `dat_client.dataset_format`.
"""
