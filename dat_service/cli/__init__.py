"""The command `dat`."""
