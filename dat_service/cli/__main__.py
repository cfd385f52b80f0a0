"""`python -m dat_service.cli`: the command `dat`."""

from dat_service.cli.main import app

app()
