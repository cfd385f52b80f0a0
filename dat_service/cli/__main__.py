"""Makes `python -m dat_service.cli` the same as the command `dat`."""

from dat_service.cli.main import app

app()
