"""The version, in a module that imports nothing (pyproject.toml holds the same; a test compares them)."""

__version__ = "0.1.0"
